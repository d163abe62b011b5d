import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import GOLDENS, golden

from domainbed_kd import algorithms
from domainbed_kd.folder import claims, files, manifest
from domainbed_kd.folder.curves import searches
from domainbed_kd.results import records, selection, tables
from domainbed_kd.scripts import collect_results, sweep
from domainbed_kd.sweep import listing


def run(capsys, folder, *flags):
    assert collect_results.main(["--input_dir", str(folder), *flags]) == 0
    return capsys.readouterr()


def without_protocols(out):
    """What was printed, without our line below each table."""
    return re.sub(r"Protocol: .*\n", "", out)


@pytest.fixture
def vlcs(tmp_path):
    """A copy of the golden sweep."""
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    return tmp_path / "sweep"


def folders(sweep_dir, **wanted):
    """The run folders whose args are as wanted."""
    for path in sorted(sweep_dir.glob("*/results.jsonl")):
        args = json.loads(path.read_text().splitlines()[0])["args"]
        if all(args[name] == value for name, value in wanted.items()):
            yield path.parent


def edit(folder, **changes):
    """Rewrites the args of a run's records."""
    path = folder / "results.jsonl"
    found = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text("".join(
        json.dumps(r | {"args": r["args"] | changes}, sort_keys=True) + "\n" for r in found))


def test_a_sweep_at_work_says_what_is_in_training_and_what_waits(vlcs, capsys):
    first, *_ = folders(vlcs)
    (first / "done").unlink()
    results = first / "results.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:-1]))
    edit(first, output_dir=f"elsewhere/{first.name}")
    assert "at work" not in run(capsys, vlcs).err
    for name in ("waits", "waits too"):
        (vlcs / name).mkdir()
    (vlcs / "waits" / "args.json").touch()
    with claims.held(first):
        err = run(capsys, vlcs).err
    assert "The sweep is at work: 1 of its runs are in training and 2 more wait" in err


# What DomainBed prints.

@pytest.mark.parametrize("flags, name", [
    (["--upstream"], "collect_results_text.txt"),
    (["--upstream", "--latex"], "collect_results_latex.txt"),
    ([], "collect_results_text.txt")])
def test_the_golden_sweep_prints_as_domainbed_prints_it(vlcs, capsys, flags, name):
    out, err = run(capsys, vlcs, *flags)
    assert (out if flags else without_protocols(out)) == golden(name) and err == ""


@pytest.mark.parametrize("flags, name", [
    ([], "results.txt"), (["--latex"], "results.tex"), (["--format", "latex"], "results.tex"),
    (["--format", "csv"], "results.csv"), (["--format", "markdown"], "results.md"),
    (["--upstream", "--latex"], "results.tex")])
def test_what_is_printed_is_also_written_and_is_no_run_the_next_time(vlcs, capsys, flags, name):
    out, _ = run(capsys, vlcs, *flags)
    assert (vlcs / name).read_text() == out
    assert run(capsys, vlcs, *flags) == (out, "")


def test_upstream_prints_partial_sweeps_as_if_they_were_whole(vlcs, capsys):
    for folder in folders(vlcs, test_envs=[1]):
        shutil.rmtree(folder)
    out, _ = run(capsys, vlcs, "--upstream")
    lines = out.splitlines()
    assert lines[4].split() == "ERM 98.0 +/- 0.2 X 74.1 +/- 0.4 77.1 +/- 0.2 X".split()
    assert lines[8].split() == "ERM 83.0 +/- 0.3 83.0".split()
    assert "*" not in out and "sweep launch" not in out


def test_upstream_prints_tables_of_x_where_leave_one_out_has_no_runs(vlcs, capsys):
    for envs in ([i, j] for i in range(4) for j in range(i + 1, 4)):
        for folder in folders(vlcs, test_envs=envs):
            shutil.rmtree(folder)
    out, _ = run(capsys, vlcs, "--upstream")
    loo = out.split("leave-one-domain-out cross-validation\n")
    assert loo[1].splitlines()[1].split() == ["ERM"] + ["X"] * 5
    assert loo[2].splitlines()[1].split() == ["ERM"] + ["X"] * 2

    ours, err = run(capsys, vlcs)
    loo = [line for line in ours.splitlines() if "leave-one" in line]
    assert loo == ["leave-one-domain-out cross-validation: needs runs with two test envs "
                   "(launch the sweep without --single_test_envs)."]
    assert "Of " not in ours and "*" not in ours  # the sweep is whole in its own way
    assert without_protocols(ours).replace(f"\n{loo[0]}\n", "") == (
        out[:out.index("\n-------- Dataset: VLCS, model selection method: leave")]
        + out[out.index("\n-------- Dataset: VLCS, model selection method: test"):])


