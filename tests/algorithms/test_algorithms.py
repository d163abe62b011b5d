import copy
import io
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, losses_in_double, seed_everything
from sklearn.metrics.pairwise import rbf_kernel
from torch import nn

from domainbed_kd import algorithms, checkpoints, hparams_registry
from domainbed_kd.algorithms import ALGORITHMS, get_algorithm_class

UPSTREAMS = [name for name in ALGORITHMS if name in golden("default_hparams.json")]
SMALL = (3, 16, 16)
# Events that would otherwise come after thousands of updates come within the first few here.
EARLY = {"linear_steps": 1, "teacher_steps": 2, "sma_start": 2, "scmd_sma_start": 2,
         "swad_interval": 2, "total_steps": 6, "eqrm_burnin_iters": 2, "iters": 2}
# SANDMask's default masks everything.
LEARNING = {"tau": 0.5}


class Clip(nn.Module):
    """A stand-in for CLIP without a download: bright images are near sentences on "bright"."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.visual = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.utils.skip_init(nn.Linear, 12, 8))
        self.visual[2].load_state_dict({"weight": torch.eye(8, 12), "bias": torch.zeros(8)})

    def tokenizer(self, texts):
        return torch.tensor([[1.0 if "bright" in text else -1.0, len(text)] for text in texts])

    def encode_text(self, tokens):
        return tokens[:, :1] + 0.1 * (tokens[:, 1:] * torch.arange(8)).sin()

    def encode_image(self, x):
        return self.visual(x)


def hparams_of(name, seed=0, **overrides):
    hparams = (hparams_registry.random_hparams(name, "DigitsDG", seed) if seed
               else hparams_registry.default_hparams(name, "DigitsDG"))
    context = {"total_steps": 20, "class_names": ["dark", "bright"], "clip_model": Clip()}
    return context | hparams | overrides


def mended(name):
    """The hparam that mends a defect in DomainBed's numbers, where there is one."""
    return {"mended": True} if get_algorithm_class(name).mends else {}


def build(name, input_shape=SMALL, n_domains=3, hparams=None, seed=1):
    seed_everything(seed)
    return get_algorithm_class(name)(input_shape, 2, n_domains, hparams or hparams_of(name))


def minibatches(shape=SMALL, n_domains=3, size=8, seed=0):
    """Noise whose mean is the class's, on a background that is the domain's."""
    r = torch.Generator().manual_seed(seed)
    batches = []
    for domain in range(n_domains):
        y = torch.randint(2, (size,), generator=r)
        x = torch.randn(size, *shape, generator=r) + 2 * y.view(-1, *[1] * len(shape)) - 1
        batches.append((x + 0.3 * (domain - 1), y))
    return batches


def state_of(algorithm):
    return {key: value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
            for key, value in algorithm.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[key], rtol=0, atol=0, msg=key, equal_nan=True)


def random_streams():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns_a_separable_problem(name):
    hparams = hparams_of(name, linear_steps=2, teacher_steps=5, lr=3e-3, **LEARNING)
    algorithm = build(name, hparams=hparams)
    for step in range(20):
        algorithm.update(minibatches(seed=step))
    algorithm.eval()
    with torch.no_grad():
        right = [(algorithm.predict(x).argmax(dim=1) == y).float().mean().item()
                 for x, y in minibatches(size=32, seed=99)]
    assert sum(right) / len(right) > 0.9


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_returns_numbers_without_gradient_and_predict_logits(name):
    algorithm = build(name, hparams=hparams_of(name, **EARLY))
    for step in range(4):
        values = algorithm.update(minibatches(seed=step))
        for value in values.values():
            assert type(value) is float or (value.numel() == 1 and not value.requires_grad)
            assert math.isfinite(value)
        assert any("loss" in key for key in values)  # DANN and SagNet split it, as in DomainBed
    algorithm.eval()
    for size in (1, 5):
        logits = algorithm.predict(torch.randn(size, *SMALL))
        assert logits.shape == (size, 2) and logits.isfinite().all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_same_seed_gives_the_same_weights_and_another_does_not(name):
    first, second, other = (build(name, seed=seed) for seed in (1, 1, 2))
    assert_same(first.state_dict(), second.state_dict())
    if checkpoints.optimizers(first) and name not in ("VL2VSD", "CLIPood"):  # they start as CLIP
        assert any(not torch.equal(a, b)
                   for a, b in zip(first.parameters(), other.parameters()))


