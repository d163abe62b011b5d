import json
import os

import pytest
from conftest import GOLDENS, records_of_sweep

from domainbed_kd.folder import curves
from domainbed_kd.results import records


def line(step=0, **args):
    args = {"dataset": "VLCS", "algorithm": "ERM", "test_envs": [0], "trial_seed": 0,
            "hparams_seed": 0, "steps": 11, "hparams": None, **args}
    accs = {f"env{i}_{split}_acc": 0.5 for i in range(4) for split in ("in", "out")}
    return json.dumps({"args": args, "hparams": {"lr": 0.1}, "step": step, "loss": 1.0, **accs})


def write(folder, *lines):
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(text + "\n" for text in lines))


def test_the_golden_sweep_has_its_200_records_in_order_of_folder_then_line():
    found = records_of_sweep(GOLDENS / "sweep_data")
    expected = [json.loads(text)
                for path in sorted((GOLDENS / "sweep_data").glob("*/results.jsonl"))
                for text in path.read_text().splitlines()]
    assert len(found) == 200
    for record, whole in zip(found, expected, strict=True):
        dropped = {"epoch", "loss", "step_time"}
        assert record == {k: v for k, v in whole.items() if k not in dropped}


@pytest.mark.parametrize("lines", [
    [line(0), line(10, hparams="{}")],  # two kinds of args in a run
    [line(0), line(10).replace("0.5", "1")],  # a whole number stays one
    [line(0).replace("0.1", "NaN"), line(10).replace("0.1", "NaN")],
    [line(0)[:-1].replace('"lr": 0.1', '"lr": [[NaN]]') + "}"],
    [line(0)[:-1].replace('"lr": 0.1', '"lr": 1' + "0" * 30) + "}"],
    [line(0), line(10).replace('"env', '"fd_env')],
    [line(0), line(10)[:-1] + ', "selection": "last"}'],
    [line(0)[:-1] + ', "selection": "last"}'],
    [line(0), line(10)[:-1] + ', "teacher": {"hparams": {"lr": 0.1}}}'],
    [line(0), line(10)[:-1] + ', "args": ' + json.dumps(json.loads(line(seed=3))["args"]) + "}"],
    [line(0), line(10)[:-1] + ', "hparams": {"lr": 0.2}}'],
    [text[:-1] + ', "class": 3, "loss/ce": {"a": [1]}}' for text in (line(0), line(10))],
    [line(0), line(10)[:-1] + ', "class": 3}'], [line(0), line(10).replace('"loss": 1.0, ', "")],
    [line(0), line(10).replace("1.0", "NaN")],
    [line(0).replace("0.5", "1e-320"), line(10).replace("0.5", "0.1234567890123456789")]])
def test_odd_runs_are_read_as_json_reads_them(tmp_path, lines):
    write(tmp_path / "run", *lines)
    expected = [{k: v for k, v in json.loads(text).items()
                 if k in ("args", "hparams", "step", "selection") or k.endswith("_acc")}
                for text in lines]
    assert repr([sorted(r.items()) for r in records_of_sweep(tmp_path)]) == repr(
        [sorted(r.items()) for r in expected])


def test_nothing_is_said_of_a_clean_sweep(tmp_path, capsys):
    write(tmp_path / "a", line(0), line(10))
    assert len(records_of_sweep(tmp_path)) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("broken", [
    '{"args": {"algo', "", line(0) + line(10), "[" * 100_000, "null", "[1]", '"text"', "{}",
    '{"args": 3, "step": 1}',
    line(test_envs=[7]), line(test_envs=[]), line(test_envs=[0, 0]), line(test_envs=["0"]),
    line(trial_seed=None),
    line().replace('"step": 0', '"step": null'), line().replace('"hparams": {"lr": 0.1}, ', "")])
def test_a_line_that_is_no_record_is_named_and_skipped(tmp_path, capsys, broken):
    write(tmp_path / "run", line(0), broken, line(10))
    assert [record["step"] for record in records_of_sweep(tmp_path)] == [0, 10]
    error = capsys.readouterr().err
    assert error == (f"skipped {tmp_path / 'run' / 'results.jsonl'}: line 2: "
                     "not a record like DomainBed's\n")


