import copy
import io
import math

import numpy as np
import pytest
import torch
from test_averaging import (
    assert_same,
    offline_mean,
    toy,
    toy_minibatches,
    weights_of,
)
from torch import nn

from domainbed_kd import averaging
from domainbed_kd.hparams_registry import default_hparams
from domainbed_kd.loss_valley import LossValley, Segment

NOISE = torch.Generator().manual_seed(0)
LOSSES = {
    "monotone fall": [2 - 0.05 * i for i in range(30)],
    "valley, then rise": [abs(i - 10) / 10 + 0.5 for i in range(40)],
    "narrow valley": [(i - 8) ** 2 / 4 + 1 for i in range(24)],
    "noise": (1 + 0.3 * torch.randn(60, generator=NOISE)).tolist(),
    "noisy valley": (0.5 + (torch.arange(60) / 25 - 1) ** 2
                     + 0.1 * torch.rand(60, generator=NOISE)).tolist(),
    "a peak before convergence": [1.0, 0.9, 9.0, 0.8, 0.7, 0.6, 0.8, 0.8, 0.8, 0.9, 0.9, 0.7],
    "constant": [1.0] * 15,
    "a fall, then constant": [3.0, 2.0, 1.5] + [1.0] * 15,
    "dead and alive again": [1.0, 1.1, 1.2] + [5.0] * 8 + [0.1] * 8,
    "ends before the queue is full": [1.0, 0.5, 0.6, 0.7],
    "never converges": [1.0, 0.9, 0.8],
    "one segment": [1.0],
}
SETTINGS = [(3, 6, 0.3), (3, 6, 0.0), (3, 6, 0.2), (2, 5, 0.1), (3, 3, 0.3), (1, 4, 0.5)]


def naive(losses, n_converge, n_tolerance, ratio):
    """(averaged segments, index of the converged one, threshold, dead), by looking at all losses.

    Without any averaged segment the converged one is the result.

    The card's rules read as statements on indices: no queue, no running state.
    """
    n = len(losses)
    candidates = [k for k in range(n - n_converge + 1)
                  if losses[k] == min(losses[k:k + n_converge])]
    if not candidates:
        return [n - 1], None, None, False
    k = candidates[0]
    seen = k + n_converge - 1  # the evaluation at which convergence shows
    threshold = math.fsum(losses[k:k + n_converge]) / n_converge * (1 + ratio)

    oldest = max(0, seen - n_tolerance + 1)
    candidates = range(oldest, min(oldest + n_tolerance - n_converge, seen) + 1)
    first = max((i + 1 for i in candidates if losses[i] > threshold), default=oldest)
    averaged = [*range(first + 1, candidates[-1] + 1)]

    last_oldest = max(0, n - n_tolerance)
    for t in range(seen + 1, n):
        oldest = max(0, t - n_tolerance + 1)
        if oldest >= k:
            if min(losses[oldest:t + 1]) > threshold:
                return averaged, k, threshold, True
            averaged.append(oldest)
    for i in range(last_oldest + 1, n):
        if min(losses[i:]) > threshold:
            break
        averaged.append(i)
    return averaged, k, threshold, False


def segment(i, loss):
    """The i-th segment, 10 steps long; a power of 2 as weight, so that a mean tells which."""
    weights = {"w": torch.tensor([2.0**i], dtype=torch.float64), "n": torch.tensor(i)}
    return Segment(weights, start=10 * i, end=10 * i + 9, loss=loss)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:SWAD")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_segments_thresholds_and_steps_equal_a_naive_reading_of_the_rules(name, settings):
    valley = LossValley(*settings)
    for i, loss in enumerate(LOSSES[name]):
        valley.add(segment(i, loss))
    mean = valley.finish()
    averaged, converged, threshold, dead = naive(LOSSES[name], *settings)
    assert valley.averaged == [(10 * i, 10 * i + 9) for i in averaged]
    assert valley.converged_at == (None if converged is None else 10 * converged + 9)
    assert valley.threshold == (threshold and pytest.approx(threshold, rel=1e-12))
    assert valley.dead == dead
    averaged = averaged or [converged]
    torch.testing.assert_close(mean["w"].item(), sum(2.0**i for i in averaged) / len(averaged))


ALTERNATING = [1.1, 1.2] * 7


