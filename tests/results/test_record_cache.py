import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import GOLDENS, golden, records_of_sweep
from test_records import line, write

from domainbed_kd.results import record_cache, records
from domainbed_kd.scripts import collect_results, list_top_hparams

WHOLE = records_of_sweep(GOLDENS / "sweep_data")  # too small for a cache


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A copy of the golden sweep, for which a cache is worth it."""
    monkeypatch.setattr(record_cache, "LEAST_RUNS", 2)
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    return tmp_path / "sweep"


@pytest.fixture
def parsed(monkeypatch):
    """The folders whose results.jsonl is parsed from now on."""
    seen, read = [], records._read

    def spy(path, size):
        seen.append(path.split("/")[-2])
        return read(path, size)

    monkeypatch.setattr(records, "_read", spy)
    return seen


def test_a_sweep_read_again_is_the_same_and_parses_nothing(sweep, parsed):
    first = records_of_sweep(sweep)
    assert len(parsed) == len(set(parsed)) == len(records.Folder(sweep).stamps)
    parsed.clear()
    assert records_of_sweep(sweep) == first
    assert parsed == []
    assert first == WHOLE


def test_cached_records_of_a_run_share_their_args_and_hparams(sweep):
    write(sweep / "run", line(0), line(10))
    for _ in range(2):
        first, second = records_of_sweep(sweep)[-2:]
        assert first["args"] is second["args"] and first["hparams"] is second["hparams"]


def test_only_what_changed_is_parsed_again(sweep, parsed):
    records_of_sweep(sweep)
    write(sweep / "new", line(0))
    changed = sorted(sweep.glob("*/results.jsonl"))[3]
    with changed.open("a") as file:
        file.write(line(10) + "\n")
    shutil.rmtree(sorted(sweep.glob("*/results.jsonl"))[7].parent)
    parsed.clear()
    found = records_of_sweep(sweep)
    assert set(parsed) == {"new", changed.parent.name}
    shutil.copytree(sweep, sweep.parent / "fresh", ignore=shutil.ignore_patterns(".*"))
    assert found == records_of_sweep(sweep.parent / "fresh")


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
def test_odd_runs_are_read_as_json_reads_them_with_and_without_cache(sweep, lines):
    write(sweep / "zz", *lines)
    expected = [{k: v for k, v in json.loads(text).items()
                 if k in ("args", "hparams", "step", "selection") or k.endswith("_acc")}
                for text in lines]
    for _ in range(2):
        found = [r for r in records_of_sweep(sweep) if r["args"]["dataset"] == "VLCS"][-len(lines):]
        assert repr([sorted(r.items()) for r in found]) == repr(
            [sorted(r.items()) for r in expected])


def test_what_cannot_be_read_is_said_each_time(sweep, capsys):
    write(sweep / "torn", line(0), line(10)[:40])
    for _ in range(2):
        assert collect_results.main(["--input_dir", str(sweep)]) == 0
        assert "torn/results.jsonl: line 2: not a record" in capsys.readouterr().err


def test_tables_from_the_cache_are_the_golden_ones(sweep, parsed, capsys):
    for name, flags in (("collect_results_text.txt", ["--upstream"]),
                        ("collect_results_latex.txt", ["--upstream", "--latex"])):
        for _ in range(2):
            assert collect_results.main(["--input_dir", str(sweep), *flags]) == 0
            assert capsys.readouterr() == (golden(name), "")
    assert len(parsed) == len(set(parsed))
    argv = ["--input_dir", str(sweep), "--dataset", "VLCS", "--algorithm", "ERM", "--test_env", "0"]
    printed = []
    for _ in range(2):
        assert list_top_hparams.main(argv) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].startswith("Total records: 200")


def test_only_the_cache_is_left_beside_the_runs(sweep):
    before = set(sweep.iterdir())
    records_of_sweep(sweep)
    assert {path.name for path in set(sweep.iterdir()) - before} == {".records.npz"}


@pytest.mark.parametrize("damage", [b"", b"no cache", b"PK\x03\x04 torn"])
def test_damaged_caches_are_made_anew(sweep, capsys, damage):
    for _ in range(2):
        assert collect_results.main(["--input_dir", str(sweep), "--upstream"]) == 0
        assert capsys.readouterr().out == golden("collect_results_text.txt")
        for path in sweep.glob(".*"):
            path.write_bytes(damage)


def test_deleting_the_caches_loses_nothing(sweep):
    first = records_of_sweep(sweep)
    for path in sweep.glob(".*"):
        path.unlink()
    assert records_of_sweep(sweep) == first


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(sweep, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record_cache.os, "replace", refuse)
    assert len(records_of_sweep(sweep)) == 200
    assert "Not written to" in capsys.readouterr().err
    assert list(sweep.glob(".*")) == []


def test_readers_at_the_same_time_get_the_same(sweep):
    with ThreadPoolExecutor(4) as pool:
        assert all(found == WHOLE for found in pool.map(records_of_sweep, [sweep] * 8))


def test_small_sweeps_get_no_cache(tmp_path):
    write(tmp_path / "run", line(0))
    records_of_sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
