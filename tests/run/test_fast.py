import json
import math
import shutil

import pytest
import torch
from test_algorithms import ALGORITHMS, EARLY, SMALL, build, hparams_of, minibatches

from domainbed_kd import datasets
from domainbed_kd.folder import curves, files
from domainbed_kd.results import records, selection
from domainbed_kd.run import precision
from domainbed_kd.scripts import collect_results, sweep, train
from domainbed_kd.sweep import jobs

CPU = torch.device("cpu")
TINY = '{"wrn_depth": 10, "wrn_widen": 1, "batch_size": 8}'


def run(folder, *flags):
    assert train.main(["--dataset", "DigitsDG", "--test_envs", "1", "--steps", "3",
                       "--checkpoint_freq", "2", "--hparams", TINY, "--skip_model_save",
                       "--output_dir", str(folder), *flags]) == 0
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_updates_in_fast_mode(name):
    algorithm = precision.laid_out(build(name, hparams=hparams_of(name, **EARLY)), True)
    for step in range(4):
        with precision.autocast(CPU, True):
            values = algorithm.update(minibatches(seed=step))
        assert all(math.isfinite(value) for value in values.values())
    algorithm.eval()
    with torch.no_grad(), precision.autocast(CPU, True):
        logits = algorithm.predict(torch.randn(5, *SMALL))
    assert logits.shape == (5, 2) and logits.isfinite().all()
    assert all(p.dtype != torch.bfloat16 for p in algorithm.parameters())


def test_layers_compute_in_bfloat16_only_when_it_is_asked_for():
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with precision.autocast(CPU, False):
        assert layer(x).dtype == torch.float32
    with precision.autocast(CPU, True):
        assert layer(x).dtype == torch.bfloat16
        assert torch.backends.cuda.matmul.allow_tf32
    assert layer(x).dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32


def test_weights_that_change_within_an_update_are_the_ones_that_compute():
    layer, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    with precision.autocast(CPU, True):
        layer(x)
        with torch.no_grad():
            layer.weight.fill_(3)
        assert layer(x).item() == 3


def test_losses_stay_within_bfloat16s_precision_of_exact_mode(tmp_path):
    exact, quick = run(tmp_path / "exact"), run(tmp_path / "fast", "--fast")
    assert quick[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.03)
    assert quick[0]["loss"] != exact[0]["loss"]


def test_only_what_selection_reads_is_evaluated_and_the_mode_goes_on_record(tmp_path):
    exact, quick = run(tmp_path / "exact"), run(tmp_path / "fast", "--fast")
    left_out = {f"env{i}_in_acc" for i in (0, 2, 3)}
    assert [r["step"] for r in quick] == [r["step"] for r in exact] == [0, 2]
    for e, q in zip(exact, quick):
        assert e.keys() - q.keys() == left_out and not q.keys() - e.keys()
        assert q["args"]["fast"] is True and "fast" not in e["args"]
    for mode in ("exact", "fast"):
        cost = json.loads((tmp_path / mode / files.MEMORY).read_text())
        assert cost["tf32_convolutions"] and cost["cudnn_deterministic"]
        assert cost["tf32_products"] == (mode == "fast") and cost["gpu"] is None