@pytest.mark.filterwarnings("ignore:SWAD")
@pytest.mark.parametrize(("losses", "converged", "threshold", "averaged", "result", "dead"), [
    pytest.param([5, 4, 3, 2, 1, *ALTERNATING[:9]], 4, 1.43, range(4, 14), 1636.8, False, id="A"),
    pytest.param([5 - 0.3 * i for i in range(14)], None, None, [13], 2.0**13, False, id="B"),
    pytest.param([5, 4, 3, 2, 1, 1.1, 1.2, 2, 3, 4, 5, 6, 7, 8], 4, 1.43, [4, 5, 6], 37.333333,
                 True, id="C"),
    pytest.param([1, *ALTERNATING[:9]], 0, 1.43, [1, 2, 0, 0, *range(10)], 73.642857, False,
                 id="D"),
    pytest.param([1.3, 1.2, 1.1, 1.0, *[1.05, 1.06] * 3, 1.05], 3, 1.347667,
                 [1, 2, 3, *range(3, 11)], 186.727273, False, id="E"),
])
def test_it_averages_what_the_authors_code_averages(
        losses, converged, threshold, averaged, result, dead):
    valley = LossValley()
    for i, loss in enumerate(losses):
        valley.add(segment(i, loss))
    mean = valley.finish()["w"].item()
    assert valley.averaged == [(10 * i, 10 * i + 9) for i in averaged]
    assert valley.converged_at == (None if converged is None else 10 * converged + 9)
    assert valley.threshold == (threshold and pytest.approx(threshold, rel=1e-6))
    assert mean == pytest.approx(result, rel=1e-7) and valley.dead == dead


@pytest.mark.filterwarnings("ignore:SWAD")
def test_on_random_losses_it_averages_what_a_naive_reading_of_the_rules_averages():
    r = np.random.RandomState(0)
    for _ in range(1000):
        n_tolerance = r.randint(1, 9)
        settings = r.randint(1, n_tolerance + 1), n_tolerance, r.choice([0.0, 0.1, 0.3, 1.0])
        losses = r.choice([0.8, 1.0, 1.2, 1.5, 2.0], size=r.randint(5, 41)).tolist()
        valley = LossValley(*settings)
        for i, loss in enumerate(losses):
            valley.add(segment(i, loss))
        mean = valley.finish()["w"].item()
        averaged, converged, _, dead = naive(losses, *settings)
        assert valley.averaged == [(10 * i, 10 * i + 9) for i in averaged]
        assert valley.dead == dead
        averaged = averaged or [converged]
        assert mean == pytest.approx(sum(2.0**i for i in averaged) / len(averaged))


def test_if_nothing_is_added_after_convergence_the_converged_segment_is_the_result():
    valley = LossValley(n_converge=1, n_tolerance=1)
    valley.add(segment(0, 1.0))
    valley.add(segment(1, 9.0))
    assert valley.dead and valley.averaged == []
    assert_same(valley.finish(), segment(0, 1.0).weights)


def test_a_run_begun_under_other_rules_does_not_go_on_but_a_finished_one_still_loads():
    valley = LossValley()
    valley.add(segment(0, 1.0))
    old = valley.get_extra_state()
    del old["rules"]
    with pytest.raises(ValueError, match="averaged other segments.*--resume never"):
        LossValley().set_extra_state(old)
    LossValley().set_extra_state(old | {"segments": [], "averaged": [(0, 9)]})


def test_the_scripts_reach_every_end_that_a_run_can_have():
    ends = {naive(losses, 3, 6, 0.3)[1:] for losses in LOSSES.values()}
    assert {(converged is None, dead) for converged, _, dead in ends} == {
        (True, False), (False, True), (False, False)}


def test_with_a_constant_loss_the_average_is_the_offline_mean_of_the_segments():
    valley, saved = LossValley(), []
    for i, loss in enumerate(LOSSES["a fall, then constant"]):
        saved.append(segment(i, loss))
        valley.add(saved[-1])
    mean = valley.finish()
    by_steps = {(s.start, s.end): s.weights["w"] for s in saved}
    assert set(valley.averaged) >= {(s.start, s.end) for s in saved[3:]}
    torch.testing.assert_close(
        mean["w"], torch.stack([by_steps[steps] for steps in valley.averaged]).mean(0))


def test_without_convergence_the_last_segment_is_the_model_and_a_warning_says_so():
    valley = LossValley()
    for i, loss in enumerate(LOSSES["never converges"]):
        valley.add(segment(i, loss))
    with pytest.warns(UserWarning, match="never converged"):
        assert_same(valley.finish(), segment(2, 0.8).weights)


@pytest.mark.parametrize(
    "name", ["valley, then rise", "noise", "a fall, then constant", "dead and alive again"])