def test_datasets_that_are_not_registered_are_dropped_upstream_and_shown_by_default(vlcs, capsys):
    for folder in folders(vlcs):
        edit(folder, dataset="Folder:my_set")
    upstream, _ = run(capsys, vlcs, "--upstream")
    assert upstream.startswith("Total records: 200\n") and "my_set" not in upstream
    out, _ = run(capsys, vlcs)
    assert out.count("Dataset: Folder:my_set") == 3
    assert "98.0 +/- 0.2          64.2 +/- 0.8" in out


def test_upstream_leaves_out_digitsdg_which_domainbed_does_not_have(vlcs, capsys):
    for folder in list(folders(vlcs)):
        shutil.copytree(folder, vlcs / f"{folder.name}d")
        edit(vlcs / f"{folder.name}d", dataset="DigitsDG")
    upstream, _ = run(capsys, vlcs, "--upstream")
    assert upstream == golden("collect_results_text.txt").replace("200", "400")
    assert "Dataset: DigitsDG" in run(capsys, vlcs)[0]


@pytest.mark.parametrize("order", [1, -1])
def test_upstream_lists_unknown_methods_as_the_disk_lists_their_runs(
        vlcs, capsys, monkeypatch, order):
    for folder, name in zip(list(folders(vlcs)), ["zeta", "alpha", "Mine", "zeta", "SWAD"]):
        edit(folder, algorithm=name)
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listed(path))[::order])
    rows = run(capsys, vlcs, "--upstream")[0].split("Dataset")[1].split("\n\n")[0].splitlines()[2:]
    unknown = ["zeta", "alpha", "Mine", "SWAD"] if order == 1 else ["SWAD", "zeta", "Mine", "alpha"]
    assert [row.split()[0] for row in rows] == ["ERM", *unknown]


def test_averages_add_up_in_domainbeds_order_to_the_last_bit(vlcs):
    """By its formulas, on the list of accuracies in the order of reading."""
    for i, folder in enumerate(folders(vlcs)):
        path = folder / "results.jsonl"
        path.write_text(re.sub(r'(?<=_acc": )[\d.]+', str((i * 7 + 3) % 10 / 10),
                               path.read_text()))
    found = records.Folder(vlcs).curves()
    for curves in (found, found[::-1]):
        grid = records.Grid(curves)
        method = selection.IIDAccuracySelectionMethod
        table, averages = tables.of_sweep(curves, grid, [method], upstream=True)[method]
        chosen = {}
        for (trial, *_, env), search in searches(curves).items():
            chosen.setdefault(env, []).append(method.sweep_acc(search))
            chosen.setdefault(f"trial {trial}", []).append(method.sweep_acc(search))
        for env in range(4):
            cell = table.rows["ERM"][env]
            assert cell.mean == 100 * np.mean(chosen[env])
            assert cell.stderr == 100 * np.std(list(chosen[env] / np.sqrt(len(chosen[env]))))
        trials = [float(np.mean(chosen[f"trial {trial}"])) for trial in range(2)]
        assert averages.rows["ERM"][0].mean == 100 * np.mean(trials)


def test_upstream_prints_of_an_empty_folder_what_domainbed_prints_and_says_so(tmp_path, capsys):
    out, err = run(capsys, tmp_path, "--upstream")
    row = "Algorithm".ljust(25) + "  " + "Avg".ljust(25) + " "
    titles = ("training-domain validation set", "leave-one-domain-out cross-validation",
              "test-domain validation set (oracle)")
    assert out == "Total records: 0\n" + "".join(
        f"\n-------- Averages, model selection method: {title}\n{row}\n" for title in titles)
    assert err == f"{tmp_path} holds no results yet.\n"


