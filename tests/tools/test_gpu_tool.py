"""tools/gpu.py where there is no GPU: it says so, and its quick mode measures all the same."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from domainbed_kd import datasets

TOOL = ROOT / "tools" / "gpu.py"


def run(*words):
    return subprocess.run([sys.executable, str(TOOL), *map(str, words)], capture_output=True,
                          text=True)


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    ran = run()
    assert ran.returncode == 2 and "sees no GPU here" in ran.stderr
    assert ran.stderr.count("\n") == 1


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
    ran = run("--quick", "--only", "card", "pacs", "--data_dir", small_pacs, "--output", tmp_path)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["key"]: row for row in report["rows"]}
    for key, of in (("exact_step", "fp32_step"), ("fast_step", "bf16_step")):
        assert rows[key]["ratio"] == pytest.approx(rows[key]["figure"] / rows[of]["figure"])
    assert not report["failures"]
    for row in report["rows"]:
        assert f"| {row['what']} | {row['figure']:.4g} {row['unit']} |" in (
            tmp_path / "gpu.md").read_text()


def test_what_is_skipped_is_named(tmp_path):
    ran = run("--quick", "--only", "pacs", "--output", tmp_path)
    assert ran.returncode == 0
    assert "skipped: pacs: it needs --data_dir" in (tmp_path / "gpu.md").read_text()
