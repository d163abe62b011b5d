import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import Teacher, bits, make, minibatches, run, same_bits
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn

from domainbed_kd.algorithms.kddg import FILTERS, keep_mask, mutual_information


def random_logits(n=60, n_classes=4):
    generator = torch.Generator().manual_seed(3)
    student, teacher = 2 * torch.randn(2, n, n_classes, generator=generator)
    y = torch.randint(n_classes, (n,), generator=generator)
    teacher[::5] = student[::5]  # exact ties
    student[::7, 0] = student[::7].amax(dim=1)  # two largest logits
    return student, teacher, y


def kept_one_by_one(student, teacher, y, rule, margin):
    kept = []
    for s, t, label in zip(student.numpy(), teacher.numpy(), y.tolist()):
        correct = int(np.argmax(s)) == label
        confident = softmax(s)[label] >= softmax(t)[label] + np.float32(margin)
        filtered = {"none": False, "correct": correct, "confident": confident,
                    "both": correct and confident}[rule]
        kept.append(0.0 if filtered else 1.0)
    return torch.tensor(kept)


@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("rule", FILTERS)
def test_the_mask_equals_a_loop_over_samples_in_every_mode_ties_included(rule, margin):
    student, teacher, y = random_logits()
    student.requires_grad_()
    mask = keep_mask(student, teacher, y, rule, margin)
    assert torch.equal(mask, kept_one_by_one(student.detach(), teacher, y, rule, margin))
    assert not mask.requires_grad
    assert rule == "none" or 0 < mask.mean() < 1


@pytest.mark.parametrize("rule, expected", [
    ("none", [1, 1, 1, 1]), ("correct", [0, 0, 1, 1]), ("confident", [0, 1, 0, 1]),
    ("both", [0, 1, 1, 1])])
def test_the_rule_names_what_filters(rule, expected):
    """Right and surer than the teacher, only right, only surer, neither; the label is 0."""
    student = torch.tensor([[2.0, 0, 0], [1, 0, 0], [1, 2, 0], [0, 2, 0]])
    teacher = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 2, 0], [1, 0, 0]])
    assert keep_mask(student, teacher, torch.zeros(4, dtype=int), rule).tolist() == expected


class Logits(nn.Module):
    """A student or teacher whose logits are its only weights, whatever the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits[:len(x)]


def over_logits(student, teacher, **changes):
    """KDDG whose gradient is that by the student's logits."""
    algorithm = make("KDDG", n_classes=student.shape[1], class_names=None,
                     teacher=Logits(teacher), **changes)
    algorithm.network = Logits(student)
    algorithm.optimizer = torch.optim.SGD(algorithm.network.parameters(), lr=0.1)
    return algorithm


def gradient(algorithm, y):
    values = algorithm.distill(torch.zeros(len(y), 1), y)
    return algorithm.network.logits.grad, values


@pytest.mark.parametrize("rule", FILTERS)
def test_the_gradient_is_the_cards_with_zero_rows_where_samples_are_filtered(rule):
    student, teacher, y = random_logits()
    alpha, tau = 0.3, 2.0
    found, values = gradient(over_logits(
        student, teacher, kddg_alpha=alpha, kddg_tau=tau, kddg_filter=rule), y)
    mask = kept_one_by_one(student, teacher, y, rule, 0.0)
    whole = ((1 - alpha) * (student.softmax(1) - F.one_hot(y, 4))
             + alpha * tau * ((student / tau).softmax(1) - (teacher / tau).softmax(1))) / len(y)
    torch.testing.assert_close(found, mask[:, None] * whole, atol=1e-7, rtol=1e-4)
    assert (found[mask == 0] == 0).all()
    assert values["filtered"] == pytest.approx(1 - mask.mean().item())


def test_filtering_a_sample_leaves_the_others_gradients_as_they_were():
    student, teacher, y = random_logits()
    filtered, _ = gradient(over_logits(student, teacher, kddg_filter="both"), y)
    whole, _ = gradient(over_logits(student, teacher, kddg_filter="none"), y)
    kept = keep_mask(student, teacher, y, "both").bool()
    assert torch.equal(filtered[kept], whole[kept])


def test_a_backward_hook_that_zeroes_the_filtered_rows_gives_the_same_weights():
    [batch] = minibatches(size=8)
    x, y = (torch.cat(part) for part in zip(*batch))
    ours, hooked = make("KDDG", kddg_filter="correct"), make("KDDG", kddg_filter="none")
    logits = ours.network(x).detach()
    keep = keep_mask(logits, ours.teacher_logits(x), y, "correct")
    assert 0 < keep.mean() < 1
    hooked.network.register_forward_hook(lambda module, args, out: out.register_hook(
        lambda grad: grad * keep[:, None]) and None)
    ours.update(batch)
    hooked.update(batch)
    for name, tensor in bits(ours.network).items():
        torch.testing.assert_close(tensor, bits(hooked.network)[name])