def test_a_fast_run_stopped_halfway_ends_in_the_same_numbers(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", "--fast")
    real, calls = precision.autocast, []

    def fails_at_the_last_step(device, enabled):
        calls.append(enabled)
        if len(calls) == 4:  # steps 0 and 1, and step 0's evaluation, came before
            raise KeyboardInterrupt
        return real(device, enabled)

    monkeypatch.setattr(precision, "autocast", fails_at_the_last_step)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halved", "--fast")
    monkeypatch.setattr(precision, "autocast", real)
    for a, b in zip(whole, run(tmp_path / "halved", "--fast"), strict=True):
        for record in (a, b):
            del record["step_time"], record["args"]["output_dir"]
        assert a == b


def test_an_exact_run_is_not_continued_fast(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="fast False instead of True"):
        run(tmp_path, "--fast")


# Sweeps.

def record(test_env, fast_mode, seed=0, acc=0.5):
    n_envs = datasets.num_environments("Debug28")
    kept = [f"env{i}_out_acc" for i in range(n_envs)] + [
        f"env{i}_in_acc" for i in range(n_envs) if not fast_mode or i == test_env]
    args = {"dataset": "Debug28", "algorithm": "ERM" if not fast_mode else "CORAL", "steps": 1,
            "test_envs": [test_env], "trial_seed": 0, "hparams_seed": seed, "hparams": None,
            "task": "domain_generalization"} | ({"fast": True} if fast_mode else {})
    return {"step": 0, "args": args, "hparams": {}, **dict.fromkeys(kept, acc)}


def write(folder, made):
    for i, content in enumerate(made):
        (folder / str(i)).mkdir()
        (folder / str(i) / "results.jsonl").write_text(json.dumps(content) + "\n")


def test_fast_records_are_selected_from_like_exact_ones(tmp_path):
    write(tmp_path, [record(0, True, seed=0, acc=0.25), record(0, True, seed=1, acc=0.75)])
    loaded = records.Folder(tmp_path).curves()
    assert len(loaded) == 2
    (cell,) = curves.searches(loaded).values()
    for method in (selection.IIDAccuracySelectionMethod,
                   selection.OracleSelectionMethod):
        assert method.sweep_acc(cell) == 0.75


def test_exact_records_that_lack_a_split_are_still_refused(tmp_path, capsys):
    torn = record(0, False)
    del torn["env1_in_acc"]
    write(tmp_path, [torn])
    assert records.Folder(tmp_path).curves() == []
    assert "not a record like DomainBed's" in capsys.readouterr().err


def test_a_table_tells_fast_cells_from_exact_ones(tmp_path, capsys):
    exact = [record(env, False) for env in range(3)]
    exact += [{**r, "args": {**r["args"], "algorithm": "MMD"}} for r in exact]
    write(tmp_path, exact + [record(env, True) for env in range(3)])
    collect_results.main(["--input_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line for line in printed.splitlines() if "+/-" in line}
    assert "!" in rows["CORAL"] and "!" not in rows["ERM"] and "!" not in rows["MMD"]
    assert "Debug28, CORAL: fast mode (3 runs)" in printed


def test_a_sweep_passes_the_flag_on_and_keeps_fast_runs_apart(tmp_path, capsys):
    flags = ["launch", "--datasets", "Debug28", "--algorithms", "ERM", "--n_trials", "1",
             "--n_hparams", "1", "--single_test_envs", "--command_launcher", "dummy",
             "--output_dir", str(tmp_path)]

    def commands(*more):
        sweep.main([*flags, *more])
        return [c for c in capsys.readouterr().out.splitlines() if "scripts.train" in c]

    exact, quick = commands(), commands("--fast")
    assert all("--fast" in c for c in quick) and not any("--fast" in c for c in exact)
    folder = [c.split("--output_dir ")[1].split()[0] for c in (*exact, *quick)]
    assert len(set(folder)) == 6


def test_a_fast_run_elsewhere_is_not_taken_for_the_exact_one(tmp_path):
    write(tmp_path, [record(0, True)])
    args = {k: v for k, v in record(0, True)["args"].items() if k != "fast"}
    assert jobs.Runs(tmp_path).find("absent", args) is None
    assert jobs.Runs(tmp_path).find("absent", args | {"fast": True}) == "0"


# Optimisers and compilers.

def test_optimisers_take_their_fused_step_and_stay_close_to_the_plain_one():
    ends = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
        optimizers = [torch.optim.Adam(layer.parameters(), lr=0.1),
                      torch.optim.SGD(layer.parameters(), lr=0.1)]
        layer(x).square().sum().backward()
        with precision.autocast(CPU, enabled):
            for optimizer in optimizers:
                optimizer.step()
        fused = [group["fused"] for optimizer in optimizers for group in optimizer.param_groups]
        assert fused == [True if enabled else None] * 2
        ends.append(layer.weight.detach().clone())
    torch.testing.assert_close(*ends)


def test_outside_fast_mode_no_hook_is_left():
    with precision.autocast(CPU, True):
        pass
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] is None


def test_compiling_goes_on_record_and_belongs_to_fast_mode(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    records = run(tmp_path / "a", "--fast", "--compile")
    assert len(compiled) == 1 and records[0]["args"]["compile"] is True
    assert "compile" not in run(tmp_path / "b", "--fast")[0]["args"]
    with pytest.raises(ValueError, match="--compile needs --fast"):
        run(tmp_path / "c", "--compile")


def test_a_machine_without_a_compiler_is_refused_in_a_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="there is no C\\+\\+ compiler \\(no-such-compiler\\)"):
        precision.compile_featurizer(build("ERM"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_run_stays_close_to_one_that_is_not(tmp_path):
    plain, compiled = run(tmp_path / "a", "--fast"), run(tmp_path / "b", "--fast", "--compile")
    assert compiled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.03)
