import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from domainbed_kd.losses import kd_loss, kd_per_sample


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_kd_per_sample_is_scipys_divergence_times_the_temperature_squared(logits, temperature):
    student, teacher = logits
    expected = temperature**2 * entropy(softmax(teacher.numpy() / temperature, axis=1),
                                        softmax(student.numpy() / temperature, axis=1), axis=1)
    np.testing.assert_allclose(kd_per_sample(student, teacher, temperature), expected, rtol=1e-12)
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected.mean())


def test_kd_loss_pulls_the_student_towards_the_teachers_probabilities():
    student = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, 3.0]])
    kd_loss(student, teacher, temperature=4.0).backward()
    # d/ds of T^2 KL(softmax(t/T) || softmax(s/T)) is T (softmax(s/T) - softmax(t/T)).
    torch.testing.assert_close(
        student.grad, 4 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)))


def test_kd_is_never_negative_and_zero_exactly_where_logits_differ_by_a_constant(logits):
    student, teacher = logits
    assert (kd_per_sample(student, teacher, 2.0) > 0).all()
    shift = torch.arange(6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(kd_per_sample(teacher + shift, teacher, 2.0),
                               torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_kd_does_not_see_constants_added_to_either_sides_logits(logits):
    student, teacher = logits
    torch.testing.assert_close(kd_per_sample(student + 7, teacher - 3, 2.0),
                               kd_per_sample(student, teacher, 2.0))


def test_the_gradient_keeps_its_scale_as_the_temperature_rises(logits):
    def norm(temperature):
        student = logits[0].clone().requires_grad_()
        kd_loss(student, logits[1], temperature).backward()
        return student.grad.norm().item()

    # In the limit of high temperatures it is that of the centred logits' mean squared difference.
    difference = logits[0] - logits[1]
    limit = ((difference - difference.mean(dim=1, keepdim=True)) / difference.numel()).norm().item()
    assert norm(1000.0) == pytest.approx(limit, rel=1e-2)
    assert 0.1 < norm(20.0) / norm(4.0) < 10
    assert norm(20.0) / 20**2 / (norm(4.0) / 4**2) < 0.1  # what it would be without the factor


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_that_float_probabilities_cannot_hold_stay_finite(temperature):
    student = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    loss = kd_loss(student, torch.tensor([[-1000.0, 1000.0]]), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(2000 * temperature)
    assert student.grad.isfinite().all()
