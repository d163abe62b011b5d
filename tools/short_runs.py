"""A short run of an algorithm from one seed, and the difference between two such runs.

A case has `input_shape`, `num_classes`, `num_domains`, `per_domain` (images per domain and update),
`updates`, `evaluate_after`, `seed`, `data_seed` and `hparams`. No seed is set between construction
and update, so that an additional draw is noticed.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def inputs(case: dict) -> tuple[list, Tensor]:
    """The minibatches of each update, and the images for predictions."""
    generator = torch.Generator().manual_seed(case["data_seed"])
    shape = case["input_shape"]

    def batch(domain):
        x = torch.rand((case["per_domain"], *shape), generator=generator)
        y = torch.randint(case["num_classes"], (case["per_domain"],), generator=generator)
        return 2 * x - 1 + 0.3 * domain + 0.5 * y.view(-1, *[1] * len(shape)), y

    updates = [[batch(domain) for domain in range(case["num_domains"])]
               for _ in range(case["updates"])]
    return updates, 2 * torch.rand((6, *shape), generator=generator) - 1


def next_draws() -> dict[str, list[int]]:
    """The next draws of the three random streams, which stay unchanged."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = {"torch": torch.randint(2**31 - 1, (3,)).tolist(),
             "numpy": np.random.randint(2**31 - 1, size=3).tolist(),
             "random": [random.getrandbits(31) for _ in range(3)]}
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return drawn


def sums(algorithm: nn.Module) -> dict[str, list]:
    """{name: [sum, sum of absolute values, elements]} of the state dict's tensors."""
    return {name: [tensor.double().sum().item(), tensor.double().abs().sum().item(),
                   tensor.numel()]
            for name, tensor in algorithm.state_dict().items() if isinstance(tensor, Tensor)}


def predict(algorithm: nn.Module, x: Tensor) -> list[list[float]]:
    """Logits in eval mode."""
    algorithm.eval()
    with torch.no_grad():
        logits = algorithm.predict(x)
    algorithm.train()
    return logits.tolist()


def run(algorithm_class: Callable, case: dict) -> dict:
    """What the class does in a case: returned values, logits, sums of tensors, next draws."""
    updates, probe = inputs(case)
    random.seed(case["seed"])
    np.random.seed(case["seed"])
    torch.manual_seed(case["seed"])
    algorithm = algorithm_class(tuple(case["input_shape"]), case["num_classes"],
                                case["num_domains"], dict(case["hparams"]))
    result = {"streams_after_construction": next_draws(), "initial": sums(algorithm), "values": []}
    for i, minibatches in enumerate(updates, 1):
        values = algorithm.update(minibatches)
        result["values"].append({key: float(value) for key, value in values.items()})
        if i == case["evaluate_after"]:
            result["logits_mid"] = predict(algorithm, probe)
    result["streams_after_updates"] = next_draws()
    result["tensors"] = sums(algorithm)
    result["logits"] = predict(algorithm, probe)
    return result


def _gap(one: float, other: float) -> float:
    """Their distance; 0 if neither is a number, infinite if only one is."""
    if one == other or math.isnan(one) and math.isnan(other):
        return 0.0
    return math.inf if math.isnan(one - other) else abs(one - other)


def _of_values(ours: list[dict], theirs: list[dict]) -> float:
    """The largest relative difference; for values near 0, relative to the median of their key."""
    if [values.keys() for values in ours] != [values.keys() for values in theirs]:
        return math.inf
    median = {
        key: np.nan_to_num(np.median([abs(values[key]) for values in theirs if key in values]))
        for key in set().union(*theirs)}
    return max(_gap(our[key], value) and
               _gap(our[key], value) / (abs(value) + 1e-3 * median[key] + 1e-7)
               for our, their in zip(ours, theirs) for key, value in their.items())


def _of_tensors(ours: dict, theirs: dict) -> float:
    """The largest difference of sums, relative to the sum of absolute values."""
    def apart(name):
        total, size, n = theirs[name]
        if name not in ours or ours[name][2] != n:
            return math.inf
        found = max(_gap(ours[name][0], total), _gap(ours[name][1], size))
        return found and found / (size or 1)

    # Without the temporary network of DomainBed's Fish, and counts of batches.
    return max((apart(name) for name in theirs if not name.startswith("network_inner.")
                and "num_batches_tracked" not in name), default=0.0)


def _of_logits(ours: list, theirs: list) -> float:
    """The largest difference, relative to the largest logit."""
    ours, theirs = np.ravel(ours), np.ravel(theirs)
    found = max(map(_gap, ours, theirs))
    return found and found / abs(theirs).max()


def differences(ours: dict, theirs: dict) -> dict[str, float]:
    """The largest difference of each kind; for random streams 0 if they are equal, or infinite."""
    alike = all(ours[when] == theirs[when]
                for when in ("streams_after_construction", "streams_after_updates"))
    # Here GroupDRO's q has its size from the start, so that checkpoints can be loaded.
    initial = {name: sums for name, sums in theirs.get("initial", {}).items() if sums[2]}
    return {
        "values": _of_values(ours["values"], theirs["values"]),
        "logits": max(_of_logits(ours[name], theirs[name]) for name in ("logits_mid", "logits")),
        "tensors": max(_of_tensors(ours["initial"], initial),
                       _of_tensors(ours["tensors"], theirs["tensors"])),
        "streams": 0.0 if alike else math.inf,
    }
