"""tools/parity.py, asked about stand-ins for a DomainBed checkout."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def checkout(folder, seed_hash="from domainbed_kd.seeds import seed_hash"):
    files = {
        "lib/misc.py": seed_hash,
        "hparams_registry.py": "from domainbed_kd.hparams_registry import *",
        "algorithms.py": "ALGORITHMS = ['ERM', 'CORAL']",
        "scripts/sweep.py": "from domainbed_kd.sweep.jobs import *",
    }
    for name, text in files.items():
        path = folder / "domainbed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return folder


def ask(folder):
    return subprocess.run([sys.executable, str(ROOT / "tools" / "parity.py"), str(folder)],
                          capture_output=True, text=True)


def test_a_checkout_that_derives_the_same_is_equal(tmp_path):
    answer = ask(checkout(tmp_path))
    assert answer.returncode == 0, answer.stderr
    assert "seed_hash: 150 of 150 equal" in answer.stdout
    assert "table of its own sweep: equal" in answer.stdout


def test_a_checkout_that_derives_other_seeds_is_told_apart(tmp_path):
    answer = ask(checkout(tmp_path, "def seed_hash(*args): return 1"))
    assert answer.returncode == 1
    assert "seed_hash: 0 of 150 equal, the first: (0, 'lr')" in answer.stdout


@pytest.mark.parametrize("folder", ["absent", "."])
def test_a_folder_without_domainbed_is_refused_in_one_line(folder, tmp_path):
    answer = ask(tmp_path / folder)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
