import pytest
import torch
import torch.nn.functional as F
from clips import Teacher, bits, make, minibatches, run

from domainbed_kd.losses import kd_loss


def test_the_loss_is_the_weighted_mix_of_the_terms_that_are_logged():
    algorithm = make("KD", kd_alpha=0.3, kd_temperature=2.0)
    [batch] = minibatches()
    x, y = (torch.cat(part) for part in zip(*batch))
    student = algorithm.network(x).detach()
    classify, distill = F.cross_entropy(student, y), kd_loss(student, algorithm.teacher(x), 2.0)
    values = algorithm.update(batch)
    assert values == pytest.approx({
        "loss": (0.7 * classify + 0.3 * distill).item(), "classify": classify.item(),
        "distill": distill.item()}, rel=1e-5)


def test_with_a_share_of_1_the_labels_do_not_matter():
    one, other = make("KD", kd_alpha=1.0), make("KD", kd_alpha=1.0)
    [batch] = minibatches()
    one.update(batch)
    other.update([(x, (y + 1) % 3) for x, y in batch])
    for name, tensor in bits(one.network).items():
        torch.testing.assert_close(tensor, bits(other.network)[name])


def test_distillation_alone_brings_the_student_to_the_teachers_probabilities():
    algorithm = make("KD", (3, 16, 16), kd_alpha=1.0, lr=1e-3)
    values = run(algorithm, minibatches(1, (3, 16, 16)) * 40)
    assert values[-1]["distill"] < 0.1 * values[0]["distill"]


def test_a_share_of_0_asks_the_teacher_nothing():
    teacher = Teacher()
    run(make("KD", kd_alpha=0.0, teacher=teacher), minibatches(2))
    assert teacher.n_calls == 0