@pytest.mark.parametrize("on", ["ce", "kd"])
def test_the_filter_may_silence_one_term_only(on):
    student, teacher, y = random_logits()
    found, _ = gradient(over_logits(student, teacher, kddg_alpha=0.5, kddg_tau=1.0,
                                    kddg_filter="correct", kddg_filter_on=on), y)
    mask = kept_one_by_one(student, teacher, y, "correct", 0.0)[:, None]
    on_ce, on_kd = (mask, 1) if on == "ce" else (1, mask)
    expected = 0.5 / len(y) * (on_ce * (student.softmax(1) - F.one_hot(y, 4))
                               + on_kd * (student.softmax(1) - teacher.softmax(1)))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def test_the_norm_kept_divides_by_the_samples_that_are_left():
    student, teacher, y = random_logits()
    by_batch, _ = gradient(over_logits(student, teacher, kddg_filter="correct"), y)
    by_kept, _ = gradient(
        over_logits(student, teacher, kddg_filter="correct", kddg_norm="kept"), y)
    n_kept = keep_mask(student, teacher, y, "correct").sum()
    torch.testing.assert_close(by_kept, by_batch * len(y) / n_kept)


def test_a_copy_of_the_teacher_has_nothing_to_distil_and_its_correct_samples_are_filtered():
    [batch] = minibatches(size=20)
    x, y = (torch.cat(part) for part in zip(*batch))
    algorithm = make("KDDG", kddg_alpha=1.0, kddg_filter="none")
    algorithm = make("KDDG", kddg_alpha=1.0, kddg_filter="none",
                     teacher=copy.deepcopy(algorithm.network))
    logits = algorithm.network(x)
    assert torch.equal(
        keep_mask(logits, algorithm.teacher_logits(x), y, "both") == 0, logits.argmax(1) == y)
    assert algorithm.update(batch)["distill"] == pytest.approx(0, abs=1e-7)
    assert all(p.grad.abs().max() < 1e-7 for p in algorithm.network.parameters())


def test_a_batch_that_is_filtered_whole_has_loss_0_and_moves_nothing():
    algorithm = make("KDDG", kddg_filter="correct", kddg_alpha=0.5)
    [batch] = minibatches()
    batch = [(x, algorithm.network(x).argmax(dim=1)) for x, _ in batch]
    before = bits(algorithm.network)
    values = algorithm.update(batch)
    assert (values["loss"], values["filtered"]) == (0.0, 1.0)
    assert same_bits(before, bits(algorithm.network))
    kept = make("KDDG", kddg_filter="correct", kddg_norm="kept")
    assert kept.update(batch)["loss"] == 0.0


def test_with_a_teacher_that_knows_nothing_all_correct_samples_are_filtered():
    class Uniform(Teacher):
        def forward(self, x):
            return torch.zeros(len(x), 3)

    algorithm = make("KDDG", teacher=Uniform(), kddg_filter="both")
    [batch] = minibatches(size=10)
    x, y = (torch.cat(part) for part in zip(*batch))
    correct = (algorithm.network(x).argmax(1) == y).float().mean().item()
    assert algorithm.update(batch)["filtered"] == pytest.approx(correct)


def test_confidence_is_compared_at_temperature_1_whatever_the_distillations():
    student, teacher, y = random_logits()
    shares = {tau: gradient(over_logits(student, teacher, kddg_tau=tau), y)[1]["filtered"]
              for tau in (1.0, 5.0)}
    assert shares[1.0] == shares[5.0] > 0


def test_the_filter_starts_when_it_is_told_to():
    algorithm = make("KDDG", kddg_filter="correct", kddg_filter_start=2, lr=0.0)
    assert [v["filtered"] > 0 for v in run(algorithm, minibatches() * 4)] == [
        False, False, True, True]


def test_a_teacher_that_is_not_finite_harms_no_student_that_does_not_distil():
    class Broken(Teacher):
        def forward(self, x):
            return torch.full((len(x), 3), torch.nan)

    algorithm = make("KDDG", teacher=Broken(), kddg_alpha=0.0, kddg_filter="correct")
    assert math.isfinite(algorithm.update(minibatches()[0])["loss"])


@pytest.mark.parametrize("name, value", [
    ("kddg_filter", "all"), ("kddg_filter_on", "both"), ("kddg_norm", "mean")])
def test_an_unknown_reading_is_refused_with_those_that_are_known(name, value):
    with pytest.raises(ValueError, match=f"KDDG: {name} is '{value}'; it takes one of "):
        make("KDDG", **{name: value})


def test_features_that_are_the_labels_hold_all_their_information():
    y = torch.arange(90) % 3
    x = 10 * F.one_hot(y, 3).float()
    assert mutual_information(x, y, x, y) == pytest.approx(math.log(3), abs=0.02)


def test_features_that_are_noise_hold_none_and_the_bound_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=generator), torch.arange(200) % 2
    assert mutual_information(x[:100], y[:100], x[100:], y[100:]) < 0.02


def test_the_information_is_entropy_less_the_cross_entropy_of_sklearns_probe():
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(3, (400,), generator=generator)
    x = F.one_hot(y, 3) + torch.randn(400, 3, generator=generator)
    before = torch.get_rng_state()
    found = mutual_information(x[:200], y[:200], x[200:], y[200:])
    assert torch.equal(before, torch.get_rng_state())
    probe = LogisticRegression(C=1e3).fit(x[:200], y[:200])
    share = np.bincount(y[200:]) / 200
    expected = -(share * np.log(share)).sum() - log_loss(y[200:], probe.predict_proba(x[200:]))
    assert found == pytest.approx(expected, abs=5e-3)


def test_a_student_of_an_earlier_version_is_loaded_without_the_distance_of_its_weights():
    old, new = make("KDDG"), make("KDDG")
    run(old, minibatches())
    new.load_state_dict(old.state_dict() | {"weight_distance": torch.tensor(0.5)})
    assert same_bits(bits(old), bits(new))
