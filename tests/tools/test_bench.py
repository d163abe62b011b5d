import argparse
import importlib
import json
import sys

import pytest
from PIL import Image

from domainbed_kd import datasets
from domainbed_kd.folder import curves
from domainbed_kd.results import records

bench = importlib.import_module("bench")


@pytest.fixture
def peer(tmp_path):
    """A checkout whose scripts only note how they were called."""
    folder = tmp_path / "peer" / "domainbed" / "scripts"
    folder.mkdir(parents=True)
    for name in ("sweep", "collect_results"):
        (folder / f"{name}.py").write_text(
            "import json, pathlib, sys\n"
            "with pathlib.Path('calls').open('a') as file:\n"
            f"    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n")
    return tmp_path / "peer"


def calls(peer):
    return [json.loads(line) for line in (peer / "calls").read_text().splitlines()]


def test_the_made_up_sweep_is_one_that_domainbed_could_have_left(tmp_path, capsys):
    bench.make_sweep(tmp_path, 12)
    found = records.Folder(tmp_path).curves()
    assert curves.n_records(found) == 60 and capsys.readouterr().err == ""
    grid = records.Grid(found)
    assert len(grid.finished) == 12 and grid.datasets == ["VLCS"]
    size = (next(tmp_path.iterdir()) / "results.jsonl").stat().st_size
    assert 800 < size / 5 < 1500  # as measured: 103 MB in 100,000 records


def test_a_checkout_reads_the_same_sweep_in_turn(peer, tmp_path, capsys):
    assert bench.main(["--only", "collect", "--runs", "3", "--process_repeats", "2",
                       "--peer", str(peer), "--output", str(tmp_path / "out")]) == 0
    tables = json.loads((tmp_path / "out.json").read_text())
    first, again, theirs = tables["collect"]
    assert first["of first"] == 1 and theirs["s"] > 0 and theirs["MB"] > 1
    assert again["of first"] == again["s"] / first["s"]
    assert [call[:2] for call in calls(peer)] == [["collect_results", "--input_dir"]] * 2
    assert "peer's collect_results" in (tmp_path / "out.md").read_text() in capsys.readouterr().out


def test_a_folder_without_domainbed_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no domainbed/scripts"):
        bench.main(["--peer", str(tmp_path)])


def test_a_command_that_fails_is_an_error_with_its_last_word():
    with pytest.raises(RuntimeError, match="ValueError: broken"):
        bench.run([sys.executable, "-c", "raise ValueError('broken')"])


def test_a_statement_is_timed_without_its_setup():
    setup = "time.perf_counter = iter([1.0, 3.5]).__next__; waited = time.sleep"
    assert bench.seconds_inside(setup, "waited(0)") == 2.5
    assert bench.seconds_inside("import time as clock", "clock.sleep(0.1)") >= 0.1


@pytest.mark.slow
def test_a_start_is_compared_with_torchs_and_has_the_bars_of_the_project():
    rows = bench.start(argparse.Namespace(process_repeats=1))
    assert [row["bar, ms"] for row in rows] == ["-", 50, 300, 5000]
    torchs, package, *_ = rows
    assert torchs["of import torch"] == 1 and 0 < package["ms"] < torchs["ms"] / 5


def fake_job(accuracy):
    def run(folder, *_):
        (folder / "job").mkdir(parents=True)
        (folder / "job" / "results.jsonl").write_text(json.dumps(
            {"step": 0, "step_time": id(folder), "acc": accuracy,
             "args": {"output_dir": str(folder)}}) + "\n")
        return {"s": 1.0, "CPU s": 1.0, "MB": 1.0}
    return run


@pytest.mark.parametrize("accuracies", [(0.5, 0.5), (0.5, 0.5000001)])
def test_the_sweeps_numbers_must_not_depend_on_how_it_ran(monkeypatch, accuracies):
    args = argparse.Namespace(peer=None, process_repeats=1)
    monkeypatch.setattr(bench, "launch", fake_job(accuracies[0]))
    monkeypatch.setattr(bench, "train_apart", fake_job(accuracies[1]))
    if accuracies[0] == accuracies[1]:
        assert [row["of first"] for row in bench.sweep(args)] == [1, 1]
    else:
        with pytest.raises(RuntimeError, match="not those of separate train processes"):
            bench.sweep(args)


def test_a_checkout_launches_the_same_sweep(peer, tmp_path):
    bench.launch(tmp_path / "runs", peer, "domainbed")
    (name, command, *flags), = calls(peer)
    assert (name, command) == ("sweep", "launch")
    assert flags[-4:] == ["--output_dir", str(tmp_path / "runs"), "--command_launcher", "local"]
    assert "--skip_confirmation" in flags


def test_the_footprint_counts_every_process_and_what_they_hold_together():
    code = ("import multiprocessing, time\n"
            "def hold():\n"
            "    held = bytearray(b'x' * 60_000_000)\n"
            "    time.sleep(4)\n"
            "multiprocessing.get_context('fork').Process(target=hold).start()\n"
            "hold()")
    found = bench.footprint([sys.executable, "-c", code], threads=1)
    assert found["processes"] == 2 and found["MB of all"] > 110


@pytest.mark.slow
def test_the_plain_loop_trains_on_images_as_pacs_has_them(tmp_path, monkeypatch):
    small_pacs(tmp_path)
    plain_loop = importlib.import_module("plain_loop")
    monkeypatch.setattr(plain_loop, "N_WORKERS", 0)
    evaluated, accuracy = [], plain_loop.accuracy
    monkeypatch.setattr(plain_loop, "accuracy", lambda *args: (
        evaluated.append(args[2]), accuracy(*args)))
    hparams = {"resnet18": True, "resnet50_augmix": False, "weights": "none", "batch_size": 2}
    plain_loop.main(str(tmp_path), hparams, 2)
    assert evaluated == [1] * 2 * 8  # a batch for each of both splits of the four domains


def test_sections_that_need_images_ask_for_them_and_are_left_out_without(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="crops and pacs need images. Pass --data_dir"):
        bench.main(["--only", "pacs"])
    ran = []
    monkeypatch.setattr(bench, "SECTIONS", {
        name: lambda args, name=name: ran.append(name) or [{"what": name}]
        for name in bench.SECTIONS})
    output = ["--output", str(tmp_path / "out")]
    bench.main(output)
    without = ran.copy()
    ran.clear()
    bench.main([*output, "--data_dir", "d"])
    assert ran == [*without, "crops", "pacs"]


def small_pacs(folder):
    """Two images for each class and domain, in PACS's layout."""
    for domain in datasets.PACS.ENVIRONMENTS:
        for name in datasets.PACS.CLASSES:
            for k in range(2):
                path = folder / "PACS" / domain / name / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30), (9 * k, 0, 0)).save(path)


def test_crops_of_each_way_are_counted(tmp_path):
    small_pacs(tmp_path)
    rows = bench.crops(argparse.Namespace(data_dir=tmp_path, process_repeats=1), batch_size=2)
    assert [row["what"] for row in rows] == [
        "files", "image cache", "files, fast", "image cache, fast"]
    assert all(row["crops per CPU s"] > 0 for row in rows) and rows[0]["times as many"] == 1
