"""tools/gpu.py where there is no GPU: it says so, and its quick mode measures all the same."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from domainbed_kd import datasets

TOOL = ROOT / "tools" / "gpu.py"
gpu = importlib.import_module("gpu")


def run(*words):
    return subprocess.run([sys.executable, str(TOOL), *map(str, words)], capture_output=True,
                          text=True)


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    ran = run()
    assert ran.returncode == 2 and "sees no GPU here" in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.fixture
def report():
    return gpu.Report(argparse.Namespace(type="cpu"))


def is_gone(pid):
    """Whether a process has ended, or ends within ten seconds."""
    for _ in range(100):
        stat = Path("/proc", str(pid), "stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def small_pacs(tmp_path):
    """A folder called PACS of noise, 32 pixels: four domains, seven classes, ten images each."""
    r = np.random.RandomState(0)
    for domain in "ACPS":
        for name in datasets.get_dataset_class("PACS").CLASSES:
            folder = tmp_path / "PACS" / domain / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.fromarray(r.randint(256, size=(32, 32, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png")
    return tmp_path


@pytest.mark.slow
def test_the_quick_mode_measures_ratios_of_figures_from_one_run(small_pacs, tmp_path):
    ran = run("--quick", "--only", "card", "pacs", "teachers", "sweep", "small",
              "--data_dir", small_pacs, "--output", tmp_path, "--minutes", "60")
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["key"]: row for row in report["rows"]}
    for key, of in (("exact_step", "fp32_step"), ("fast_step", "bf16_step"),
                    ("fast_step4", "bf16_step"), ("four2", "four1"), ("many", "alone"),
                    *((f"{name}_fast", f"{name}_floor") for name in gpu.TEACHERS)):
        assert rows[key]["ratio"] == pytest.approx(rows[key]["figure"] / rows[of]["figure"])
    assert not report["failures"] and not report["skipped"]
    for row in report["rows"]:
        assert f"| {row['what']} | {row['figure']:.4g} {row['unit']} |" in (
            tmp_path / "gpu.md").read_text()


def test_what_is_skipped_is_named(tmp_path):
    assert gpu.main(["--quick", "--only", "pacs", "--output", str(tmp_path)]) == 0
    assert "skipped: pacs: it needs --data_dir" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("words, message", [
    (["--data_dir", "nowhere"], "--data_dir nowhere: there is no folder nowhere/PACS"),
    (["--peer", "nowhere"], "--peer nowhere: there is no domainbed/scripts/train.py"),
    (["--minutes", "0"], "--minutes is 0")])
def test_wrong_flags_are_refused_before_anything_is_measured(words, message, tmp_path):
    with pytest.raises((OSError, ValueError), match=message):
        gpu.main(["--quick", "--output", str(tmp_path), *words])
    assert not list(tmp_path.iterdir())


def test_an_empty_pacs_is_refused(tmp_path):
    (tmp_path / "PACS").mkdir()
    with pytest.raises((OSError, ValueError)):
        gpu.main(["--quick", "--output", str(tmp_path / "out"), "--data_dir", str(tmp_path)])
    assert not (tmp_path / "out").exists()


def test_a_section_that_fails_costs_one_line_and_no_other_section(tmp_path, monkeypatch):
    def runs_out(report, *args):
        report.add("before", "what came before", 1, "ms")
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")

    def counts(report, *args):
        # Written after the section before this one.
        assert "what came before" in (tmp_path / "gpu.md").read_text()
        report.add("after", "what comes after", 2, "ms", "before")

    monkeypatch.setattr(gpu, "measure_card", runs_out)
    monkeypatch.setattr(gpu, "measure_small", counts)
    assert gpu.main(["--quick", "--only", "card", "small", "--output", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failures"] == [
        "card: RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"]
    assert report["rows"][1]["ratio"] == 2


def test_sections_that_have_not_begun_in_time_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "measure_card", lambda *args: time.sleep(0.7))
    assert gpu.main(["--quick", "--only", "card", "small", "--minutes", "0.01",
                     "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["skipped"] == [
        "small: 0.01 minutes were over. Pass --only small, or more --minutes."]


def test_a_command_is_stopped_in_time_with_what_it_started(report, tmp_path):
    (tmp_path / "started").mkdir()

    def none_once_it_has_started():
        while not list((tmp_path / "started").iterdir()):
            time.sleep(0.01)
        return 0

    report.seconds_left = none_once_it_has_started
    code = ("import os, sys, time; child = os.fork(); child and os.mkdir(f'{sys.argv[1]}/{child}');"
            "time.sleep(60)")
    with pytest.raises(TimeoutError, match="stopped after .* s, as --minutes were over"):
        gpu.python(report, "-c", code, tmp_path / "started")
    [started] = (tmp_path / "started").iterdir()
    assert is_gone(int(started.name))


def test_a_command_is_bound_to_the_first_cores(report):
    with gpu.bound(1):
        _, said, _ = gpu.python(report, "-c", "import os; print(*os.sched_getaffinity(0))")
    assert [int(said)] == sorted(os.sched_getaffinity(0))[:1]


def test_cuda_tests_are_counted_and_those_that_fail_named(report, monkeypatch):
    monkeypatch.setattr(gpu, "python", lambda *words: (
        9.0, "FAILED tests/test_a.py::test_b - assert 1 == 2\n1 failed, 39 passed, 2 skipped", 1))
    gpu.measure_tests(report, None, None, None, None)
    assert report.found == {"cuda_tests": 39} and len(report.skipped) == 1
    assert report.failures == ["CUDA tests: tests/test_a.py::test_b"]


PEER = """import json, pathlib, sys
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
assert value("--dataset") == "PACS" and value("--algorithm") == "ERM"
folder = pathlib.Path(value("--output_dir"))
folder.mkdir()
with (folder / "results.jsonl").open("w") as file:
    for step in (0, 299):
        print(json.dumps({"step": step, "step_time": 0.076, "loss": 0.5}), file=file)
"""


@pytest.fixture
def peer(tmp_path):
    """A DomainBed checkout whose `train` claims 76 ms a step."""
    folder = tmp_path / "checkout" / "domainbed" / "scripts"
    folder.mkdir(parents=True)
    (folder / "train.py").write_text(PEER)
    return argparse.Namespace(peer=str(tmp_path / "checkout"), data_dir="data", quick=False)


def test_a_peers_run_gives_a_step_and_a_time_to_compare_with(peer, report, tmp_path):
    report.add("fp32_step", "the card's own step", 50, "ms")
    gpu.measure_peer(report, peer, gpu.Sizes(quick=False), tmp_path)
    assert report.found["peer_step"] == pytest.approx(76) and report.found["peer_run"] > 0
    assert report.rows[1]["ratio"] == pytest.approx(1.52) and not report.failures
    ours = [{"step": 0, "loss": 0.5, "step_time": 0.05}, {"step": 299, "loss": 0.75}]
    assert gpu.differences(ours, gpu.read(tmp_path / "peer")) == ["loss"]


def test_a_peer_that_fails_is_quoted_in_one_line(peer, report, tmp_path):
    Path(peer.peer, "domainbed", "scripts", "train.py").write_text("raise ValueError('no apex')")
    gpu.measure_peer(report, peer, gpu.Sizes(quick=False), tmp_path)
    assert report.failures == ["the peer's run: ValueError: no apex"]