def train(algorithm, steps):
    return [algorithm.update(minibatches(size=4, seed=step)) for step in steps]


# What sets in later does so before, at and after the restart.
RESTARTS = [(name, {key: at for key in anneal})
            for name in ALGORITHMS
            for anneal in [[key for key in hparams_of(name) if key.endswith("iters")]]
            for at in ((2, 3, 4) if anneal else (None,))]


@pytest.mark.parametrize(("name", "anneal"), RESTARTS)
def test_a_restarted_run_ends_in_the_same_bits(name, anneal):
    hparams = hparams_of(name, **(EARLY | anneal))
    whole = build(name, hparams=hparams)
    train(whole, range(3))

    file = io.BytesIO()
    torch.save({"algorithm": checkpoints.algorithm_state(whole),
                "random": checkpoints.random_state()}, file)
    expected = train(whole, range(3, 6))

    restarted = build(name, hparams=hparams, seed=5)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    checkpoints.load_algorithm_state(restarted, state["algorithm"])
    checkpoints.set_random_state(state["random"])
    assert train(restarted, range(3, 6)) == expected
    assert_same(restarted.state_dict(), whole.state_dict())


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_random_hparams_survive_json_and_run(name, seed):
    drawn = hparams_registry.random_hparams(name, "Debug28", seed)
    hparams = hparams_of(name) | json.loads(json.dumps(drawn))
    hparams["batch_size"] = min(hparams["batch_size"], 4)
    algorithm = build(name, (3, 28, 28), hparams=hparams)
    values = algorithm.update(minibatches((3, 28, 28), size=hparams["batch_size"]))
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize(("shape", "network"), [
    ((2, 28, 28), {}), ((3, 32, 32), {"wrn_depth": 10, "wrn_widen": 1})])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_takes_images_of_other_shapes(name, shape, network):
    algorithm = build(name, shape, hparams=hparams_of(name, **network))
    values = algorithm.update(minibatches(shape, size=2))
    assert all(math.isfinite(value) for value in values.values())
    algorithm.eval()
    assert algorithm.predict(torch.randn(2, *shape)).shape == (2, 2)


@pytest.mark.parametrize("n_domains", [1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_or_two_training_domains_are_enough_to_learn_from(name, n_domains):
    hparams = hparams_of(
        name, linear_steps=0, teacher_steps=0, d_steps_per_g_step=1, **LEARNING, **mended(name))
    algorithm = build(name, n_domains=n_domains, hparams=hparams)
    if not checkpoints.optimizers(algorithm):
        pytest.skip("it trains nothing: zero-shot")
    before = [p.clone() for p in algorithm.network.parameters()]
    for step in range(3):
        values = algorithm.update(minibatches(n_domains=n_domains, size=4, seed=step))
        assert all(math.isfinite(value) for value in values.values())
    assert any(not torch.equal(old, new)
               for old, new in zip(before, algorithm.network.parameters()))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_evaluating_draws_no_random_numbers_and_changes_nothing(name):
    algorithm = build(name, hparams=hparams_of(name, **EARLY, **mended(name)))
    train(algorithm, range(3))
    algorithm.eval()
    x = minibatches(seed=9)[0][0]
    state, streams = state_of(algorithm), random_streams()
    with torch.no_grad():
        first, second = algorithm.predict(x), algorithm.predict(x)
    assert torch.equal(first, second)
    assert random_streams() == streams
    assert_same(algorithm.state_dict(), state)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unlabeled_images_may_be_given(name):
    unlabeled = [torch.randn(8, *SMALL, generator=torch.Generator().manual_seed(7))]
    results = []
    for given in (None, unlabeled):
        algorithm = build(name)
        seed_everything(2)
        results.append((algorithm.update(minibatches(), given), state_of(algorithm)))
    assert all(math.isfinite(value) for value in results[1][0].values())
    if name in UPSTREAMS:  # none of DomainBed's reads them
        assert results[0][0] == results[1][0]
        assert_same(results[0][1], results[1][1])


@pytest.fixture
def same_draws(monkeypatch):
    """Noise is drawn on the CPU whatever its device, and equal labels keep their order."""
    rand, randn_like, sort = torch.rand, torch.randn_like, torch.Tensor.sort
    monkeypatch.setattr(torch, "rand", lambda *size, device=None, **options: rand(
        *size, **options).to(device or "cpu"))
    monkeypatch.setattr(torch, "randn_like", lambda x: randn_like(x, device="cpu").to(x.device))
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, dim=-1: sort(
        x, dim=dim, stable=True))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ALGORITHMS)