def test_auto_lr_is_a_method_of_its_own(vlcs, capsys):
    for folder in folders(vlcs):
        path = folder / "results.jsonl"
        last = json.loads(path.read_text().splitlines()[-1])
        second = {"step": last["step"], "hparams": {},
                  "args": last["args"] | {"holdout_fraction": 0.0},
                  **{f"fd_env{i}_in_acc": .25 for i in range(4)}}
        with path.open("a") as file:
            file.write(json.dumps(second) + "\n")
    out, _ = run(capsys, vlcs, "--auto_lr", "--upstream")
    assert out.count("auto lr training-domain validation set") == out.count("--------") == 2
    assert out.splitlines()[4].split() == ["ERM"] + "25.0 +/- 0.0".split() * 4 + ["25.0"]
    assert run(capsys, vlcs, "--upstream")[0].replace("240", "200") == golden(
        "collect_results_text.txt")


def test_selection_by_the_last_record_is_ours_not_upstreams(vlcs, capsys):
    for folder in folders(vlcs):
        path = folder / "results.jsonl"
        path.write_text(path.read_text().replace('"step":', '"selection": "last", "step":'))
    assert run(capsys, vlcs, "--upstream")[0] == golden("collect_results_text.txt")
    out, _ = run(capsys, vlcs)
    assert out != golden("collect_results_text.txt")
    oracle = "test-domain validation set (oracle)"  # it looks at the last record anyway
    out = without_protocols(out)
    assert out.split(oracle)[1:] == golden("collect_results_text.txt").split(oracle)[1:]


# Protocols.

def test_every_table_with_numbers_says_how_its_runs_were_trained(vlcs, capsys):
    out, _ = run(capsys, vlcs)
    lines = [line for line in out.splitlines() if line.startswith("Protocol: ")]
    assert lines[0] == lines[1] == (
        "Protocol: network ResNet-50 with frozen BatchNorm; initial weights ImageNet; 1,001 steps; "
        "2 draws of hparams, 2 trials; selected by training-domain validation set; exact mode; "
        "teacher none.")
    assert len(lines) == 6 and "selected by test-domain validation set (oracle)" in lines[-1]
    for style in ("latex", "markdown"):
        assert run(capsys, vlcs, "--format", style)[0].count("Protocol: network ResNet-50") == 6
    assert "Protocol" not in run(capsys, vlcs, "--format", "csv")[0]


# What a sweep lacks.

def test_a_broken_run_is_named_and_changes_nothing_else(vlcs, capsys):
    next(folders(vlcs)).joinpath("results.jsonl").open("a").write('{"args": {"alg')
    out, err = run(capsys, vlcs)
    assert without_protocols(out) == golden("collect_results_text.txt")
    assert err.count("\n") == 1 and "line 6: not a record" in err


def test_cells_that_lack_runs_say_so_and_the_runs_are_listed(vlcs, capsys):
    shutil.rmtree(next(folders(vlcs, test_envs=[0], trial_seed=0, hparams_seed=1)))
    shutil.rmtree(next(folders(vlcs, test_envs=[1, 2], trial_seed=1, hparams_seed=0)))
    out, _ = run(capsys, vlcs)
    rows = [line for line in out.splitlines() if line.startswith("ERM")]
    assert "*3/4 " in rows[0] and rows[0].count("*") == 2 and rows[0].rstrip().endswith("*15/16")
    assert "*15/16" in rows[2] and rows[2].count("*") == 4  # C, L, S and Avg
    assert out.split("\n\n")[-1].splitlines()[:4] == [
        "* n/m: n of the m runs behind the number have finished.",
        "Of 40 runs, 2 are absent and 0 unfinished:",
        "    VLCS, ERM, test envs 0: trial 0, hparams 1",
        "    VLCS, ERM, test envs 1+2: trial 1, hparams 0"]


def test_a_run_that_ended_early_counts_as_unfinished(vlcs, capsys):
    path = next(folders(vlcs, test_envs=[3], trial_seed=1, hparams_seed=1)) / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    out, _ = run(capsys, vlcs)
    assert "Of 40 runs, 0 are absent and 1 unfinished:" in out
    assert "    VLCS, ERM, test envs 3: trial 1, hparams 1\n" in out


def test_alike_gaps_share_a_line(vlcs, capsys):
    for folder in list(folders(vlcs, trial_seed=1)):
        shutil.rmtree(folder)
    shutil.copytree(next(folders(vlcs)), vlcs / "other")
    edit(vlcs / "other", algorithm="FourDs", trial_seed=1)
    shutil.copytree(vlcs / "other", vlcs / "another")
    edit(vlcs / "another", algorithm="zeta")
    out, _ = run(capsys, vlcs)
    assert "    VLCS, ERM, all test envs: trial 1, hparams 0-1\n" in out
    assert "    VLCS, 4Ds zeta, test envs 0 0+1 " in out


