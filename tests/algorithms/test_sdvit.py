import copy

import pytest
import torch
import torch.nn.functional as F
from clips import bits, make, minibatches, run, same_bits
from scipy.stats import chisquare

from domainbed_kd.algorithms import sdvit as sdvit_module
from domainbed_kd.algorithms.sdvit import block_features
from domainbed_kd.losses import kd_loss

VIT = {"resnet18": False, "resnet50_augmix": True, "backbone": "small_vit"}
SHAPE = (3, 16, 16)


def sdvit(name="SDViT", **changes):
    return make(name, SHAPE, **VIT | changes)


def one_batch():
    return tuple(torch.cat(part) for part in zip(*minibatches(shape=SHAPE)[0]))


def test_the_term_and_its_gradients_are_the_official_codes():
    early = torch.tensor([[2.0, 0, -1], [0.5, 1.5, 0]], requires_grad=True)
    final = torch.tensor([[1.0, 1, 0], [0, 3, -1]], requires_grad=True)
    term = kd_loss(early, final, 3.0) / 3
    assert term.item() == pytest.approx(0.183442, abs=1e-6)
    total = F.cross_entropy(final, torch.tensor([0, 1])) + 0.5 * term
    assert total.item() == pytest.approx(0.555660, abs=1e-6)
    term.backward()
    torch.testing.assert_close(early.grad, torch.tensor(
        [[0.081716, -0.047605, -0.034111], [0.041477, -0.091238, 0.049761]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(final.grad, torch.tensor(
        [[-0.077536, 0.045170, 0.032366], [-0.043034, 0.087334, -0.044300]]), rtol=0, atol=1e-6)


def test_an_update_descends_on_the_loss_of_the_block_that_it_logs():
    algorithm = sdvit(sdvit_weight=0.5, sdvit_temperature=3.0)
    x, y = one_batch()
    with torch.no_grad():
        blocks, final = algorithm.predict_blocks(x), algorithm.predict(x)
    values = algorithm.update(minibatches(shape=SHAPE)[0])
    distill = kd_loss(blocks[int(values["block"]) - 1], final, 3.0).item() / 3
    classify = F.cross_entropy(final, y).item()
    assert values == pytest.approx({
        "loss": classify + 0.5 * distill, "classify": classify, "distill": distill,
        "block": values["block"]}, rel=1e-4)


def test_blocks_predict_as_the_network_does_when_its_later_blocks_are_cut_off():
    algorithm = sdvit()
    x, _ = one_batch()
    for block, logits in enumerate(algorithm.predict_blocks(x), start=1):
        cut = copy.deepcopy(algorithm.network)
        del cut[0].network.blocks[block:]
        torch.testing.assert_close(cut(x), logits)


def test_where_the_last_block_is_drawn_the_loss_is_the_cross_entropy():
    algorithm = sdvit()
    algorithm.generator = torch.Generator()
    values = {}
    while values.get("block") != algorithm.n_blocks:
        [values] = run(algorithm, minibatches(shape=SHAPE))
    assert values["distill"] == pytest.approx(0, abs=1e-6)
    assert values["loss"] == pytest.approx(values["classify"], abs=1e-6)


def test_with_a_weight_of_0_it_trains_as_erm_on_the_same_transformer():
    erm, ours = sdvit("ERM"), sdvit(sdvit_weight=0.0)
    for algorithm in (erm, ours):
        run(algorithm, minibatches(3, SHAPE))
    assert same_bits(bits(erm.network), bits(ours.network))


def test_no_parameter_is_added():
    erm, ours = sdvit("ERM"), sdvit()
    assert ours.state_dict().keys() - erm.state_dict().keys() == {"_extra_state"}
    assert [p.shape for p in ours.parameters()] == [p.shape for p in erm.parameters()]


@pytest.mark.parametrize("detach", [False, True])
def test_the_last_blocks_prediction_is_pulled_too_unless_it_is_detached(detach):
    algorithm = sdvit(sdvit_detach=detach)
    early, final = map(algorithm.classifier, block_features(
        algorithm.featurizer, one_batch()[0], [1]))
    target = final.detach() if detach else final
    last = algorithm.featurizer.network.blocks[-1].mlp.fc2.weight  # no early block reaches it
    [gradient] = torch.autograd.grad(kd_loss(early, target, 3.0), [last], allow_unused=True)
    assert (gradient is None) == detach


def test_detaching_changes_what_an_update_learns():
    states = []
    for detach in (False, True):
        algorithm = sdvit(sdvit_detach=detach)
        run(algorithm, minibatches(3, SHAPE))
        states.append(bits(algorithm.network))
    assert not same_bits(*states)


def test_every_block_is_drawn_as_often(monkeypatch):
    algorithm = sdvit(lr=0.0)
    [batch] = minibatches(shape=SHAPE, size=1)
    features = torch.randn(3, algorithm.featurizer.n_outputs)
    monkeypatch.setattr(sdvit_module, "block_features", lambda *_: [features, features])
    counts = torch.zeros(algorithm.n_blocks)
    for _ in range(1200):
        counts[int(algorithm.update(batch)["block"]) - 1] += 1
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_a_network_that_pools_by_the_mean_is_taken_too():
    algorithm = make("SDViT", (3, 32, 32), **VIT | {"backbone": "vit_tiny_patch16_224"})
    network = algorithm.featurizer.network
    network.global_pool, network.fc_norm, network.norm = "avg", network.norm, torch.nn.Identity()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(algorithm.predict_blocks(x)[-1], algorithm.predict(x))


@pytest.mark.parametrize("network", [
    {"resnet18": True, "resnet50_augmix": False, "backbone": None}, {"backbone": "resnet10t"},
    {"backbone": "efficientnet_lite0"}, {"backbone": "swin_tiny_patch4_window7_224"}])
def test_a_student_without_blocks_of_one_width_is_refused_in_one_line(network):
    with pytest.raises(ValueError, match="^SDViT needs a vision transformer.*deit_small.*$"):
        make("SDViT", (3, 64, 64), **VIT | network)
