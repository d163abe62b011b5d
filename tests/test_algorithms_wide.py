"""DomainBed's 34 algorithms at 155 settings, without a seed between construction and update."""

import random

import numpy as np
import pytest
import torch
from conftest import golden, seed_everything

from domainbed_kd.algorithms import ALGORITHMS, ermplusplus, get_algorithm_class

GOLDEN = golden("algorithms_wide.json")
CASES = {case["id"]: case for case in GOLDEN["cases"]}
KNOWN = [pytest.param(case, id=name) for name, case in CASES.items()
         if case["algorithm"] in ALGORITHMS]


@pytest.fixture(autouse=True)
def one_thread():
    """As the goldens were made: another number of threads sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs_of(case):
    """(what each update gets, what is predicted)."""
    generator = torch.Generator().manual_seed(case["data_seed"])
    shape = case["input_shape"]

    def batch(domain):
        x = torch.rand((case["per_domain"], *shape), generator=generator)
        y = torch.randint(case["num_classes"], (case["per_domain"],), generator=generator)
        return 2 * x - 1 + 0.3 * domain + 0.5 * y.view(-1, *[1] * len(shape)), y

    updates = [[batch(domain) for domain in range(case["num_domains"])]
               for _ in range(case["updates"])]
    return updates, 2 * torch.rand((6, *shape), generator=generator) - 1


def next_of_streams():
    return {"torch": torch.randint(2**31 - 1, (3,)).tolist(),
            "numpy": np.random.randint(2**31 - 1, size=3).tolist(),
            "random": [random.getrandbits(31) for _ in range(3)]}


def peek_streams():
    """What the three random streams would give next."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = next_of_streams()
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    return drawn


def sums_of(algorithm):
    """{name: (sum, sum of absolute values, elements)} of the state dict's tensors."""
    return {name: (tensor.double().sum().item(), tensor.double().abs().sum().item(),
                   tensor.numel())
            for name, tensor in algorithm.state_dict().items() if isinstance(tensor, torch.Tensor)}


def predict(algorithm, x):
    algorithm.eval()
    with torch.no_grad():
        logits = algorithm.predict(x).double()
    algorithm.train()
    return logits


def run(case):
    """What the case's algorithm does, in the shape of `case["upstream"]`."""
    updates, probe = inputs_of(case)
    hparams = dict(case["hparams"])
    if tuple(case["input_shape"]) == (3, 64, 64):
        hparams["weights"] = "none"
    seed_everything(case["seed"])
    algorithm = get_algorithm_class(case["algorithm"])(
        tuple(case["input_shape"]), case["num_classes"], case["num_domains"], hparams)
    result = {"streams_after_construction": peek_streams(), "initial": sums_of(algorithm),
              "values": []}
    for i, minibatches in enumerate(updates, 1):
        values = algorithm.update(minibatches)
        result["values"].append({key: float(value) for key, value in values.items()})
        if i == case["evaluate_after"]:
            result["logits_mid"] = predict(algorithm, probe)
    result["streams_after_updates"] = peek_streams()
    result["tensors"] = sums_of(algorithm)
    result["logits"] = predict(algorithm, probe)
    return result


def worst_value(ours, theirs):
    """Largest difference, relative; values near 0 relative to the median of their key."""
    median = {key: np.median([abs(values[key]) for values in theirs if key in values])
              for key in set().union(*theirs)}
    return max((abs(our[key] - value) / (abs(value) + 1e-3 * median[key] + 1e-7), key, i)
               for i, (our, their) in enumerate(zip(ours, theirs, strict=True))
               for key, value in their.items())


def worst_tensor(ours, theirs):
    """Largest difference of a sum, relative to the sum of absolute values."""
    def difference(name):
        total, size, n = theirs[name]
        if ours[name][2] != n:
            return float("inf")
        apart = max(abs(ours[name][0] - total), abs(ours[name][1] - size))
        return apart / (size or 1) if apart else 0.0

    # Scratch of DomainBed's, and counts of batches that decide nothing.
    return max(((difference(name), name) for name in theirs
                if not name.startswith("network_inner.") and "num_batches_tracked" not in name),
               default=(0.0, "none"))


def logits_apart(ours, theirs):
    theirs = torch.tensor(theirs, dtype=torch.float64)
    return (ours - theirs).abs().max().item() / theirs.abs().max().item()


@pytest.mark.parametrize("case", KNOWN)
def test_a_run_is_domainbeds_without_a_seed_after_construction(case, monkeypatch):
    if "sma_start_iter" in case:  # the first update that is averaged with the one before it
        monkeypatch.setattr(ermplusplus, "AVERAGED_FROM", case["sma_start_iter"] - 1)
    ours, theirs = run(case), case["upstream"]
    assert [values.keys() for values in ours["values"]] == [
        values.keys() for values in theirs["values"]]

    tolerance = {key: max(1e-4, 30 * moved) for key, moved in case["sensitivity"].items()}
    initial = {name: sums for name, sums in theirs.get("initial", {}).items()
               if (case["algorithm"], name) != ("GroupDRO", "q")}  # empty at first: ours reloads
    found = {
        "initial": (worst_tensor(ours["initial"], initial), 1e-6),
        "values": (worst_value(ours["values"], theirs["values"]), tolerance["values"]),
        "logits_mid": ((logits_apart(ours["logits_mid"], theirs["logits_mid"]),),
                       tolerance["logits"]),
        "tensors": (worst_tensor(ours["tensors"], theirs["tensors"]), tolerance["tensors"]),
        "logits": ((logits_apart(ours["logits"], theirs["logits"]),), tolerance["logits"]),
    }
    assert {what: worst for what, (worst, limit) in found.items() if not worst[0] <= limit} == {}
    for when in ("streams_after_construction", "streams_after_updates"):
        assert ours[when] == theirs[when], when
