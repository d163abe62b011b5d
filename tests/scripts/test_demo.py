import json

import pytest

from domainbed_kd.scripts import demo


def record(algorithm, env, trial, test, validation, step):
    accs = {f"env{i}_{split}_acc": test if i == env and split == "in" else validation
            for i in range(3) for split in ("in", "out")}
    args = {"dataset": "DigitsDG", "algorithm": algorithm, "test_envs": [env],
            "trial_seed": trial, "hparams_seed": 0, "seed": 0, "output_dir": "x", "steps": 2}
    return {**accs, "args": args, "hparams": {}, "step": step, "loss": 1.0}


@pytest.fixture
def sweep(tmp_path):
    def write(tests):
        for algorithm, of_pairs in tests.items():
            for (env, trial), test in of_pairs.items():
                folder = tmp_path / f"{algorithm}{env}{trial}"
                folder.mkdir()
                # Validation selects the first record; the other's test accuracy must not count.
                lines = [record(algorithm, env, trial, test, 0.9, 0),
                         record(algorithm, env, trial, 1.0, 0.8, 1)]
                (folder / "results.jsonl").write_text(
                    "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return tmp_path
    return write


def test_the_summary_counts_pairs_of_the_selected_checkpoints(sweep):
    folder = sweep({"ERM": {(0, 0): 0.5, (1, 0): 0.6, (0, 1): 0.5},
                    "KD": {(0, 0): 0.7, (1, 0): 0.6, (0, 1): 0.8}})
    assert demo.summary(folder) == (
        "KD is best, with 70.0 % on domains that it never trained on; ERM has 53.3 %. KD is ahead "
        "in 2 of 3 pairs of held-out domain and trial.")


def test_the_summary_does_not_compare_erm_with_itself(sweep):
    folder = sweep({"ERM": {(0, 0): 0.7}, "CORAL": {(0, 0): 0.5}})
    assert demo.summary(folder) == (
        "ERM is best, with 70.0 % on domains that it never trained on.")


def test_a_failed_sweep_ends_the_demo_with_its_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.sweep, "main", lambda argv: 1)
    assert demo.main(["--output_dir", str(tmp_path), "--steps", "3"]) == 1
    assert capsys.readouterr().out.endswith("--steps 3\n")
