"""tools/parity.py, asked about stand-ins for a DomainBed checkout."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

OURS = """from domainbed_kd.algorithms import get_algorithm_class
ALGORITHMS = ['ERM', 'CORAL']"""


def checkout(folder, seed_hash="from domainbed_kd.seeds import seed_hash", algorithms=OURS):
    files = {
        "lib/misc.py": seed_hash,
        "hparams_registry.py": "from domainbed_kd.hparams_registry import *",
        "algorithms.py": algorithms,
        "scripts/sweep.py": ("from domainbed_kd.sweep.jobs import *\n"
                             "from domainbed_kd.sweep.listing import *"),
    }
    for name, text in files.items():
        path = folder / "domainbed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return folder


def ask(folder):
    return subprocess.run([sys.executable, str(ROOT / "tools" / "parity.py"), str(folder),
                           "--cases", "2"], capture_output=True, text=True)


def test_a_checkout_that_derives_the_same_is_equal(tmp_path):
    answer = ask(checkout(tmp_path))
    assert answer.returncode == 0, answer.stderr
    assert "seed_hash: 150 of 150 equal" in answer.stdout
    assert "table of its own sweep: equal" in answer.stdout
    assert "ERM: 2 of 2 agree, largest difference 0.0e+00\n" in answer.stdout
    assert "CORAL: 2 of 2 agree, largest difference 0.0e+00\n" in answer.stdout


def test_a_checkout_that_derives_other_seeds_is_told_apart(tmp_path):
    answer = ask(checkout(tmp_path, "def seed_hash(*args): return 1"))
    assert answer.returncode == 1
    assert "seed_hash: 0 of 150 equal, the first: (0, 'lr')" in answer.stdout


def test_a_checkout_whose_algorithm_trains_otherwise_is_told_apart_with_the_case(tmp_path):
    answer = ask(checkout(tmp_path, algorithms="""from domainbed_kd import algorithms
ALGORITHMS = ['ERM', 'CORAL']
class ERM(algorithms.ERM):
    def update(self, minibatches, unlabeled=None):
        super().update(minibatches)
        return super().update(minibatches)
def get_algorithm_class(name):
    return ERM if name == 'ERM' else algorithms.get_algorithm_class(name)"""))
    assert answer.returncode == 1
    assert "ERM: 0 of 2 agree, largest difference " in answer.stdout
    assert ", the first: {'input_shape': " in answer.stdout
    assert "CORAL: 2 of 2 agree" in answer.stdout


def test_a_checkout_that_differs_by_a_magnified_last_bit_agrees_in_float64(tmp_path):
    answer = ask(checkout(tmp_path, algorithms="""import torch
from domainbed_kd import algorithms
ALGORITHMS = ['ERM']
class ERM(algorithms.ERM):
    def predict(self, x):
        eps = torch.finfo(x.dtype).eps
        return super().predict(x) * (1 + 2000 * eps)
def get_algorithm_class(name):
    return ERM"""))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert re.search(r"ERM: 2 of 2 agree, largest difference \S+e-0[1-4], in float64 \S+e-1\d\n",
                     answer.stdout), answer.stdout


@pytest.mark.parametrize("folder", ["absent", "."])
def test_a_folder_without_domainbed_is_refused_in_one_line(folder, tmp_path):
    answer = ask(tmp_path / folder)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