@pytest.mark.parametrize("value, shown", [
    ("Infinity", "inf"), ("-Infinity", "-inf"), ("NaN", "nan"), ("1e400", "inf"), ("1.5", "1.5"),
    ("-0.01", "-0.01"), ("true", "True"), ('"high"', "high"), ("null", "None"), ("[0.5]", "[0.5]"),
    ("2", "2"), ("1" + "0" * 400, "1" + "0" * 19)])
@pytest.mark.parametrize("alone", [False, True])
def test_an_accuracy_that_is_not_in_0_to_1_is_named_and_skipped(
        tmp_path, capsys, value, shown, alone):
    broken = line(10).replace('"env1_out_acc": 0.5', f'"env1_out_acc": {value}')
    write(tmp_path / "run", *([broken] if alone else [line(0), broken, line(20)]))
    assert [r["step"] for r in records_of_sweep(tmp_path)] == ([] if alone else [0, 20])
    assert capsys.readouterr().err == (
        f"skipped {tmp_path / 'run' / 'results.jsonl'}: line {1 if alone else 2}: env1_out_acc is "
        f"{shown}; an accuracy is a number in [0, 1]\n")


@pytest.mark.parametrize("value", ["0", "1", "0.0", "1.0"])
def test_the_ends_of_the_range_count_as_they_are_written(tmp_path, capsys, value):
    write(tmp_path / "run", line(0).replace("0.5", value), line(10))
    found = records_of_sweep(tmp_path)
    assert repr(found[0]["env1_out_acc"]) == value and capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", [
    line().replace('"step": 0', '"step": 1' + "0" * 400), line().replace('"step": 0', '"step": -1'),
    line(test_envs=[400_000_000]), line(test_envs=[-1]), line(steps=10 ** 400)])
def test_numbers_beyond_any_run_are_no_record(tmp_path, capsys, broken):
    write(tmp_path / "run", line(0), broken)
    assert len(records_of_sweep(tmp_path)) == 1
    assert "line 2: not a record like DomainBed's" in capsys.readouterr().err


def test_a_fifo_and_a_huge_file_are_named_not_read(tmp_path, capsys):
    for name in ("fifo", "huge"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "fifo" / "results.jsonl")
    with (tmp_path / "huge" / "results.jsonl").open("wb") as file:
        file.truncate(2 ** 40)
    assert records_of_sweep(tmp_path) == []
    assert capsys.readouterr().err.splitlines() == [
        f"skipped {tmp_path}/fifo/results.jsonl: Not a regular file",
        f"skipped {tmp_path}/huge/results.jsonl: File too large"]


def test_bytes_that_are_no_text_are_skipped(tmp_path, capsys):
    write(tmp_path / "run", line(0))
    with (tmp_path / "run" / "results.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\0\0\n\0\0\0\n")
    assert len(records_of_sweep(tmp_path)) == 1
    assert "line 2 and 1 more: not a record like DomainBed's" in capsys.readouterr().err


def test_a_last_line_without_its_newline_counts(tmp_path):
    write(tmp_path / "run")
    (tmp_path / "run" / "results.jsonl").write_text(line(0) + "\n" + line(10))
    assert [record["step"] for record in records_of_sweep(tmp_path)] == [0, 10]


def test_what_is_no_run_is_named_but_not_our_own_tables(tmp_path, capsys):
    write(tmp_path / "run", line(0))
    write(tmp_path / "void")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "results.jsonl").mkdir(parents=True)
    for name in ("notes.doc", "results.txt", "results.tex", ".hidden"):
        (tmp_path / name).write_text("x")
    assert len(records_of_sweep(tmp_path)) == 1
    error = capsys.readouterr().err.splitlines()
    assert error == [f"skipped {tmp_path}/empty: no results.jsonl yet",
                     f"skipped {tmp_path}/notes.doc: not the folder of a run",
                     f"skipped {tmp_path}/odd/results.jsonl: Is a directory",
                     f"skipped {tmp_path}/void/results.jsonl: empty"]


