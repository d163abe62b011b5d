"""What `make` installs, by a Python that only writes down what it is told to run."""

import shutil
import subprocess

import pytest
from conftest import ROOT

CPU_BUILDS = "-m pip install --quiet torch torchvision --index-url " \
             "https://download.pytorch.org/whl/cpu"
PACKAGE = "-m pip install --quiet --editable .[report]"


@pytest.fixture
def install(tmp_path):
    """Makes the virtual environment, by a stand-in for Python that may fail to reach an index."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n'
                      '[ "$2" != venv ] || { mkdir -p "$3/bin"; cp "$0" "$3/bin"; exit; }\n'
                      'echo "$@" >> ran\ncase "$*" in *--index-url*) exit $UNREACHABLE;; esac\n')
    python.chmod(0o755)

    def make(*words, unreachable=0):
        process = subprocess.run(
            ["make", "PYTHON=./python", "VENV=venv", *words, "venv/installed"], cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "UNREACHABLE": str(unreachable)},
            capture_output=True, text=True)
        ran = (tmp_path / "ran").read_text().splitlines()
        assert (tmp_path / "venv" / "installed").exists() == (process.returncode == 0)
        return process.stdout, ran

    return make


def test_an_installation_says_what_it_fetches_and_installs_the_package(install):
    out, ran = install()
    assert "about 6 GB" in out and ran == [PACKAGE]


def test_torch_cpu_installs_the_cpu_builds_before_the_package(install):
    out, ran = install("TORCH=cpu")
    assert "CPU builds from download.pytorch.org; about 1 GB" in out
    assert ran == [CPU_BUILDS, PACKAGE]


def test_torch_cpu_that_cannot_be_had_says_what_to_do_and_installs_nothing_else(install):
    out, ran = install("TORCH=cpu", unreachable=1)
    assert "there is no CPU build for this Python and platform, or no connection" in out
    assert f"Run 'venv/bin/python {CPU_BUILDS.replace('--quiet ', '')}' to see which" in out
    assert "or leave TORCH=cpu out." in out and ran == [CPU_BUILDS]