def test_a_valley_saved_at_any_time_ends_in_the_same_average(name):
    losses, quiet, states = LOSSES[name], LossValley(), []
    for i, loss in enumerate(losses):
        states.append(through_a_file(quiet.state_dict()))
        quiet.add(segment(i, loss))
    expected = quiet.finish()
    for first, state in enumerate(states):
        valley = LossValley()
        valley.load_state_dict(state)
        for i, loss in enumerate(losses[first:], first):
            valley.add(segment(i, loss))
        assert_same(valley.finish(), expected)
        assert valley.averaged == quiet.averaged


def test_a_loaded_valley_does_not_write_into_the_state_it_came_from():
    valley, other = LossValley(), LossValley()
    for i in range(4):
        valley.add(segment(i, 1.0))
    state = valley.state_dict()
    before = copy.deepcopy(state)
    other.load_state_dict(state)
    other.add(segment(4, 1.0))
    assert_same(state, before)


@pytest.mark.parametrize("name", LOSSES)
def test_never_more_segments_are_kept_than_the_tolerance(name):
    valley = LossValley(2, 4)
    for i, loss in enumerate(LOSSES[name]):
        valley.add(segment(i, loss))
        assert len(valley.get_extra_state()["segments"]) <= 4
    if valley.converged_at is not None:
        valley.finish()
        assert valley.get_extra_state()["segments"] == []
        assert valley.get_extra_state()["mean"] == {}


@pytest.mark.parametrize("settings", [(0, 6, 0.3), (4, 3, 0.3), (3, 6, -0.1)])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match="1 <= n_converge <= n_tolerance"):
        LossValley(*settings)


def test_an_interval_below_one_step_is_refused():
    with pytest.raises(ValueError, match="swad_interval is 0"):
        toy("swad", swad_interval=0)


@pytest.mark.parametrize("dataset, ratio, interval", [
    ("PACS", 0.3, 100), ("VLCS", 0.2, 50), ("DomainNet", 0.3, 500), (None, 0.3, 100)])
def test_on_top_of_a_method_it_has_the_authors_values_for_the_dataset_as_its_row_has(
        dataset, ratio, interval):
    algorithm = toy("swad", **({"dataset": dataset} if dataset else {}))
    assert (algorithm.valley.tolerance_ratio, algorithm.interval) == (ratio, interval)
    if dataset:
        of_row = default_hparams("SWAD", dataset)
        assert (of_row["swad_tolerance_ratio"], of_row["swad_interval"]) == (ratio, interval)
    given = toy("swad", dataset=dataset, swad_tolerance_ratio=0.4, swad_interval=7)
    assert (given.valley.tolerance_ratio, given.interval) == (0.4, 7)


class Run:
    """A training loop around the toy, with scripted validation losses."""

    def __init__(self, losses, n_steps, **hparams):
        self.algorithm = toy("swad", **hparams)
        self.losses, self.n_steps = losses, n_steps
        self.live, self.validated, self.extra = [], [], []

    def batches(self, n):
        self.extra = [toy_minibatches(1000 + i) for i in range(n)]
        return iter(self.extra)

    def advance(self, first, stop):
        for step in range(first, stop):
            def validate(predict, step=step):
                self.validated.append(step)
                return self.losses[step]

            torch.manual_seed(step)
            self.algorithm.update(toy_minibatches(step))
            self.live.append(weights_of(self.algorithm.network))
            self.algorithm.checkpoint(step, step == self.n_steps - 1, validate, self.batches)
        return self


def scripted_losses(n_steps):
    return [0.5 + (step / n_steps - 0.4) ** 2 for step in range(n_steps)]


def test_the_swad_model_is_the_offline_average_of_the_live_weights():
    n_steps, settings = 101, (3, 6, 0.02)
    run = Run(scripted_losses(n_steps), n_steps, swad_interval=5, swad_n_converge=settings[0],
              swad_n_tolerance=settings[1], swad_tolerance_ratio=settings[2]).advance(0, n_steps)
    ends = list(range(0, 101, 5))
    starts = [0] + [end + 1 for end in ends]
    segments = [offline_mean(run.live[start:end + 1]) for start, end in zip(starts, ends)]
    averaged, converged, _, dead = naive([run.losses[end] for end in ends], *settings)
    assert converged is not None and dead
    assert run.validated == [e for e in ends if e <= run.validated[-1]] != ends
    assert run.algorithm.valley.averaged == [(starts[i], ends[i]) for i in averaged]
    expected = offline_mean([segments[i] for i in averaged])
    ours = run.algorithm.average.network.state_dict()
    for name in ("2.weight", "2.bias", "0.weight", "0.bias"):
        torch.testing.assert_close(ours[name], expected[name])