def without_results(folder, reason=""):
    """Turns a run into one that has no results yet or, with a reason, has failed."""
    path = folder / "results.jsonl"
    args = json.loads(path.read_text().splitlines()[0])["args"]
    path.unlink()
    (folder / "done").unlink(missing_ok=True)
    files.leave_args(folder, args)
    if reason:
        (folder / "failed").write_text(reason)
        (folder / "out.txt").touch()
    return args


def second_method(sweep_dir, reason=""):
    """Copies of the sweep's runs as those of another method, without results."""
    for folder in list(folders(sweep_dir)):
        copy = sweep_dir / f"{folder.name}x"
        shutil.copytree(folder, copy)
        edit(copy, algorithm="KDDG")
        without_results(copy, reason)


@pytest.mark.parametrize("flags, row", [
    ([], r"KDDG( +X){5} +\n"), (["--latex"], r"KDDG & X & X & X & X & X \\\\\n"),
    (["--format", "markdown"], r"\| KDDG( \| X){5} \|\n"),
    (["--format", "csv"],
     r"(training-domain validation set,VLCS,KDDG,[CLSV],,,0,0,4,0,,accuracy\n){4}")])
@pytest.mark.parametrize("reason, state", [
    ("", "40 unfinished:"), ("error: No\nmemory.\n", "0 unfinished and 40 failed:")])
def test_a_method_of_which_no_run_has_results_is_not_left_out(
        vlcs, capsys, flags, row, reason, state):
    second_method(vlcs, reason)
    out, err = run(capsys, vlcs, *flags)
    said = err if "csv" in flags else out
    assert re.search(row, out)
    assert re.search(rf"Of 80 runs, 0 are absent(,| and) {state}", said)
    line = "VLCS, KDDG, all test envs: trials 0-1, hparams 0-1"
    assert (f"{line}: failed: No memory.\n" if reason else f"{line}\n") in said
    assert run(capsys, vlcs, "--upstream")[0] == golden("collect_results_text.txt")


def test_seeds_and_data_sets_that_only_runs_without_results_have_count(vlcs, capsys):
    for name, changes in (("more", {"trial_seed": 2}), ("other", {"dataset": "Folder:mine"})):
        shutil.copytree(next(folders(vlcs, test_envs=[3])), vlcs / name)
        edit(vlcs / name, **changes)
        without_results(vlcs / name)
    out, _ = run(capsys, vlcs)
    assert out.splitlines()[4].count("*4/6") == 4
    assert "Dataset: Folder:mine" in out and re.search(r"\nERM( +X){5} +\n", out)
    assert "Of 120 runs, 78 are absent and 2 unfinished:" in out


def test_a_run_that_failed_after_its_first_results_is_said_to_have_failed(vlcs, capsys):
    first, *_ = folders(vlcs)
    results = first / "results.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:-1]))
    edit(first, output_dir=f"elsewhere/{first.name}")
    assert "0 are absent and 1 unfinished:" in run(capsys, vlcs).out
    (first / "failed").write_text("error: No memory.\n")
    out, _ = run(capsys, vlcs)
    assert "0 are absent, 0 unfinished and 1 failed:" in out and ": failed: No memory.\n" in out


def test_many_different_failures_are_summed_up(vlcs, capsys):
    for i, folder in enumerate(list(folders(vlcs))[:15]):
        without_results(folder, f"error: reason {i}")
    out, _ = run(capsys, vlcs)
    assert out.count(": failed: ") == 10
    assert "    and 5 more such lines; `sweep status` has them all\n" in out


@pytest.mark.parametrize("flags", [[], ["--latex"], ["--format", "csv"], ["--compare", "ERM"]])
def test_a_folder_without_runs_is_an_error_and_stays_as_it_is(tmp_path, flags):
    (tmp_path / "Domain" / "class").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=f"--input_dir {tmp_path}: it holds no runs"):
        collect_results.main(["--input_dir", str(tmp_path), *flags])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Domain", "notes.txt"]


def test_a_sweep_without_any_result_says_what_is_known(vlcs, capsys):
    for folder in folders(vlcs):
        without_results(folder, "error: No memory.")
    out, err = run(capsys, vlcs)
    assert "Of 40 runs, 0 are absent, 0 unfinished and 40 failed:" in out
    assert re.search(r"\nERM( +X){5} +\n", out) and "holds no results yet" in err


