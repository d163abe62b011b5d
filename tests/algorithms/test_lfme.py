import pytest
import torch
import torch.nn.functional as F
from clips import bits, make, minibatches, run, same_bits
from torch import nn

from domainbed_kd.algorithms.lfme import LFME

TARGET = torch.tensor([[2.0, 0, -1], [0.5, 1.5, 0]])
EXPERTS = torch.tensor([[1.0, 1, 0], [0, 3, -1]])


class Constant(nn.Module):
    """A network whose logits are a parameter, whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits.clone()


def worked(experts=True):
    """The algorithm of the worked example: one image in each of two domains."""
    algorithm = LFME((3, 16, 16), 3, 2, make("LFME", lfme_experts=experts).hparams)
    algorithm.network = Constant(TARGET)
    algorithm.optimizer = torch.optim.SGD(algorithm.network.parameters(), lr=1.0)
    if experts:
        algorithm.experts = nn.ModuleList(Constant(row[None]) for row in EXPERTS)
        algorithm.expert_optimizer = torch.optim.SGD(algorithm.experts.parameters(), lr=1.0)
    x = torch.zeros(1, 3, 16, 16)
    return algorithm, [(x, torch.tensor([0])), (x, torch.tensor([1]))]


def test_the_loss_is_the_official_codes():
    algorithm, batch = worked()
    values = algorithm.update(batch)
    assert values["classify"] == pytest.approx(0.317107, abs=1e-6)
    assert values["regularize"] == pytest.approx(0.754329, abs=1e-6)
    assert values["loss"] == pytest.approx(1.071436, abs=1e-6)
    wanted, _ = worked()[0]._step_of_experts(batch)
    torch.testing.assert_close(wanted, torch.tensor(
        [[0.422319, 0.422319, 0.155362], [0.046613, 0.936240, 0.017148]]), rtol=0, atol=1e-6)


def test_without_experts_the_labels_take_their_place():
    algorithm, batch = worked(experts=False)
    assert len(algorithm.experts) == 0
    assert algorithm.update(batch)["regularize"] == pytest.approx(0.416667, abs=1e-6)


def test_the_students_gradient_is_that_of_both_terms_and_the_experts_only_their_own():
    algorithm, batch = worked()
    algorithm.update(batch)
    y = torch.tensor([0, 1])
    classify = (TARGET.softmax(1) - F.one_hot(y, 3)) / 2
    pull = 2 * (TARGET - EXPERTS.softmax(1)) / 6  # 2 weight (z - q) / (B C)
    torch.testing.assert_close(algorithm.network.logits.detach(), TARGET - classify - pull)
    moved = torch.cat([expert.logits for expert in algorithm.experts]).detach()
    torch.testing.assert_close(moved, EXPERTS - (EXPERTS.softmax(1) - F.one_hot(y, 3)))


def test_with_a_weight_of_0_it_trains_as_erm_does_with_dropout_too():
    shape, dropout = (3, 32, 32), {"backbone": "resnet10t", "resnet_dropout": 0.5,
                                   "resnet18": False, "resnet50_augmix": True}
    erm, ours = make("ERM", shape, **dropout), make("LFME", shape, lfme_weight=0.0, **dropout)
    for algorithm in (erm, ours):
        torch.manual_seed(1)
        run(algorithm, minibatches(2, shape))
    assert same_bits(bits(erm.network), bits(ours.network))


def test_an_expert_is_an_erm_on_its_domain():
    algorithm, batches = make("LFME", weight_decay=0.01), minibatches(3)
    erms = []
    for i, expert in enumerate(algorithm.experts):
        erm = make("ERM", weight_decay=0.01)
        erm.network.load_state_dict(expert.state_dict())
        erms.append(erm)
        run(erm, [[batch[i]] for batch in batches])
    run(algorithm, batches)
    for erm, expert in zip(erms, algorithm.experts):
        assert same_bits(bits(erm.network), bits(expert))


def test_domains_may_come_in_another_order_and_in_unequal_sizes():
    losses = []
    for order in ([0, 1, 2], [2, 0, 1]):
        algorithm = make("LFME")
        algorithm.experts = nn.ModuleList(algorithm.experts[i] for i in order)
        batch = [(x[:n], y[:n]) for n, (x, y) in zip((4, 1, 3), minibatches()[0])]
        losses.append(algorithm.update([batch[i] for i in order])["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_experts_are_saved_with_the_run_and_follow_its_mode():
    algorithm = make("LFME")
    run(algorithm, minibatches(2))
    other = make("LFME", seed=9)
    other.load_state_dict(algorithm.state_dict())
    x = minibatches()[0][0][0]
    assert torch.equal(other.eval().predict(x), algorithm.eval().predict(x))
    assert same_bits(bits(other.experts), bits(algorithm.experts))
    assert not any(module.training for module in algorithm.experts.modules())