def test_until_the_last_step_predictions_are_the_live_networks_and_then_the_averages():
    run = Run(scripted_losses(21), 21, swad_interval=5)
    x = torch.randn(5, 4)
    for step in range(20):
        run.advance(step, step + 1)
        run.algorithm.eval()
        assert_same(run.algorithm.predict(x), run.algorithm.network(x))
        run.algorithm.train()
    run.advance(20, 21)
    run.algorithm.eval()
    assert_same(run.algorithm.predict(x), run.algorithm.average(x))
    assert not torch.equal(run.algorithm.predict(x), run.algorithm.network(x))
    assert run.algorithm.selects_last


def test_validation_sees_the_live_network_at_every_interval_and_at_the_last_step():
    run = Run([1 - step / 100 for step in range(23)], 23, swad_interval=5)
    predictions = []
    x = torch.randn(5, 4)

    def validate(predict):
        run.algorithm.eval()
        predictions.append(torch.equal(predict(x), run.algorithm.network(x)))
        run.algorithm.train()
        return 1.0

    steps = []
    for step in range(23):
        run.algorithm.update(toy_minibatches(step))
        before = len(predictions)
        run.algorithm.checkpoint(step, step == 22, validate, run.batches)
        steps += [step] * (len(predictions) - before)
    assert steps == [0, 5, 10, 15, 20, 22]
    assert all(predictions)


def test_batch_norm_statistics_are_the_means_over_the_extra_batches():
    run = Run(scripted_losses(21), 21, swad_interval=5).advance(0, 20)
    plain = toy(None)
    torch.manual_seed(20)
    plain.update(toy_minibatches(20))
    stream = torch.get_rng_state()
    run.advance(20, 21)
    assert torch.equal(torch.get_rng_state(), stream)  # though the network has dropout
    norm = run.algorithm.average.network[0]
    batches = [torch.cat([x for x, _ in minibatches]) for minibatches in run.extra]
    assert len(batches) == 21  # as many as updates
    torch.testing.assert_close(
        norm.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(
        norm.running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    assert norm.momentum == 0.1
    live = run.algorithm.network[0]
    assert live.training and live.momentum == 0.1
    assert_same(live.running_mean, run.live[-1]["0.running_mean"])


@pytest.mark.parametrize("norm", ["frozen", "absent"])
def test_frozen_or_absent_batch_norm_asks_for_no_extra_batches(norm):
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    run = Run(scripted_losses(21), 21, swad_interval=5)
    layer = Frozen(4) if norm == "frozen" else nn.Identity()
    run.algorithm.network[0] = layer.eval()
    run.algorithm.average = averaging.MovingAverage(run.algorithm.network)

    def unused(n):
        raise AssertionError("batches were drawn")
        yield

    run.batches = unused
    run.advance(0, 21)
    assert run.algorithm.finished


@pytest.mark.parametrize("first", [3, 5, 6, 12, 26, 40])
def test_a_run_resumed_at_any_step_ends_in_the_same_model(first):
    hparams = {"swad_interval": 5, "swad_tolerance_ratio": 0.1}
    quiet = Run(scripted_losses(41), 41, **hparams).advance(0, first)
    state = through_a_file([quiet.algorithm.state_dict(), quiet.algorithm.optimizer.state_dict()])
    resumed = Run(quiet.losses, 41, **hparams)
    resumed.algorithm.load_state_dict(state[0])
    resumed.algorithm.optimizer.load_state_dict(state[1])
    for run in (quiet, resumed):
        run.advance(first, 41)
    assert_same(quiet.algorithm.state_dict(), resumed.algorithm.state_dict())
    assert quiet.algorithm.valley.averaged == resumed.algorithm.valley.averaged


def test_the_state_holds_no_optimizer_and_no_more_networks_than_the_tolerance():
    run = Run(scripted_losses(81), 81, swad_interval=5, swad_n_tolerance=4).advance(0, 80)
    names = run.algorithm.network.state_dict().keys()
    extra = run.algorithm.valley.get_extra_state()
    assert len(extra["segments"]) == 4 or extra["dead"]
    assert all(segment["weights"].keys() == names for segment in extra["segments"])
    assert extra["mean"].keys() == names
    assert run.algorithm.average.network.state_dict().keys() == names