def test_cuda_gives_the_losses_that_the_cpu_gives(name, same_draws):
    losses = []
    for device in ("cpu", "cuda"):
        algorithm = build(name)
        seed_everything(2)
        losses.append(losses_in_double(
            algorithm, [minibatches(seed=0), minibatches(seed=1)], device))
    for on_cpu, on_gpu in zip(*losses):
        assert on_gpu == pytest.approx(on_cpu, rel=1e-6, abs=1e-9)


def test_an_algorithm_of_ones_own_can_be_registered(monkeypatch):
    monkeypatch.setattr(algorithms, "ALGORITHMS", list(ALGORITHMS))
    monkeypatch.setattr(algorithms, "_REGISTERED", {})

    @algorithms.register
    class Mine(algorithms.ERM):
        pass

    assert get_algorithm_class("Mine") is Mine and "Mine" in algorithms.ALGORITHMS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_mends_nothing_refuses_to_be_mended(name):
    hparams = hparams_of(name, mended=True)
    if get_algorithm_class(name).mends:
        assert build(name, hparams=hparams).hparams["mended"]
    else:
        with pytest.raises(ValueError, match="mended is true, but there is nothing to fix"):
            build(name, hparams=hparams)


def test_an_unknown_name_is_refused_with_the_nearest_known():
    with pytest.raises(NotImplementedError, match="not found: CORL. Did you mean CORAL?"):
        get_algorithm_class("CORL")


# What single methods compute, against the same written another way.


def test_fishrs_closed_form_is_the_variance_of_per_sample_gradients():
    from domainbed_kd.algorithms.fishr import gradient_variance

    seed_everything(0)
    features, y = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 2, 0, 1])
    classifier = nn.Linear(4, 3).double()
    gradients = []
    for f, label in zip(features, y):
        loss = F.cross_entropy(classifier(f), label)
        weight, bias = torch.autograd.grad(loss, (classifier.weight, classifier.bias))
        gradients.append(torch.cat([weight, bias[:, None]], dim=1).flatten())
    torch.testing.assert_close(
        gradient_variance(features, classifier(features), y),
        torch.stack(gradients).var(dim=0, correction=0))


def test_fishrs_variance_of_a_nonlinear_classifier_is_that_of_per_sample_gradients():
    from domainbed_kd.algorithms.fishr import gradient_variance, per_sample_gradient_variance

    seed_everything(0)
    features, y = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 2, 0, 1])
    deep = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(
        F.cross_entropy(deep(f), label), deep.parameters())]) for f, label in zip(features, y)]
    torch.testing.assert_close(per_sample_gradient_variance(deep, features, y),
                               torch.stack(gradients).var(dim=0, correction=0))

    linear = nn.Linear(4, 3).double()
    closed = gradient_variance(features, linear(features), y).view(3, 5)  # the last is the bias's
    torch.testing.assert_close(per_sample_gradient_variance(linear, features, y),
                               torch.cat([closed[:, :-1].flatten(), closed[:, -1]]))


@pytest.mark.parametrize("n", [1, 2, 10, 13, 16, 40, 64, 160, 256])
@pytest.mark.parametrize("q", [0.0, 50.0, (1 - 1 / 3) * 100, 87.65, 100.0])
def test_rscs_percentile_mutes_what_numpys_mutes(n, q):
    from domainbed_kd.algorithms.rsc import percentile

    values = np.random.RandomState(n).standard_normal((20, n)).astype(np.float32)
    expected = values < np.percentile(values, q, axis=1, keepdims=True).astype(np.float32)
    ours = torch.from_numpy(values)
    assert ((ours < percentile(ours, q)).numpy() == expected).all()


