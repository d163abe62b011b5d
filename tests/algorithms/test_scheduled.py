"""Optimisers and schedules of any method, by hparams."""

import pytest
import torch
from clips import bits, make, minibatches, run, same_bits

from domainbed_kd import checkpoints
from domainbed_kd.algorithms import composed, get_algorithm_class
from domainbed_kd.algorithms.scheduled import factor


def build(name, seed=0, **changes):
    hparams = make(name).hparams | {"total_steps": 10} | changes
    torch.manual_seed(seed)
    return composed.assembled(get_algorithm_class(name), hparams)((3, 28, 28), 3, 3, hparams)


@pytest.mark.parametrize("kind, make_scheduler", [
    ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)),
    ("step", lambda o: torch.optim.lr_scheduler.StepLR(o, 8, gamma=0.1)),
    ("none", lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0))])
def test_the_schedule_is_torchs_over_the_whole_run(kind, make_scheduler):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer)
    for step in range(10):
        assert factor(kind, step, 10) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_drops_are_shares_of_the_run():
    assert [factor("step", step, 120, [1 / 3, 7 / 12, 5 / 6]) for step in (39, 40, 69, 70, 99, 100)
            ] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize("kind, cls", [
    ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_any_method_takes_another_optimiser_at_its_own_lr_and_decay(kind, cls):
    for name in ("ERM", "CORAL", "KD", "SCMD"):
        algorithm = build(name, optimizer=kind, lr=0.02, weight_decay=0.3)
        assert type(algorithm.optimizer) is cls
        group = algorithm.optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.02, 0.3)
    assert kind != "sgd" or group["momentum"] == 0.9
    assert type(build("DANN", optimizer="sgd").gen_opt) is torch.optim.Adam  # it has betas


def test_an_update_with_sgd_is_torchs_own():
    algorithm = build("ERM", optimizer="sgd", lr=0.1)
    other = build("ERM", optimizer="sgd", lr=0.1)
    run(algorithm, minibatches(3))
    optimizer = torch.optim.SGD(other.network.parameters(), lr=0.1, momentum=0.9)
    for batch in minibatches(3):
        x, y = (torch.cat(part) for part in zip(*batch))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(other.network(x), y).backward()
        optimizer.step()
    assert same_bits(bits(algorithm.network), bits(other.network))


def test_every_optimiser_follows_and_a_restart_goes_on_to_the_same_bits(tmp_path):
    batches = minibatches(6)
    changes = {"schedule": "cosine", "optimizer": "sgd", "lfme_weight": 1.0}
    whole, first, second = (build("LFME", seed=s, **changes) for s in (0, 0, 1))
    logged = run(whole, batches)
    run(first, batches[:3])
    checkpoints.save(tmp_path / "state.pt", checkpoints.algorithm_state(first))
    checkpoints.load_algorithm_state(second, checkpoints.load(tmp_path / "state.pt"))
    assert run(second, batches[3:]) == logged[3:]
    for optimizer in (second.optimizer, second.expert_optimizer):
        [group] = optimizer.param_groups
        assert group["lr"] == pytest.approx(second.hparams["lr"] * factor("cosine", 5, 10))


def test_no_schedule_is_the_algorithm_itself():
    erm = get_algorithm_class("ERM")
    assert composed.assembled(erm, {"schedule": "none"}) is erm


@pytest.mark.parametrize("name, changes, words", [
    ("CLIPood", {"schedule": "cosine"}, "a schedule of its own"),
    ("ERM", {"schedule": "linear"}, "schedule is 'linear'"),
    ("ERM", {"optimizer": "lamb"}, "optimizer is 'lamb'"),
    ("ERM", {"schedule": "step", "schedule_drops": 0.5}, "a list of shares"),
    ("ERM", {"schedule": "step", "schedule_drops": [3]}, "a list of shares")])
def test_what_is_no_schedule_is_refused(name, changes, words):
    with pytest.raises(ValueError, match=words):
        build(name, **changes)
