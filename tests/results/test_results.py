import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import confusion_matrix

from domainbed_kd import datasets
from domainbed_kd.folder import curves, files
from domainbed_kd.results import logits as results
from domainbed_kd.results import records, selection
from domainbed_kd.run import build, evaluation, splits
from domainbed_kd.scripts import train

FLAGS = ["--dataset", "Debug28", "--steps", "13", "--checkpoint_freq", "3",
         "--holdout_fraction", "0.5", "--hparams", '{"batch_size": 4, "lr": 0.01}']


def run(folder, *flags):
    assert train.main([*FLAGS, *flags, "--output_dir", str(folder)]) == 0
    return records_in(folder)


def records_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def comparable(records):
    return [{k: v for k, v in r.items() if k not in ("step_time", "mem_gb", "args")}
            for r in records]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Runs that kept their logits: two trials of ERM, SWAD, and ERM with a pair of test envs."""
    folder = tmp_path_factory.mktemp("sweep")
    run(folder / "a", "--save_logits", "--test_envs", "2")
    run(folder / "b", "--save_logits", "--test_envs", "2", "--trial_seed", "1")
    run(folder / "pair", "--save_logits", "--test_envs", "0", "2", "--diagnostics")
    run(folder / "swad", "--save_logits", "--test_envs", "2", "--algorithm", "SWAD")
    return folder


def test_keeping_logits_changes_no_bit_of_training(sweep, tmp_path):
    without = run(tmp_path, "--test_envs", "2")
    assert comparable(without) == comparable(records_in(sweep / "a"))
    ours, theirs = (torch.load(f / "model.pkl", weights_only=True)["model_dict"]
                    for f in (tmp_path, sweep / "a"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert not (tmp_path / "logits").exists() and "save_logits" not in without[0]["args"]


@pytest.mark.parametrize("name", ["a", "b", "pair", "swad"])
def test_accuracies_counted_from_logits_equal_the_recorded_ones(name, sweep):
    recorded, counted = records_in(sweep / name), results.records(sweep / name)
    assert [r["step"] for r in counted] == [r["step"] for r in recorded] == [0, 3, 6, 9, 12]
    for ours, theirs in zip(counted, recorded):
        test_envs = theirs["args"]["test_envs"]
        expected = {f"env{i}_out_acc" for i in range(3)} | {f"env{i}_in_acc" for i in test_envs}
        assert {k for k in ours if k.endswith("_acc")} == expected
        assert all(ours[k] == theirs[k] for k in ours)


@pytest.mark.parametrize("method", [selection.IIDAccuracySelectionMethod,
                                    selection.OracleSelectionMethod])
@pytest.mark.parametrize("name", ["a", "b", "swad"])
def test_selection_rules_choose_from_logits_as_from_records(name, method, sweep):
    chosen = method.run_acc(results.records(sweep / name))
    assert chosen == method.run_acc(records_in(sweep / name)) and chosen is not None


def test_leave_one_out_selection_works_from_logits_too(sweep, tmp_path):
    folders = [sweep / "a"]
    run(tmp_path / "12", "--save_logits", "--test_envs", "1", "2")
    folders += [sweep / "pair", tmp_path / "12"]
    method = selection.LeaveOneOutSelectionMethod
    chosen = method.run_acc([r for folder in folders for r in results.records(folder)])
    assert chosen == method.run_acc([r for folder in folders for r in records_in(folder)])
    assert chosen is not None


def test_a_row_of_logits_is_that_of_its_image(sweep):
    build.seed_everything(0)  # Debug28's images are random numbers
    dataset = datasets.get_dataset_class("Debug28")(None, [2], {})
    parts = splits.make_splits(dataset, [2], trial_seed=0, holdout_fraction=0.5)
    for name, p in results.load_logits(sweep / "a", step=12).items():
        i = int(re.search(r"\d", name)[0])
        split = (parts.out if name.endswith("out") else parts.in_)[i]
        assert sorted(split.keys) == p.index.tolist()
        assert p.labels.tolist() == [int(dataset[i][k][1]) for k in p.index]
        assert p.logits.shape == (len(p.index), 2) and (p.logits.max(axis=1) == 0).all()


def test_without_a_step_the_selected_checkpoint_is_loaded(sweep):
    frame = results.to_frame(sweep / "b")
    step = frame.step[frame.selected].item()
    ours, theirs = (results.load_logits(sweep / "b", s) for s in (None, step))
    assert all((ours[k].logits == theirs[k].logits).all() for k in theirs)


def kept(logits, labels):
    batches = [(np.arange(len(labels))[::-1].tolist(), torch.tensor(labels)[..., None][:, 0],
                torch.tensor(logits))]
    return {"env0_out": batches}, {"env0_out": list(range(10, 10 + len(labels)))}


def written(tmp_path, logits, labels):
    evaluation.save_logits(tmp_path / "logits" / "step0.npz", *kept(logits, labels))
    return results.load_logits(tmp_path, 0)["env0_out"]


def test_the_share_of_samples_that_scmd_selects_is_kept_apart_from_the_choice(tmp_path):
    accs = {f"env{i}_{split}_acc": .5 for i in range(2) for split in ("in", "out")}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(
        {"step": step, "hparams": {}, "selected": .25, **accs, "args": {
            "dataset": "Debug28", "algorithm": "SCMD", "test_envs": [0], "trial_seed": 0,
            "hparams_seed": 0}}) + "\n"
        for step in range(2)))
    frame = results.to_frame(tmp_path)
    assert frame["selected"].tolist() == [True, False]
    assert frame["selected_share"].tolist() == [.25, .25]


def test_half_precision_keeps_guesses_apart_and_probabilities_to_a_thousandth(tmp_path):
    generator = np.random.RandomState(0)
    logits = generator.randn(2000, 7).astype(np.float32) * 10
    logits[:500] = 30 + generator.randn(500, 7).astype(np.float32) * 1e-5  # float16 has one 30
    labels = generator.randint(7, size=2000)
    found = written(tmp_path, logits, labels)
    assert (found.logits.argmax(1) == logits[::-1].argmax(1)).all()
    assert found.labels.tolist() == labels[::-1].tolist()
    assert found.index.tolist() == list(range(10, 2010))
    exact = softmax(logits[::-1].astype(np.float64), axis=1)
    np.testing.assert_allclose(results.probabilities(found), exact, atol=1e-3)


def test_huge_logits_stay_finite(tmp_path):
    found = written(tmp_path, [[1e9, -1e9, 0.0]], [1])
    assert np.isfinite(found.logits).all() and found.logits.argmax() == 0


def test_a_single_logit_becomes_two(tmp_path):
    found = written(tmp_path, [[2.0], [-1.0]], [1, 1])
    assert found.logits.argmax(1).tolist() == [0, 1]  # of the batch's items in reverse


def test_the_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    written(tmp_path, [[0.0, 1.0]], [1])

    def torn(file, **arrays):
        file.write(b"half")
        raise OSError(28, "disk full")

    monkeypatch.setattr(np, "savez_compressed", torn)
    with pytest.raises(OSError, match="disk full"):
        written(tmp_path, [[1.0, 0.0]], [1])
    assert results.load_logits(tmp_path, 0)["env0_out"].logits.tolist() == [[-1, 0]]
    assert [p.name for p in (tmp_path / "logits").iterdir()] == ["step0.npz"]


@pytest.mark.parametrize("step, message", [(5, "at step 5, but at 0, 3, 6, 9, 12")])
def test_an_absent_step_is_named_with_those_that_are_there(step, message, sweep):
    with pytest.raises(FileNotFoundError, match=message):
        results.load_logits(sweep / "a", step)


def test_a_run_without_logits_says_how_to_keep_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="--save_logits"):
        results.load_logits(tmp_path)


def test_an_ensemble_averages_probabilities_of_the_images_that_all_have(sweep):
    runs = [results.load_logits(sweep / name, 12) for name in ("a", "b")]
    whole = [results.whole_domain(run, 2) for run in runs]
    n_images = len(datasets.get_dataset_class("Debug28")(None, [2], {})[2])
    assert [p.index.tolist() for p in whole] == [list(range(n_images))] * 2  # other splits
    both = results.ensemble(whole)
    expected = np.mean([softmax(p.logits.astype(float), axis=1) for p in whole], axis=0)
    np.testing.assert_allclose(results.probabilities(both), expected, rtol=1e-5)
    assert (both.labels == whole[0].labels).all()

    out = [run["env2_out"] for run in runs]
    common = sorted(set(out[0].index) & set(out[1].index))
    assert 0 < len(common) < len(out[0].index)
    assert results.ensemble(out).index.tolist() == common
    alone = results.ensemble(out[:1])
    assert results.accuracy(alone) == results.accuracy(out[0])


def test_predictions_that_are_not_alike_cannot_be_averaged():
    one = results.Predictions(np.zeros((2, 3)), np.array([0, 1]), np.array([0, 1]))
    for other in (one._replace(index=np.array([5, 6])), one._replace(labels=np.array([1, 1])),
                  one._replace(logits=np.zeros((2, 4)))):
        with pytest.raises(ValueError, match="cannot be averaged"):
            results.ensemble([one, other])
    with pytest.raises(ValueError, match="needs members"):
        results.ensemble([])
    with pytest.raises(ValueError, match="no predictions on domain 4, but on env0_out"):
        results.whole_domain({"env0_out": one}, 4)


def test_confusion_is_sklearns_and_errors_are_its_rows():
    generator = np.random.RandomState(1)
    labels = generator.randint(4, size=200)  # of 5 classes: one has no image
    p = results.Predictions(generator.randn(200, 5), labels, np.arange(200))
    expected = confusion_matrix(labels, p.logits.argmax(1), labels=range(5))
    assert (results.confusion(p) == expected).all()
    errors = results.class_errors(p)
    assert np.isnan(errors[4])
    for i in range(4):
        assert errors[i] == pytest.approx(np.mean(p.logits[labels == i].argmax(1) != i))
    assert results.accuracy(p) == pytest.approx(np.trace(expected) / 200)


def test_a_frame_has_every_value_of_every_record(sweep):
    frame = results.to_frame(sweep)
    rows = [(f.name, r) for f in sorted(sweep.iterdir()) for r in records_in(f)]
    assert isinstance(frame, pd.DataFrame) and len(frame) == len(rows) == 20
    for (_, row), (name, record) in zip(frame.iterrows(), rows):
        assert row["run"] == name
        flat = {k: v for k, v in record.items() if not isinstance(v, dict)}
        for outer in ("args", "hparams"):
            flat |= {f"{outer}.{k}": v for k, v in record[outer].items()}
        for k, v in flat.items():
            assert v is None and row[k] is None or row[k] == (tuple(v) if isinstance(v, list)
                                                              else v), k
        if name == "pair":
            assert row["diagnostics.env1_ece"] == record["diagnostics"]["env1_ece"]
    grouped = frame.groupby(["args.algorithm", "args.test_envs"]).size()
    assert grouped["ERM", (0, 2)] == 5 and grouped["SWAD", (2,)] == 5


def test_the_frame_says_what_is_selected_by_the_rule_of_model_selection(sweep):
    frame = results.to_frame(sweep)
    for name in ("a", "b", "swad"):
        row, = frame[(frame.run == name) & frame.selected].to_dict("records")
        chosen = selection.IIDAccuracySelectionMethod.run_acc(records_in(sweep / name))
        assert (row["val_acc"], row["test_acc"]) == pytest.approx(
            (chosen["val_acc"], chosen["test_acc"]))
        if name == "swad":
            assert row["step"] == 12
    pair = frame[frame.run == "pair"].iloc[-1]
    assert pair.val_acc == pair.env1_out_acc
    assert pair.test_acc == pytest.approx((pair.env0_in_acc + pair.env2_in_acc) / 2)


def test_a_torn_line_is_named_and_left_out(sweep, tmp_path, capsys):
    whole = (sweep / "a" / "results.jsonl").read_text()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "results.jsonl").write_text(whole[:-30])
    assert len(results.to_frame(tmp_path)) == 4
    assert "a/results.jsonl: line 5: not a record" in capsys.readouterr().err


@pytest.mark.parametrize("old, new", [
    (r'"env0_in_acc": [^,]*', '"env0_in_acc": null'), (r'"step": \d+', '"step": "x"'),
    (r'"test_envs": [^]]*]', '"test_envs": "0"'), (r"^.*$", "null"), (r"^.*$", "[" * 100_000)])
def test_the_frame_and_the_tables_leave_out_the_same_lines_in_the_same_words(
        sweep, tmp_path, capsys, old, new):
    lines = (sweep / "a" / "results.jsonl").read_text().splitlines()
    (tmp_path / "a").mkdir()
    for i in (1, 3):
        lines[i] = re.sub(old, new, lines[i])
    (tmp_path / "a" / "results.jsonl").write_text("\n".join(lines))
    assert list(results.to_frame(tmp_path)["step"]) == [
        json.loads(lines[i])["step"] for i in (0, 2, 4)]
    said = capsys.readouterr().err
    assert said.startswith(f"skipped {tmp_path}/a/results.jsonl: line 2 and 1 more: ")
    assert said.count("\n") == 1
    assert curves.n_records(records.Folder(tmp_path).curves()) == 3
    assert capsys.readouterr().err == said


def test_files_that_cannot_be_read_are_named_and_left_out(sweep, tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(sweep / name / "results.jsonl", tmp_path / name)

    def refuse(path, *args, **kwargs):  # root may read anything, so no chmod
        if Path(path).parent.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    opened = files.open_regular
    monkeypatch.setattr(files, "open_regular", refuse)
    frame = results.to_frame(tmp_path)
    assert set(frame["run"]) == {"b"}
    assert capsys.readouterr().err == f"skipped {tmp_path}/a/results.jsonl: Permission denied\n"
    skipped = []
    assert len(results.to_frame(tmp_path, skipped)) == len(frame)
    assert skipped == [f"{tmp_path}/a/results.jsonl: Permission denied"]
    assert capsys.readouterr().err == ""


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither it nor a folder in it"):
        results.to_frame(Path(tmp_path))
