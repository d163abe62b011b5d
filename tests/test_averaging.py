import copy
import warnings

import clips
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import golden, seed_everything
from torch import nn

from domainbed_kd import averaging, hparams_registry
from domainbed_kd.algorithms import ALGORITHMS, get_algorithm_class
from domainbed_kd.algorithms.base import Algorithm

UPSTREAMS = [name for name in ALGORITHMS if name in golden("default_hparams.json")]
AVERAGEABLE = [name for name in UPSTREAMS
               if not getattr(get_algorithm_class(name), "averages_weights", False)]


class Toy(Algorithm):
    """A linear classifier behind BatchNorm, trained with momentum."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.network = nn.Sequential(
            nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, num_classes))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.3, momentum=0.9)

    def update(self, minibatches, unlabeled=None):
        x, y = (torch.cat(part) for part in zip(*minibatches))
        return self.descend(F.cross_entropy(self.predict(x), y))

    def predict(self, x):
        return self.network(x)


def toy(kind, **hparams):
    torch.manual_seed(0)
    return averaging.averaged(Toy, kind)((4,), 3, 2, hparams)


def toy_minibatches(step, n_domains=2):
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(6, 4, generator=generator) + i,
             torch.randint(3, (6,), generator=generator)) for i in range(n_domains)]


def weights_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def offline_mean(states):
    return {name: torch.stack([state[name] for state in states]).mean(0)
            if states[0][name].is_floating_point() else states[-1][name] for name in states[0]}


@pytest.mark.parametrize("start", [1, 4, 9])
def test_the_moving_average_is_the_mean_of_all_weights_since_its_start(start):
    algorithm = toy(None)
    average, seen = averaging.MovingAverage(algorithm.network, start), []
    for step in range(12):
        algorithm.update(toy_minibatches(step))
        average.update(algorithm.network)
        seen.append(weights_of(algorithm.network))
        expected = offline_mean(seen[start - 1:]) if step + 1 >= start else seen[-1]
        torch.testing.assert_close(weights_of(average.network), expected)


def test_a_restarted_average_knows_nothing_of_earlier_weights():
    algorithm = toy(None)
    average = averaging.MovingAverage(algorithm.network)
    for step in range(3):
        algorithm.update(toy_minibatches(step))
        average.update(algorithm.network)
    average.restart()
    algorithm.update(toy_minibatches(3))
    average.update(algorithm.network)
    assert_same(weights_of(average.network), weights_of(algorithm.network))


def test_the_average_is_no_view_of_the_network_and_asks_for_no_gradient():
    network = nn.Linear(2, 2)
    average = averaging.MovingAverage(network)
    average.update(network)
    before = weights_of(average.network)
    nn.init.zeros_(network.weight)
    assert_same(weights_of(average.network), before)
    assert not any(p.requires_grad for p in average.parameters())


def test_inside_in_place_of_the_network_computes_with_the_average_and_afterwards_as_before():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    average = averaging.MovingAverage(network).eval()
    for tensor in average.network.state_dict().values():
        tensor.add_(1)
    x = torch.randn(5, 3)
    live, mean = network(x), average(x)
    parameters = list(network.parameters())
    with pytest.raises(KeyboardInterrupt), average.in_place_of(network):
        assert_same(network(x), mean)
        raise KeyboardInterrupt
    assert_same(network(x), live)
    assert list(map(id, network.parameters())) == list(map(id, parameters))
    assert_same(average(x), mean)
    assert not torch.equal(live, mean)


def test_what_is_computed_in_place_of_the_network_has_the_averages_gradients_outside_too():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    average = averaging.MovingAverage(network)
    for tensor in average.network.state_dict().values():
        tensor.add_(1)
    x = torch.randn(5, 3, requires_grad=True)
    with average.in_place_of(network):
        y = network(x)
    found, = torch.autograd.grad(y.sum(), x)
    expected, = torch.autograd.grad(average(x).sum(), x)
    assert torch.equal(found, expected)


def test_sma_predicts_with_the_average_and_trains_with_the_live_network():
    algorithm, plain, seen = toy("sma", sma_start=3), toy(None), []
    for step in range(8):
        torch.manual_seed(step)
        ours = algorithm.update(toy_minibatches(step))
        torch.manual_seed(step)
        assert ours == plain.update(toy_minibatches(step))
        seen.append(weights_of(plain.network))
    x = torch.randn(5, 4)
    plain.network.load_state_dict(offline_mean(seen[1:]))  # from the weights before update 3
    torch.testing.assert_close(algorithm.eval().predict(x), plain.eval().predict(x))


@pytest.mark.parametrize("start", [0, 1, 2, 5])
def test_sma_averages_as_the_published_class_counts(start):
    algorithm = toy("sma", sma_start=start)
    expected, count = weights_of(algorithm.network), 0
    for step in range(1, 9):
        algorithm.update(toy_minibatches(step))
        count += step >= start
        for name, new in weights_of(algorithm.network).items():
            if new.is_floating_point():
                expected[name] = (expected[name] * count + new) / (1 + count) if count else new
    averaged = algorithm.average.network.state_dict()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(averaged[name], tensor)


@pytest.mark.parametrize("n_steps, start", [(5001, 99), (5, 0), (200, 3), (15001, 299)])
def test_sma_begins_after_two_percent_of_the_run(n_steps, start):
    assert toy("sma", total_steps=n_steps).average.start == start  # updates, the first is 1


def test_a_short_run_is_averaged_unless_the_start_that_is_given_is_too_late():
    x = torch.randn(5, 4)
    for start, words in ((None, None), (5, None), (6, "Toy: its average begins after update 5")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            algorithm = toy("sma", total_steps=5, sma_start=start)
        assert [str(each.message)[:38] for each in caught] == ([words] if words else [])
        for step in range(5):
            algorithm.update(toy_minibatches(step))
        live = algorithm.eval().network(x)
        assert torch.equal(algorithm.predict(x), live) == bool(words)


@pytest.mark.parametrize("name, hparams", [
    ("SMA", {"sma_start": 7}), ("WAKD", {"wakd_start": 6}), ("SCMD", {"scmd_sma_start": 7}),
    ("SCMD", {"scmd_published": True})])
def test_each_method_with_an_average_of_its_own_warns_if_it_begins_too_late(name, hparams):
    with pytest.warns(UserWarning, match=f"{name}: its average begins after update .* of 6, so"):
        clips.make(name, total_steps=6, **hparams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clips.make(name, total_steps=400, **hparams)


def test_the_beta_average_warns_too_and_a_start_that_is_no_update_is_refused():
    with pytest.warns(UserWarning, match="Toy: its average begins after update 4 of 4, so"):
        toy("beta", total_steps=4, beta_start=4)
    for kind, name, value in (("sma", "sma_start", -1), ("sma", "sma_start", "x"),
                              ("beta", "beta_start", 0.5)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; it takes a whole number"):
            toy(kind, total_steps=4, **{name: value})


@pytest.mark.parametrize(("beta", "mean"), [(0.5, 6.637119), (0.1, 6.981379), (1, 6.2)])
def test_the_beta_average_of_numbers_is_the_official_codes(beta, mean):
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    average = averaging.BetaAverage(network, n_steps=4, beta=beta)
    for value in (2.0, 4.0, 8.0, 16.0):
        nn.init.constant_(network.weight, value)
        average.update(network)
    assert average.network.weight.item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(("beta", "density"), [
    (0.5, [1.061033, 0.694609, 0.636620, 0.694609, 1.061033]),
    (0.1, [0.442989, 0.206640, 0.176630, 0.206640, 0.442989])])
def test_an_iterate_weighs_as_in_the_official_code(beta, density):
    average = averaging.BetaAverage(nn.Linear(1, 1), n_steps=4, beta=beta)
    so_far = np.cumsum(density)
    assert [average.parts(n) for n in range(5)] == pytest.approx(so_far / density, rel=2e-5)


@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 3.0])
def test_the_beta_average_is_the_mean_of_all_weights_by_scipys_density(beta, start):
    algorithm = toy("beta", total_steps=12, beta_average=beta, beta_start=start)
    seen = [weights_of(algorithm.network)]
    for step in range(12):
        algorithm.update(toy_minibatches(step))
        seen.append(weights_of(algorithm.network))
    seen = seen[start:]
    density = scipy.stats.beta.pdf((np.arange(len(seen)) + 0.5) / len(seen), beta, beta)
    for name, tensor in algorithm.average.network.state_dict().items():
        if tensor.is_floating_point():
            values = np.stack([state[name].double().numpy() for state in seen])
            expected = np.average(values, axis=0, weights=density)
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_beta_average_of_a_network_in_half_precision_is_not():
    network = nn.Linear(2, 2).half()
    average = averaging.BetaAverage(network, 3, 0.5)
    average.update(network)
    assert {p.dtype for p in average.parameters()} == {torch.float32}


def test_the_beta_average_needs_to_know_the_number_of_steps_and_a_density():
    with pytest.raises(ValueError, match="'beta', which needs .*hparams\\['total_steps'\\]"):
        toy("beta")
    with pytest.raises(ValueError, match="beta_average is 0; it takes a number above 0"):
        toy("beta", total_steps=3, beta_average=0)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return [[(torch.randn(4, 3, 28, 28, generator=generator),
              torch.randint(2, (4,), generator=generator)) for _ in range(3)] for _ in range(3)]


def trained(name, kind, images, **overrides):
    """The algorithm after 3 updates, each followed by the hook and an evaluation."""
    hparams = hparams_registry.default_hparams(name, "Debug28") | {
        "batch_size": 4, "total_steps": 3, "sma_start": 2, "swad_interval": 1, "swad_n_converge": 1}
    hparams |= overrides
    seed_everything(1)
    algorithm = averaging.averaged(get_algorithm_class(name), kind)((3, 28, 28), 2, 3, hparams)

    def validate(predict):
        algorithm.eval()
        with torch.no_grad():
            loss = sum(F.cross_entropy(predict(x), y).item() for x, y in images[0])
        algorithm.train()
        return loss

    values = []
    for step, minibatches in enumerate(images):
        values.append(algorithm.update(minibatches))
        algorithm.checkpoint(step, step == 2, validate, lambda n: iter(images[:n]))
    return algorithm, values


@pytest.mark.parametrize("kind", averaging.KINDS)
@pytest.mark.parametrize("name", AVERAGEABLE)
def test_averaging_leaves_the_live_trajectory_and_the_random_streams_as_they_are(
        name, kind, images):
    plain, expected = trained(name, None, images)
    streams = torch.get_rng_state(), np.random.get_state()[1]
    algorithm, values = trained(name, kind, images)
    assert values == expected
    assert_same(weights_of(algorithm.network), weights_of(plain.network))
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1] == streams[1]).all()


@pytest.mark.parametrize("kind", averaging.KINDS)
@pytest.mark.parametrize("name", AVERAGEABLE)
def test_only_the_network_is_averaged_and_the_average_is_what_predicts(name, kind, images):
    mends = get_algorithm_class(name).mends  # MTL else predicts with noise
    algorithm, _ = trained(name, kind, images, **({"mended": True} if mends else {}))
    assert algorithm.average.network.state_dict().keys() == algorithm.network.state_dict().keys()
    x = images[0][0][0]
    algorithm.eval()
    before = weights_of(algorithm.network)
    with torch.no_grad():
        averaged = algorithm.predict(x)
        assert_same(weights_of(algorithm.network), before)
        algorithm.network.load_state_dict(algorithm.average.network.state_dict())
        assert_same(averaged, super(type(algorithm).__mro__[1], algorithm).predict(x))


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n in ("SMA", "SWAD")])
def test_a_row_of_its_own_is_erm_averaged(name):
    row, made = get_algorithm_class(name), averaging.averaged(get_algorithm_class("ERM"),
                                                              name.lower())
    for method in ("update", "predict", "checkpoint", "__init__"):
        assert getattr(row, method) is getattr(made, method)
    assert row.search_space("VLCS").keys() == made.search_space("VLCS").keys()
    assert row.selects_last == made.selects_last == (name == "SWAD")


def test_without_a_kind_the_class_is_returned_as_it_is():
    assert averaging.averaged(Toy, None) is Toy


def test_an_unknown_kind_is_refused_and_the_known_are_named():
    with pytest.raises(ValueError, match="'ema'; known are sma, swad, beta"):
        averaging.averaged(Toy, "ema")


@pytest.mark.parametrize("name", ["SMA", "SWAD", "ERMPlusPlus"])
def test_what_averages_its_weights_already_is_not_averaged_again(name):
    with pytest.raises(ValueError, match=f"{name} averages its weights already"):
        averaging.averaged(get_algorithm_class(name), "sma")


@pytest.mark.parametrize("kind", ["sma", "beta"])
def test_a_reloaded_average_goes_on_as_if_never_interrupted(kind):
    quiet, restarted = (toy(kind, sma_start=3, total_steps=10) for _ in range(2))
    for step in range(6):
        quiet.update(toy_minibatches(step))
    states = copy.deepcopy((quiet.state_dict(), quiet.optimizer.state_dict()))
    restarted.load_state_dict(states[0])
    restarted.optimizer.load_state_dict(states[1])
    for algorithm in (quiet, restarted):
        torch.manual_seed(5)
        for step in range(6, 10):
            algorithm.update(toy_minibatches(step))
    assert_same(quiet.state_dict(), restarted.state_dict())
