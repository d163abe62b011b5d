"""What single methods of DomainBed compute, against the same written another way."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import seed_everything
from scipy.optimize import brentq
from scipy.stats import norm
from test_algorithms import build, hparams_of, minibatches, state_of
from torch import nn


def test_andmask_keeps_where_enough_domains_agree_and_rescales_by_the_share_left():
    from domainbed_kd.algorithms.andmask import agreement, masked_mean

    gradients = torch.tensor([[1.0, 1.0, -2.0, 0.0], [3.0, 2.0, -1.0, 4.0], [2.0, -3.0, -3.0, 2.0]])
    kept = agreement(gradients) >= 1.0
    assert kept.tolist() == [True, False, True, False]
    torch.testing.assert_close(
        masked_mean(gradients, kept.float()), torch.tensor([4.0, 0.0, -4.0, 0.0]))


def test_sandmask_weighs_by_agreement_over_variance():
    from domainbed_kd.algorithms.sandmask import smooth_mask

    gradients = torch.tensor([[1.0, -1.0, 2.0], [3.0, 1.0, 2.0]])
    expected = [math.tanh(0.5 * (1 - 0.4) / 2), 0.0, 1.0]  # variances 2, 2 and 0; agreement 1, 0, 1
    torch.testing.assert_close(smooth_mask(gradients, 0.4, 0.5), torch.tensor(expected))


def test_igas_penalty_has_the_gradient_that_a_mean_within_the_graph_gives():
    from domainbed_kd.algorithms.iga import gradient_spread

    seed_everything(0)
    model, (x, y), (u, v) = nn.Linear(3, 2), *[(torch.randn(5, 3), torch.randint(2, (5,)))] * 2
    u = u + 1
    gradients = [torch.autograd.grad(F.cross_entropy(model(a), b), list(model.parameters()),
                                     create_graph=True) for a, b in ((x, y), (u, v))]
    mean = [(a + b) / 2 for a, b in zip(*gradients)]
    one, other = (torch.autograd.grad(
        gradient_spread(gradients, m), list(model.parameters()), retain_graph=True)
        for m in (mean, [g.detach() for g in mean]))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("alpha", [0.5, 0.75, 0.99])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_eqrms_quantile_is_that_of_scipys_mixture(alpha, n):
    from domainbed_kd.algorithms.eqrm import kde_quantile

    risks = torch.rand(n, generator=torch.Generator().manual_seed(n))
    width = 1.06 * risks.double().numpy().std(ddof=1) * n**-0.2
    expected = brentq(
        lambda k: norm.cdf(k, risks.double().numpy(), width).mean() - alpha, -9, 9)
    found = kde_quantile(risks, torch.tensor(alpha, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_the_contrast_of_adrmx_is_that_of_a_loop():
    from domainbed_kd.algorithms.adrmx import supervised_contrast

    seed_everything(0)
    features, y = torch.randn(7, 5), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    u = F.normalize(features, dim=1)
    total, n_kept = 0.0, 0
    for i in range(7):
        halves = {j: 0.5 * math.exp(u[i] @ u[j] / 0.07) for j in range(7) if j != i}
        logs = [math.log(halves[j] / (sum(halves.values()) + 1e-5) + 1e-5)
                for j in halves if y[j] == y[i]]
        if logs:
            total, n_kept = total - sum(logs) / len(logs), n_kept + 1
    assert supervised_contrast(features, y).item() == pytest.approx(total / (n_kept + 1), rel=1e-5)
    assert supervised_contrast(features[:2], y[:2]).item() == 0


def test_adrmx_mended_remixes_images_of_one_class_and_two_domains():
    from domainbed_kd.algorithms.adrmx import remixed_pairs

    labels, domains = [0, 1, 0, 1, 2, 2, 1], [0, 0, 1, 1, 1, 1, 0]
    for seed in range(20):
        seed_everything(seed)
        pairs = remixed_pairs(labels, domains, 4, mended=True)
        assert [labels[a] for a, _ in pairs] == [labels[b] for _, b in pairs] == [0, 1]
        assert all(domains[a] != domains[b] for a, b in pairs)


@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("name, mended", [("CAD", True), ("CAD", False), ("CondCAD", False)])
def test_the_bottleneck_of_cad_is_that_of_a_loop(name, mended, flipped):
    algorithm = build(name, hparams=hparams_of(name, is_flipped=flipped, mended=mended))
    z = 0.3 * torch.randn(9, 4)
    y, d = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    t, terms = 0.1, []
    for i in range(9):
        def weight(j, i=i):
            return math.exp(z[i] @ z[j] / t) if j != i else 1.0

        among = [j for j in range(9) if j != i and (name == "CAD" or y[j] == y[i])]
        own = [i] if name == "CAD" and not flipped and not mended else []
        part = [j for j in among + own if (d[j] == d[i]) != flipped]
        counts = any(y[j] == y[i] for j in (among if name == "CAD" else part))
        if counts and part:
            log_share = math.log(sum(map(weight, part)) / sum(map(weight, among)))
            terms.append((-1 if flipped else 1) * t / 0.07 * log_share)
    assert algorithm.bottleneck(z, y, d).item() == pytest.approx(
        sum(terms) / len(terms), rel=1e-4)


def test_cad_on_one_domain_has_no_bottleneck_and_a_finite_gradient():
    algorithm = build("CAD", n_domains=1, hparams=hparams_of("CAD"))
    values = algorithm.update(minibatches(n_domains=1))
    assert values["bn_loss"] == 0
    assert all(p.isfinite().all() for p in algorithm.parameters())


def test_a_projection_for_cads_bottleneck_is_trained():
    algorithm = build("CAD", hparams=hparams_of("CAD", is_project=True))
    before = algorithm.project[0].weight.clone()
    algorithm.update(minibatches())
    assert not torch.equal(before, algorithm.project[0].weight)


def test_the_adversary_of_transfer_is_brought_back_to_its_radius():
    from domainbed_kd.algorithms.transfer import project

    centre, inside, outside = (nn.Linear(3, 2) for _ in range(3))
    with torch.no_grad():
        for module, offset in ((inside, 0.1), (outside, 2.0)):
            for p, c in zip(module.parameters(), centre.parameters()):
                p.copy_(c + offset)
    kept = copy.deepcopy(inside.state_dict())
    for module in (inside, outside):
        project(module, centre, 1.0)
    assert all(torch.equal(kept[name], tensor) for name, tensor in inside.state_dict().items())
    offsets = [p - c for p, c in zip(outside.parameters(), centre.parameters())]
    torch.testing.assert_close(torch.cat([o.flatten() for o in offsets]),
                               torch.full((8,), 8**-0.5))


def test_transfer_with_gda_learns_only_when_mended():
    for mended in (False, True):
        algorithm = build("Transfer", hparams=hparams_of("Transfer", gda=True, mended=mended))
        before = algorithm.classifier.weight.clone()
        algorithm.update(minibatches())
        assert torch.equal(before, algorithm.classifier.weight) != mended


def test_the_projection_of_selfreg_is_trained_only_when_mended():
    for mended in (False, True):
        algorithm = build("SelfReg", hparams=hparams_of("SelfReg", mended=mended))
        before = algorithm.cdpl[0].weight.clone()
        algorithm.update(minibatches())
        assert torch.equal(before, algorithm.cdpl[0].weight) != mended


@pytest.mark.parametrize("mended, reset", [(False, []), (True, [3])])
def test_eqrm_starts_adam_afresh_at_a_fraction_only_when_mended(mended, reset):
    algorithm = build("EQRM", hparams=hparams_of("EQRM", eqrm_burnin_iters=2.5, mended=mended))
    optimizers = [algorithm.optimizer]
    for step in range(5):
        algorithm.update(minibatches(seed=step))
        optimizers.append(algorithm.optimizer)
    assert [i for i in range(5) if optimizers[i] is not optimizers[i + 1]] == reset


@pytest.mark.parametrize("name", ["IB_ERM", "IB_IRM"])
def test_the_nll_of_ib_is_the_cross_entropy_only_when_mended(name):
    anneal = {"ib_penalty_anneal_iters": 0, "irm_penalty_anneal_iters": 0}
    batches = minibatches()
    for mended in (False, True):
        algorithm = build(name, hparams=hparams_of(name, **anneal, mended=mended))
        nll = sum(F.cross_entropy(algorithm.predict(x), y).item() for x, y in batches) / 3
        values = {key: float(value) for key, value in algorithm.update(batches).items()}
        assert values["nll"] == pytest.approx(nll if mended else values["loss"], rel=1e-5)
        assert values["loss"] != pytest.approx(nll)


def test_the_inverse_hessian_of_trm_is_the_truncated_series():
    from domainbed_kd.algorithms.trm import inverse_hessian_product

    seed_everything(0)
    head, features, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    vector = 0.1 * torch.randn(2, 3)
    hessian = torch.func.hessian(
        lambda weight: F.cross_entropy(F.linear(features, weight, head.bias), y))(
        head.weight).reshape(6, 6).detach()
    powers = [torch.linalg.matrix_power(torch.eye(6) - hessian, k) for k in range(11)]
    for doubled, terms in ((False, powers), (True, [powers[1], *powers[1:]])):
        torch.testing.assert_close(
            inverse_hessian_product(head, features, y, vector, doubled).flatten(),
            sum(terms) @ vector.flatten(), rtol=1e-4, atol=1e-5)


def test_rdm_refuses_domains_of_unequal_batches():
    batches = minibatches()
    batches[1] = tuple(part[:4] for part in batches[1])
    with pytest.raises(ValueError, match=r"RDM: .* the same size, but they have \[4, 8\] images"):
        build("RDM").update(batches)


@pytest.mark.parametrize("output", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("shape", [(12,), (3, 16, 16), (3, 32, 32)])
def test_features_of_urm_lie_in_the_range_of_its_noise(shape, output):
    algorithm = build("URM", shape, hparams=hparams_of("URM", urm_generator_output=output))
    features = algorithm.featurizer(3 * torch.randn(4, *shape))
    assert features.min() >= (-1 if output == "tanh" else 0)
    if output != "relu":
        assert features.max() <= 1


def test_urm_refuses_an_output_without_an_activation():
    with pytest.raises(ValueError, match="urm_generator_output is 'identity'; it takes one of"):
        build("URM", hparams=hparams_of("URM", urm_generator_output="identity"))


def test_causirl_cuts_every_domain_once_and_loses_no_row():
    from domainbed_kd.algorithms.causirl_coral import random_mixtures

    features = [torch.arange(4.0)[:, None] + 10 * d for d in range(3)]
    seed_everything(0)
    first, second = random_mixtures(features)
    assert sorted(torch.cat([first, second]).flatten().tolist()) == sorted(
        torch.cat(features).flatten().tolist())
    for d in range(3):
        rows = [row for row in first.flatten().tolist() if row // 10 == d]
        assert rows == features[d].flatten().tolist()[:len(rows)] and len(rows) < 4


def test_a_penalty_of_zero_leaves_erm():
    """IB_ERM before its penalty sets in; its own terms are logged all the same."""
    erm, ib = (build(name, hparams=hparams_of(name)) for name in ("ERM", "IB_ERM"))
    for step in range(2):
        erm.update(minibatches(seed=step))
        values = ib.update(minibatches(seed=step))
    assert values["IB_penalty"] > 0
    for key, tensor in state_of(erm).items():
        torch.testing.assert_close(tensor, ib.state_dict()[key], rtol=0, atol=1e-5)