def test_many_problems_are_summed_up(tmp_path, capsys):
    for i in range(25):
        (tmp_path / f"{i:02}").mkdir()
    assert records_of_sweep(tmp_path) == []
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 11 and error[-1] == f"skipped 15 more in {tmp_path}"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="--input_dir .*nowhere: there is no such folder"):
        records_of_sweep(tmp_path / "nowhere")


def test_records_of_a_run_share_their_args_and_hparams(tmp_path):
    write(tmp_path / "run", line(0), line(5))
    first, second = records_of_sweep(tmp_path)
    assert first["args"] is second["args"] and first["hparams"] is second["hparams"]


def test_a_run_with_two_test_envs_belongs_to_two_searches():
    found = curves.of_records([json.loads(line(test_envs=[2, 0])), json.loads(line(test_envs=[0]))])
    assert curves.searches(found) == {
        (0, "VLCS", "ERM", 0): found, (0, "VLCS", "ERM", 2): found[:1]}


def loaded(*lines):
    return records.Grid(curves.of_records(map(json.loads, lines)))


def test_the_golden_sweep_lacks_nothing():
    grid = records.Grid(records.Folder(GOLDENS / "sweep_data").curves())
    assert grid.absent() == [] and grid.has_pairs
    assert grid.coverage("VLCS", "ERM", 1, pairs=False)[:2] == (4, 4)
    assert grid.coverage("VLCS", "ERM", 1, pairs=True)[:2] == (16, 16)


def test_a_whole_sweep_is_the_product_of_all_seeds_seen():
    grid = loaded(line(10), line(10, trial_seed=1, test_envs=[1]),
                  line(10, hparams_seed=3, dataset="PACS", algorithm="MMD", test_envs=[2]))
    # 2 datasets x 2 algorithms x 4 test envs x 2 trials x hparams seeds 0 and 3
    assert len(grid.absent()) == 64 - 3
    assert grid.coverage("VLCS", "ERM", 0, pairs=False)[:2] == (1, 4)
    assert grid.env_sets["PACS"] == [(0,), (1,), (2,), (3,)]


def test_pairs_are_expected_once_there_is_one():
    grid = loaded(line(10), line(10, test_envs=[1, 3]))
    assert grid.env_sets["VLCS"] == [
        (0,), (0, 1), (0, 2), (0, 3), (1,), (1, 2), (1, 3), (2,), (2, 3), (3,)]


@pytest.mark.parametrize("steps, last, finished", [
    (11, 10, True), (11, 9, False), (None, 20, True), (None, 19, False), (0, 4, True)])
def test_a_run_has_finished_at_its_last_step(steps, last, finished):
    grid = loaded(line(20, steps=None, test_envs=[3]), line(0, steps=steps),
                  line(last, steps=steps))
    assert (records.Run("VLCS", "ERM", (0,), 0, 0) in grid.finished) is finished


def test_the_grid_tells_settings_apart():
    grid = loaded(line(10), line(4, steps=5, trial_seed=1))
    assert grid.coverage("VLCS", "ERM", 0, pairs=False).settings == {
        ("11", "None", "None", "None", "None"), ("5", "None", "None", "None", "None")}


def test_the_grid_of_nothing_is_empty():
    grid = records.Grid([])
    assert grid.absent() == [] and grid.datasets == [] and not grid.has_pairs


@pytest.mark.parametrize(("hparams", "row"), [
    (None, "MTL"), ('{"lr": 0.1}', "MTL"), ("{", "MTL"), ('{"mended"', "MTL"),
    ('{"mended": true}', "MTL (mended)"), ('{"mended": false}', "MTL"),
    # As earlier versions had it.
    ('{"upstream_exact": false}', "MTL (mended)"), ('{"upstream_exact": true}', "MTL")])
def test_a_runs_row_says_whether_it_is_mended(hparams, row):
    args = {"algorithm": "MTL", "dataset": "PACS", "test_envs": [0], "trial_seed": 0,
            "hparams_seed": 0, "hparams": hparams}
    assert curves.row(args) == records.Run.of(args).algorithm == row
