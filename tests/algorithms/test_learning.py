"""Whether each method that is not DomainBed's learns real digits."""

import functools

import pytest
import torch

from domainbed_kd import datasets, hparams_registry
from domainbed_kd.algorithms import DOMAINBED, SHIPPED, get_algorithm_class

# CLIP does not learn, MosaicKD has a test of its own, a linear probe knows no more than its random
# features, and a vision transformer from random weights does not move in hundreds of updates.
OURS = [name for name in SHIPPED
        if name not in (*DOMAINBED, "CLIP", "MosaicKD", "LinearProbe", "SDViT")]
# Students that are CLIP's own image network, at their own lr.
CLIPS_NETWORK = ("CLIPood", "VL2VSD")
# Averages of a short run begin when something has been learnt.
SHORT = {"SCMD": {"scmd_sma_start": 50, "scmd_worst_case": 1.0}, "WAKD": {"wakd_start": 50},
         "SMA": {"sma_start": 50}}


@functools.cache
def digits():
    return datasets.get_dataset_class("DigitsDG")(None, [3], {})


def build(name, n_steps, **changes):
    dataset = digits()
    hparams = hparams_registry.default_hparams(name, "DigitsDG") | {
        "batch_size": 32, "total_steps": n_steps, "dataset": "DigitsDG", "test_envs": [3],
        "class_names": dataset.class_names, "domain_names": dataset.domain_names[:3],
        "normalization": None, "weights": "none"}
    if name not in CLIPS_NETWORK:
        hparams |= {"backbone": "test_resnet", "lr": 0.003}
    torch.manual_seed(0)
    return get_algorithm_class(name)(dataset.input_shape, 10, 3, hparams | changes)


def accuracy_after(algorithm, n_steps):
    """Of the first 200 images of each training domain; chance is 0.1."""
    generator = torch.Generator().manual_seed(0)
    domains = digits().datasets[:3]
    for _ in range(n_steps):
        rows = [torch.randint(len(domain), (32,), generator=generator) for domain in domains]
        algorithm.update([[tensor[i] for tensor in domain.tensors]
                          for domain, i in zip(domains, rows)])
    x, y = (torch.cat(part) for part in zip(*(domain[:200] for domain in domains)))
    with torch.no_grad():
        return (algorithm.eval().predict(x).argmax(dim=1) == y).float().mean().item()


@pytest.fixture(scope="module")
def teacher():
    erm = build("ERM", 70)
    assert accuracy_after(erm, 70) > 0.7
    return torch.nn.Sequential(erm.featurizer, erm.classifier).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_it_learns_digits_far_above_chance(name, teacher):
    n_steps = 100 if name in ("SCMD", "WAKD", "VL2VADiP") else 70
    algorithm = build(name, n_steps, teacher=teacher, **SHORT.get(name, {}))
    assert accuracy_after(algorithm, n_steps) > 0.6
