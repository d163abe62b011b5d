"""No update waits for a GPU: shown on one, and on a CPU by tensors that have no values."""

import pytest
import torch
from test_algorithms import EARLY, build, hparams_of, mended, minibatches
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from domainbed_kd import networks
from domainbed_kd.algorithms import ALGORITHMS

PAIRS_BY_LABEL = pytest.mark.xfail(
    reason="pairs images by label with DomainBed's draws on the CPU, so it reads the labels")
NAMES = [pytest.param(name, marks=PAIRS_BY_LABEL) if name in ("SelfReg", "ADRMX") else name
         for name in ALGORITHMS]


class NoCopies(TorchFunctionMode):
    """Inside, what makes a tensor on the device "meta" from numbers or a CPU tensor fails."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result))
                   if isinstance(leaf, torch.Tensor)}
        from_numbers = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        if "meta" in devices and ("cpu" in devices or from_numbers):
            raise AssertionError(f"{func.__name__} copies pageable memory to the GPU")
        return result


@pytest.fixture
def update_on_meta(monkeypatch):
    """Updates an algorithm on the device "meta", where reading a value fails.

    Its counters stay on the CPU, as on a GPU. Only `networks.sent`, which pins memory, may copy.
    """
    def sent(x, device):
        with torch._C.DisableTorchFunction():
            return x.to(device)

    def update(algorithm, batches):
        # The optimisers' parameters must stay the same objects.
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            algorithm.to("meta")
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        for batch in batches:
            moved = [(x.to("meta"), y.to("meta")) for x, y in batch]
            with NoCopies():
                algorithm.update(moved)

    monkeypatch.setattr(networks, "sent", sent)
    return update


@pytest.mark.parametrize("n_domains", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_update_reads_nothing_from_a_gpu_and_copies_only_pinned_memory_there(
        name, n_domains, update_on_meta):
    hparams = hparams_of(name, **EARLY, **(mended(name) if n_domains == 1 else {}))
    update_on_meta(build(name, n_domains=n_domains, hparams=hparams),
                   [minibatches(n_domains=n_domains, seed=step) for step in range(4)])


@pytest.mark.parametrize("wait", [
    lambda x, rows: x.sum().item(), lambda x, rows: x[x > 0], lambda x, rows: x.nonzero(),
    lambda x, rows: bool(x.any()), lambda x, rows: x.tolist(), lambda x, rows: x.cpu(),
    lambda x, rows: x[rows], lambda x, rows: x.new_tensor(1.0), lambda x, rows: rows.to(x.device),
    lambda x, rows: torch.tensor([1.0], device=x.device), lambda x, rows: x.copy_(rows),
    lambda x, rows: torch.where(torch.tensor(True), x, 0)])
def test_what_waits_for_a_gpu_fails_on_meta(wait):
    x, rows = torch.ones(3, device="meta"), torch.tensor([2, 0, 1])
    with NoCopies():
        x + x  # does not wait
        with pytest.raises((AssertionError, RuntimeError)):
            wait(x, rows)


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_an_update_does_not_wait_for_the_gpu(name):
    algorithm = build(name, hparams=hparams_of(name, **EARLY)).to("cuda")
    batches = [[(x.to("cuda"), y.to("cuda")) for x, y in minibatches(seed=step)]
               for step in range(4)]
    algorithm.update(batches[0])  # makes what is made once, such as the optimisers' state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            algorithm.update(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_what_is_sent_to_a_gpu_arrives_without_a_wait():
    x = torch.randn(64, 100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = networks.sent(x, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(copy.cpu(), x)
