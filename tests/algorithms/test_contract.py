"""What `Algorithm` declares, held by every method that ships and by one of a user's."""

import ast
import copy
import inspect
from pathlib import Path

import pytest
import torch
from test_algorithms import EARLY, SMALL, build, hparams_of, minibatches

import domainbed_kd
from domainbed_kd import algorithms, extensions, networks
from domainbed_kd.algorithms import ALGORITHMS
from domainbed_kd.algorithms.base import Algorithm
from domainbed_kd.datasets import MultipleDomainDataset

DECLARED = {
    "display_name": (str, type(None)), "selects_last": bool, "averages_weights": bool,
    "averages_after": int, "learns_from_run": bool, "mends": bool,
    "needs_same_view": (str, type(None))}
PLUGIN = """
from domainbed_kd.algorithms.erm import ERM

class Patient(ERM):
    display_name = "Patient & kind"
    selects_last = True
    needs_same_view = "it looks twice"

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.count_updates()

    def update(self, minibatches, unlabeled=None):
        self.update_count += 1
        return super().update(minibatches, unlabeled) | {"share": 0.5}

    def teacher_logits(self, x):
        return self.network(x)
"""


@pytest.fixture
def patient(tmp_path, monkeypatch):
    monkeypatch.setattr(algorithms, "ALGORITHMS", list(ALGORITHMS))
    monkeypatch.setattr(algorithms, "_REGISTERED", dict(algorithms._REGISTERED))
    (tmp_path / "patient.py").write_text(PLUGIN)
    extensions.load([str(tmp_path / "patient.py")], ["Patient"])
    return "Patient"


def hold(name):
    """Whether a method keeps the contract, from its class to a few of its updates."""
    cls = algorithms.get_algorithm_class(name)
    for attribute, kind in DECLARED.items():
        assert isinstance(getattr(cls, attribute), kind), attribute
    assert algorithms.display_name(name) == (cls.display_name or name)
    assert algorithms.learns_from_run(name) is cls.learns_from_run

    algorithm = build(name, hparams=hparams_of(name, **EARLY))
    assert all(part is None or isinstance(part, torch.nn.Module)
               for part in map(algorithm.part, ("network", "featurizer", "average", "teachers")))
    assert algorithm.total_steps == EARLY["total_steps"]
    for step in range(EARLY["teacher_steps"] + 2):
        x = minibatches(seed=step)[0][0]
        if algorithm.teacher_is_ready():
            logits = algorithm.teacher_logits(x)
            assert logits.shape == (len(x), 2)
            assert not (logits.requires_grad and cls.learns_from_run)
        values = algorithm.update(minibatches(seed=step))
        before = copy.deepcopy(values)
    assert algorithm.teacher_is_ready() == (algorithm.teacher_logits is not None)
    algorithm.update(minibatches(seed=9))
    assert values == before  # later updates leave them alone
    if "update_count" in algorithm.state_dict():
        other = build(name, hparams=hparams_of(name, **EARLY), seed=2)
        other.load_state_dict(algorithm.state_dict())
        assert other.update_count.item() == algorithm.update_count.item()
        assert (algorithm.update_count > 0) == (name != "Transfer")  # DomainBed's never counts


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_shipped_method_keeps_the_contract(name):
    hold(name)


def test_a_users_method_keeps_the_contract(patient):
    hold(patient)
    assert algorithms.display_name(patient) == "Patient & kind"


def test_the_contract_has_its_defaults_on_the_base_class():
    assert Algorithm.display_name is None and Algorithm.teacher_logits is None
    assert not Algorithm.learns_from_run and not Algorithm.averages_weights
    algorithm = Algorithm(SMALL, 2, 3, {})
    assert algorithm.total_steps == MultipleDomainDataset.N_STEPS == 5001
    assert not algorithm.teacher_is_ready()


def test_nobody_guesses_whether_a_method_declares_what_the_base_class_does():
    declared = {name for name, _ in inspect.getmembers(Algorithm)} - set(dir(torch.nn.Module))
    for path in Path(domainbed_kd.__file__).parent.rglob("*.py"):
        if "plugin" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                name = node.args[1]
                assert not isinstance(name, ast.Constant) or name.value not in declared, (
                    f"{path}:{node.lineno} asks for {name.value!r} with {ast.unparse(node.func)}")


@pytest.mark.parametrize("path", [
    *(Path(domainbed_kd.__file__).parent / "run").glob("*.py")], ids=lambda path: path.stem)
def test_a_run_asks_a_method_for_its_parts_and_never_guesses(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            assert not ast.unparse(node.args[0]).endswith("algorithm"), f"{path}:{node.lineno}"


class Counting(networks.CountsOnCPU):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.tensor([3]))
        self.register_buffer("done", torch.tensor(False))
        self.register_buffer("mean", torch.tensor(0.5))
        self.weight = torch.nn.Parameter(torch.ones(2))


def test_counters_stay_on_the_cpu_when_a_module_moves():
    module = Counting().to("meta")  # stands for a GPU
    devices = {name: tensor.device.type for name, tensor in module.state_dict().items()}
    assert devices == {"n": "cpu", "done": "cpu", "mean": "meta", "weight": "meta"}
    assert module.n.item() == 3