def test_a_run_at_work_that_does_not_tell_what_it_trains_is_no_error(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with claims.held(tmp_path / "run"):
        assert "The sweep is at work: 1 of its runs" in run(capsys, tmp_path).err


@pytest.mark.parametrize("single", [True, False])
def test_the_command_that_completes_a_sweep_launches_the_absent_runs_only(
        tmp_path, capsys, monkeypatch, single):
    made = listing.make_args_list(
        n_trials=2, dataset_names=["Debug28", "Debug224"], algorithms=["ERM", "SWAD"],
        n_hparams_from=1, n_hparams=3, steps=3, data_dir=None, task="domain_generalization",
        holdout_fraction=0.25, single_test_envs=single, hparams='{"batch_size": 4}',
        checkpoint_freq=2)
    lost = {5, 6, 17}
    for i, train_args in enumerate(made):
        folder = tmp_path / str(i)
        if i in lost - {6}:
            continue
        folder.mkdir()
        if i == 6:
            files.leave_args(folder, train_args)
            continue
        accs = {f"env{k}_{split}_acc": .5 for k in range(3) for split in ("in", "out")}
        args = train_args | {"output_dir": str(folder)}
        (folder / "results.jsonl").write_text(
            json.dumps({"args": args, "hparams": {}, "step": 2, **accs}) + "\n")
        (folder / "done").write_text("done")
    manifest.add_launches(tmp_path, [{"of_plugins": {}, "flags": [
        "--datasets", "Debug28", "Debug224", "--algorithms", "ERM", "SWAD", "--n_trials", "2",
        "--n_hparams_from", "1", "--n_hparams", "3", "--steps", "3", "--checkpoint_freq", "2",
        "--holdout_fraction", "0.25", "--hparams", '{"batch_size": 4}',
        *(["--single_test_envs"] if single else [])]}])
    out, _ = run(capsys, tmp_path)
    commands = [shlex.split(line) for line in out.splitlines() if "sweep launch" in line]
    launched = []
    monkeypatch.setattr(sweep.Job, "launch", lambda new, *_: launched.extend(new) or [])
    for command in commands:
        assert command[:4] == ["python", "-m", "domainbed_kd.scripts.sweep", "launch"]
        assert sweep.main([*command[3:], "--skip_confirmation"]) == 0
    absent = [job.train_args | {"output_dir": None} for job in launched]
    expected = [made[i] | {"output_dir": None} for i in sorted(lost)]
    assert sorted(map(str, absent)) == sorted(map(str, expected))


def test_a_folder_that_does_not_say_what_its_sweep_is_gets_no_command(vlcs, capsys):
    shutil.rmtree(next(folders(vlcs)))
    out, _ = run(capsys, vlcs)
    assert "Of 40 runs, 1 are absent" in out and "To complete" not in out


PLUGIN = """
from domainbed_kd.algorithms.erm import ERM
class Brought(ERM):
    display_name = "Brought & shown"
"""


def test_a_plugins_method_is_shown_by_its_display_name(vlcs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(algorithms, "ALGORITHMS", algorithms.ALGORITHMS.copy())
    monkeypatch.setattr(algorithms, "_REGISTERED", {})
    (tmp_path / "brought.py").write_text(PLUGIN)
    for folder in folders(vlcs):
        edit(folder, algorithm="Brought")
    shutil.rmtree(next(folders(vlcs)))
    flags = ["--plugin", str(tmp_path / "brought.py")]
    out, _ = run(capsys, vlcs, *flags)
    assert out.count("\nBrought & shown  ") == 6 and "VLCS, Brought & shown, test envs" in out
    assert r"Brought \& shown & " in run(capsys, vlcs, "--latex", *flags).out
    assert "\nBrought  " in run(capsys, vlcs, "--upstream", *flags).out


# Comparisons.

@pytest.fixture
def two(vlcs):
    """The golden sweep under another name, and ERM that is worse by 0.1 everywhere."""
    for folder in list(folders(vlcs)):
        copy = vlcs / f"{folder.name}x"
        shutil.copytree(folder, copy)
        edit(copy, algorithm="FourDs")
        path = folder / "results.jsonl"
        found = [json.loads(text) for text in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(
            {k: v - .1 if k.endswith("_acc") else v for k, v in r.items()}) + "\n" for r in found))
    return vlcs


def test_an_algorithm_is_compared_with_every_other_for_each_selection_method(two, capsys):
    without, _ = run(capsys, two)
    out, _ = run(capsys, two, "--compare", "4Ds")
    assert out.count("-------- Differences to 4Ds, model selection method:") == 3
    rows = [line.split() for line in out.splitlines() if line.startswith("ERM") and "to" in line]
    # 4 domains of 2 trials: the least two-sided p of a signed-rank test of 8 pairs is 2 / 2^8.
    assert [row[:6] for row in rows] == ["ERM 8 -10.0 -10.0 to -10.0".split()] * 3
    assert all(row[6:] == ["0.008", "0.008", "*"] for row in rows)
    assert out.count("Ranks need three algorithms") == 3
    assert "cannot be below" not in out  # 0.008 is below 0.05
    assert set(without.splitlines()) < set(out.splitlines())


def test_a_comparison_of_few_pairs_says_what_it_cannot_show(two, capsys):
    for path in list(two.rglob("results.jsonl")):
        if json.loads(path.read_text().splitlines()[0])["args"]["trial_seed"]:
            shutil.rmtree(path.parent)
    out, _ = run(capsys, two, "--compare", "4Ds")
    limit = "With 4 pairs no difference can be significant: p cannot be below 0.125."
    titles = [i for i, text in enumerate(out.splitlines()) if "Differences to 4Ds" in text]
    assert [out.splitlines()[i + 1] for i in titles] == [limit] * 3  # before the table


@pytest.mark.parametrize("style, line", [
    ("latex", r"ERM & 8 & -10.0 & -10.0 to -10.0 & 0.008 & 0.008 * \\"),
    ("markdown", r"| ERM | 8 | -10.0 | -10.0 to -10.0 | 0.008 | 0.008 \* |")])
def test_comparisons_have_the_format_of_the_tables(two, capsys, style, line):
    out, _ = run(capsys, two, "--compare", "FourDs", "--format", style)
    assert out.count(line) == 3


@pytest.mark.parametrize("flags", [["--upstream"], ["--format", "csv"]])
def test_what_cannot_hold_a_comparison_refuses_it(vlcs, flags):
    with pytest.raises(ValueError, match="--compare goes with text, latex or markdown"):
        collect_results.main(["--input_dir", str(vlcs), "--compare", "ERM", *flags])


# Mixed sweeps.

def test_mixed_protocols_are_marked_and_described(vlcs, capsys):
    edit(next(folders(vlcs, test_envs=[2])), steps=2000, hparams='{"lr": 1}')
    out, _ = run(capsys, vlcs)
    row = out.splitlines()[4]
    assert row.count("!") == 2 and " ! *3/4" in row
    assert "! trained by another protocol than most of the column:" in out
    assert ('    VLCS, ERM: steps 1001, hparams default (39 runs); '
            'steps 2000, hparams {"lr": 1} (1 run)') in out


def test_fast_and_exact_runs_of_one_cell_are_told_apart_in_plain_words(vlcs, capsys):
    for folder in list(folders(vlcs)):
        shutil.copytree(folder, vlcs / f"{folder.name}f")
        edit(vlcs / f"{folder.name}f", fast=True)
    out, _ = run(capsys, vlcs)
    assert "    VLCS, ERM: exact mode (40 runs); fast mode (40 runs)\n" in out
    assert "; exact mode (ERM), fast mode (ERM); teacher none." in out
    assert "fast True" not in out and "fast default" not in out


# Teachers that failed their audit.

@pytest.fixture
def badly_taught(vlcs):
    """The golden sweep, with KDDG whose teacher was near chance in the runs on test env 0."""
    for folder in list(folders(vlcs)):
        copy = vlcs / f"{folder.name}x"
        shutil.copytree(folder, copy)
        edit(copy, algorithm="KDDG", allow_bad_teacher=True)
        first, *others = (copy / "results.jsonl").read_text().splitlines()
        record = json.loads(first)
        problem = "is near chance: right on 9% of 9 images." if 0 in record["args"][
            "test_envs"] else None
        record["teacher"] = {"accuracy": 0.1, "problem": problem}
        (copy / "results.jsonl").write_text("\n".join([json.dumps(record), *others, ""]))
    return vlcs


AUDIT = "learnt from teachers that failed their audit (--allow_bad_teacher): near chance."


@pytest.mark.parametrize("flags, cell, footnote", [
    ([], r"KDDG +98\.0 \+/- 0\.2 \? +64", f"\n? {AUDIT}\n"),
    (["--latex"], r"KDDG & .*98\.0 \$\\pm\$ 0\.2}?\$\^{\\ddagger}\$ & .*64",
     r"$^{\ddagger}$ " + AUDIT.replace("_", r"\_").replace("--", "-{}-")),
    (["--format", "markdown"], r"\| KDDG \| .*98\.0 ± 0\.2(\*\*)? \? \| ", f"\n? {AUDIT}\n")])
def test_a_teacher_that_failed_its_audit_is_marked_and_explained(
        badly_taught, capsys, flags, cell, footnote):
    out, err = run(capsys, badly_taught, *flags)
    assert re.search(cell, out) and footnote in out and err == ""
    training_domain = out.split("leave-one")[0]
    row = next(text for text in training_domain.splitlines() if re.match(r"(\| )?KDDG", text))
    assert row.count("ddagger" if "--latex" in flags else "?") == 2  # test env 0, and Avg


def test_csv_names_what_was_wrong_with_a_teacher(badly_taught, capsys):
    out, err = run(capsys, badly_taught, "--format", "csv")
    rows = [line.split(",") for line in out.splitlines() if "training-domain" in line]
    assert [(row[2], row[3]) for row in rows if row[-2] == "near chance"] == [
        ("KDDG", "C"), ("KDDG", "Avg"), ("KDDG", "all"), ("KDDG", "all")]
    assert {row[-2] for row in rows} == {"", "near chance"} and f"? {AUDIT}" in err


def test_upstream_knows_no_audit(badly_taught, capsys):
    assert "?" not in run(capsys, badly_taught, "--upstream").out


# Flags, files and errors.

def test_csv_stays_clean_and_its_notes_go_to_stderr(vlcs, capsys):
    shutil.rmtree(next(folders(vlcs)))
    out, err = run(capsys, vlcs, "--format", "csv")
    assert {line.count(",") for line in out.splitlines()} == {11}
    assert "Of 40 runs, 1 are absent" in err


def test_latex_keeps_its_notes_as_comments_in_the_document(vlcs, capsys):
    shutil.rmtree(next(folders(vlcs)))
    out, _ = run(capsys, vlcs, "--latex")
    assert "\n% Of 40 runs, 1 are absent" in out and out.endswith("\n\\end{document}\n")


def test_markdown_keeps_its_notes_in_a_code_block(vlcs, capsys):
    shutil.rmtree(next(folders(vlcs)))
    out, _ = run(capsys, vlcs, "--format", "markdown")
    assert "\n```text\n* n/m" in out and out.endswith("\n```\n")


@pytest.mark.parametrize("flags, words", [
    (["--input_dir", "no/such/folder"], "no/such/folder: there is no such folder"),
    (["--input_dir", ".", "--latex", "--format", "csv"], "contradict"),
    (["--input_dir", ".", "--upstream", "--format", "csv"], "DomainBed prints text or latex")])
def test_misuse_is_an_error_of_one_line(flags, words):
    with pytest.raises((ValueError, OSError), match=words) as error:
        collect_results.main(flags)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(vlcs, capsys, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    out, err = run(capsys, vlcs)
    assert without_protocols(out) == golden("collect_results_text.txt")
    assert err == f"Not written to {vlcs / 'results.txt'}: Permission denied.\n"


def test_mended_runs_have_a_row_of_their_own_except_for_domainbed(vlcs, capsys):
    for folder in folders(vlcs, trial_seed=1):
        edit(folder, hparams='{"mended": true}')
    out = run(capsys, vlcs).out
    names = [line.split("  ")[0].strip() for line in out.splitlines()]
    first = names.index("ERM")
    assert names[first:first + 2] == ["ERM", "ERM (mended)"]
    assert run(capsys, vlcs, "--upstream").out == golden("collect_results_text.txt")


def test_a_method_that_is_mended_throughout_has_one_row(vlcs, capsys):
    for folder in folders(vlcs):
        edit(folder, algorithm="MTL", hparams='{"mended": true}')
    out = run(capsys, vlcs).out
    assert "\nMTL (mended)  " in out and "\nMTL  " not in out
