"""The built wheel, in an empty folder: it needs nothing of the clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


def ran(*words, **options):
    process = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                             timeout=600, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "domainbed_kd", source / "domainbed_kd",
                    ignore=shutil.ignore_patterns("__pycache__"))
    ran("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", dist, source)
    path, = dist.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "domainbed_kd").rglob("*")
                if path.is_file() and path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    assert packed == expected


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    ran("-m", "pip", "install", "--no-deps", "--no-compile", "--target", site, wheel)
    options = {"cwd": empty, "env": {**os.environ, "PYTHONPATH": str(site)}}
    where = ran("-c", "import domainbed_kd; print(domainbed_kd.__file__)", **options)
    assert Path(where.strip()) == site / "domainbed_kd" / "__init__.py"

    out = ran("-m", "domainbed_kd", "demo", "--algorithms", "ERM", "SCMD", "--n_trials", "1",
              "--steps", "2", "--checkpoint_freq", "1", **options)
    *_, says, report, following = out.splitlines()
    assert "on domains that it never trained on" in says
    assert report == f"Report: {Path('demo', 'report.html')}" and following.startswith("Next: ")
    assert (empty / "demo" / "report.html").stat().st_size > 10_000
    assert len(list(empty.glob("demo/sweep/*/done"))) == 8
    assert os.listdir(empty) == ["demo"]