def test_irms_penalty_is_the_product_of_the_halves_gradients():
    from domainbed_kd.losses import invariance_penalty

    seed_everything(0)
    logits, y = torch.randn(10, 3), torch.randint(3, (10,))
    # d/ds CE(s z, y) at s = 1 is the mean of <softmax(z) - onehot(y), z>.
    gradient = ((logits.softmax(dim=1) - F.one_hot(y, 3)) * logits).sum(dim=1)
    expected = gradient[::2].mean() * gradient[1::2].mean()
    torch.testing.assert_close(invariance_penalty(logits, y), expected)


def test_corals_distance_is_that_of_numpys_moments():
    from domainbed_kd.losses import moment_distance

    seed_everything(0)
    a, b = torch.randn(9, 4).double(), torch.randn(7, 4).double() * 2 + 1
    means = np.square(a.numpy().mean(0) - b.numpy().mean(0)).mean()
    covariances = np.square(np.cov(a.numpy().T) - np.cov(b.numpy().T)).mean()
    assert moment_distance(a, b).item() == pytest.approx(means + covariances)


def test_mmds_distance_is_that_of_scikit_learns_kernels():
    from domainbed_kd.losses import BANDWIDTHS, squared_mmd

    seed_everything(0)
    a, b = torch.randn(9, 4).double(), torch.randn(7, 4).double() + 1

    def mean(x, y):
        return sum(rbf_kernel(x.numpy(), y.numpy(), gamma=gamma).mean() for gamma in BANDWIDTHS)

    assert squared_mmd(a, b).item() == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b))


def test_mmd_has_finite_gradients_where_features_coincide():
    from domainbed_kd.losses import squared_mmd

    a = torch.zeros(3, 4, requires_grad=True)
    squared_mmd(a, a.detach().clone()).backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_mixup_pairs_all_domains_in_one_circle(n):
    from domainbed_kd.algorithms.mixup import cyclic_pairs

    seed_everything(n)
    following = dict(cyclic_pairs(list(range(n))))
    circle = list(itertools.accumulate(range(n - 1), lambda i, _: following[i], initial=0))
    assert sorted(circle) == list(range(n)) and following[circle[-1]] == 0


def test_groupdros_q_follows_the_exponentiated_losses():
    algorithm = build("GroupDRO", hparams=hparams_of("GroupDRO", groupdro_eta=0.5))
    batches = minibatches()
    losses = torch.stack([F.cross_entropy(algorithm.predict(x), y) for x, y in batches])
    expected = (0.5 * losses.detach()).softmax(dim=0)
    loss = algorithm.update(batches)["loss"]
    torch.testing.assert_close(algorithm.q, expected)
    assert loss == pytest.approx((expected * losses).sum().item())


def test_fish_that_goes_all_the_way_is_adam_on_one_domain_after_the_other():
    fish = build("Fish", hparams=hparams_of("Fish", meta_lr=1.0))
    expected = copy.deepcopy(fish.network.net)
    optimizer = torch.optim.Adam(expected.parameters(), lr=fish.hparams["lr"])
    for step in range(2):
        fish.update(minibatches(seed=step))
        for x, y in minibatches(seed=step):
            optimizer.zero_grad()
            F.cross_entropy(expected(x), y).backward()
            optimizer.step()
    for one, other in zip(fish.network.parameters(), expected.parameters()):
        torch.testing.assert_close(one, other)


def test_fish_that_goes_nowhere_stays():
    fish = build("Fish", hparams=hparams_of("Fish", meta_lr=0.0))
    before = state_of(fish)
    fish.update(minibatches())
    assert_same(fish.state_dict(), before)


@pytest.mark.parametrize(("name", "weight"), [("IRM", "irm_lambda"), ("VREx", "vrex_lambda")])
def test_annealing_changes_the_weight_and_starts_adam_afresh(name, weight):
    anneal = {f"{name.lower()}_penalty_anneal_iters": 2, weight: 50.0}
    algorithm = build(name, hparams=hparams_of(name, **anneal))
    optimizers = []
    for step, expected in enumerate((1, 1, 50, 50)):
        batches = minibatches(seed=step)
        nll = sum(F.cross_entropy(algorithm.predict(x), y).item() for x, y in batches) / 3
        values = algorithm.update(batches)
        loss, penalty = float(values["loss"]), float(values["penalty"])
        assert loss == pytest.approx(nll + expected * penalty, abs=1e-5)
        optimizers.append(algorithm.optimizer)
    assert optimizers[0] is optimizers[1] is not optimizers[2] is optimizers[3]
