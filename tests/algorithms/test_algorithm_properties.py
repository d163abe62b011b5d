"""What holds for every algorithm at whatever shapes, hparams and seeds hypothesis draws."""

import io
import math

import pytest
import torch
from conftest import seed_everything
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_algorithms import EARLY, Clip, assert_same, minibatches, state_of

from domainbed_kd import checkpoints, hparams_registry
from domainbed_kd.algorithms import ALGORITHMS, get_algorithm_class

SHAPES = [(3, 16, 16), (1, 28, 28), (2, 28, 28), (3, 28, 28), (3, 32, 32)]
# With its own terms weighed by 0, a method that distils trains as ERM does.
WEIGHTLESS = {
    "KD": {"kd_alpha": 0.0},
    "KDDG": {"kddg_alpha": 0.0, "kddg_filter": "none"},
    "SCMD": {"scmd_lambda1": 0.0, "scmd_lambda2": 0.0, "scmd_worst_case": 1.0, "scmd_sma": False},
    "MosaicKD": {"mosaic_kd": 0.0, "mosaic_ce": 1.0},
    "FourDs": {"fourds_div": 0.0, "fourds_beta": 0.0},
    "SDViT": {"sdvit_weight": 0.0},
}
N_STEPS = 5


def few(test):
    return settings(max_examples=2, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))(test)


def many(test):
    return pytest.mark.slow(settings(
        max_examples=20, deadline=None, database=None,
        suppress_health_check=list(HealthCheck))(test))


class Case:
    """An algorithm and its data, as drawn."""

    def __init__(self, name, draw, **hparams):
        self.name = name
        self.shape = draw(st.sampled_from(SHAPES), label="shape")
        self.n_classes = draw(st.integers(2, 4), label="classes")
        self.n_domains = draw(st.integers(2, 4), label="domains")
        self.size = draw(st.integers(4, 9), label="images per domain")
        self.seed = draw(st.integers(0, 2**31 - 1), label="seed")
        hparams_seed = draw(st.none() | st.integers(0, 2**31 - 1), label="hparams seed")
        self.hparams = (hparams_registry.default_hparams(name, "DigitsDG") if hparams_seed is None
                        else hparams_registry.random_hparams(name, "DigitsDG", hparams_seed))
        self.hparams |= {key: draw(st.integers(0, N_STEPS), label=key)
                         for key in self.hparams if key.endswith("iters")}
        self.hparams |= EARLY | {
            "class_names": [*"abcd"][:self.n_classes], "clip_model": Clip(),
            "batch_size": self.size, "wrn_depth": 10, "wrn_widen": 1,
            "nonlinear_classifier": draw(st.booleans(), label="nonlinear classifier"),
            "weight_decay": draw(st.sampled_from([0.0, 1e-3]), label="weight decay")}
        if get_algorithm_class(name).mends:
            self.hparams["mended"] = draw(st.booleans(), label="mended")
        self.hparams |= hparams

    def build(self, name=None, other_seed=0):
        seed_everything(self.seed + other_seed)
        return get_algorithm_class(name or self.name)(
            self.shape, self.n_classes, self.n_domains, dict(self.hparams))

    def batch(self, step):
        batches = minibatches(self.shape, self.n_domains, self.size, seed=self.seed + step)
        return [(x, (y + i) % self.n_classes) for i, (x, y) in enumerate(batches)]

    def train(self, algorithm, first, stop):
        return [algorithm.update(self.batch(step)) for step in range(first, stop)]


def values_of(updates):
    return [{key: float(value) for key, value in values.items()} for values in updates]


def check_that_it_trains_restarts_and_reloads(name, data):
    case = Case(name, data.draw)
    stopped = data.draw(st.integers(0, N_STEPS - 1), label="stopped after")
    whole = case.build()
    before = values_of(case.train(whole, 0, stopped))
    file = io.BytesIO()
    torch.save({"algorithm": checkpoints.algorithm_state(whole),
                "random": checkpoints.random_state()}, file)
    expected = values_of(case.train(whole, stopped, N_STEPS))
    assert all(map(math.isfinite, (v for values in before + expected for v in values.values())))

    restarted = case.build(other_seed=1)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    checkpoints.load_algorithm_state(restarted, state["algorithm"])
    checkpoints.set_random_state(state["random"])
    assert values_of(case.train(restarted, stopped, N_STEPS)) == expected
    assert_same(restarted.state_dict(), whole.state_dict())

    reloaded = case.build(other_seed=2)
    reloaded.load_state_dict(state_of(whole))
    logits = []
    for algorithm in (whole, reloaded):
        algorithm.eval()
        seed_everything(0)  # MTL draws when it predicts
        with torch.no_grad():
            logits.append(algorithm.predict(case.batch(99)[0][0]))
    assert logits[0].shape == (case.size, case.n_classes) and logits[0].isfinite().all()
    assert torch.equal(*logits)


def check_that_without_weight_it_is_erm(name, data):
    hparams = WEIGHTLESS[name] | {"teacher_steps": 0}
    case = Case(name, data.draw, **hparams)
    ours, erm = case.build(), case.build("ERM")
    seed_everything(case.seed)
    losses = [values["loss"] for values in values_of(case.train(ours, 0, N_STEPS))]
    seed_everything(case.seed)
    expected = [values["loss"] for values in values_of(case.train(erm, 0, N_STEPS))]
    if name == "KDDG":  # it sums over samples and then divides, where ERM takes the mean
        assert losses == pytest.approx(expected, rel=1e-3)
        return
    assert losses == expected
    for one, other in zip(ours.network.parameters(), erm.network.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ALGORITHMS)
@few
@given(data=st.data())
def test_it_trains_to_finite_numbers_restarts_to_the_bit_and_reloads(name, data):
    check_that_it_trains_restarts_and_reloads(name, data)


@pytest.mark.parametrize("name", ALGORITHMS)
@many
@given(data=st.data())
def test_so_it_does_in_many_more_cases(name, data):
    check_that_it_trains_restarts_and_reloads(name, data)


@pytest.mark.parametrize("name", [name for name in WEIGHTLESS if name in ALGORITHMS])
@few
@given(data=st.data())
def test_with_its_own_terms_weighed_by_0_it_is_erm(name, data):
    check_that_without_weight_it_is_erm(name, data)


@pytest.mark.parametrize("name", [name for name in WEIGHTLESS if name in ALGORITHMS])
@many
@given(data=st.data())
def test_so_it_is_in_many_more_cases(name, data):
    check_that_without_weight_it_is_erm(name, data)
