import pytest
import torch
from clips import Teacher, bits, make, minibatches, run, same_bits

from domainbed_kd.averaging import MovingAverage
from domainbed_kd.losses import kd_loss

STUDENT = torch.tensor([[2.0, 0, -1], [0.5, 1.5, 0]])
TEACHER = torch.tensor([[1.0, 1, 0], [0, 3, -1]])


@pytest.mark.parametrize(("temperature", "loss"), [(5, 0.552927), (1, 0.362802), (4, 0.554667)])
def test_the_loss_is_the_official_codes(temperature, loss):
    assert kd_loss(STUDENT, TEACHER, temperature).item() == pytest.approx(loss, abs=1e-6)


def test_the_loss_is_0_where_logits_differ_by_a_constant():
    student = TEACHER.clone().add(3).requires_grad_()
    loss = kd_loss(student, TEACHER, 5)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros(2, 3), rtol=0, atol=1e-6)


def test_a_high_temperature_compares_centred_logits():
    student, teacher = STUDENT.double(), TEACHER.double()
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = centred.square().sum(1).mean() / 6  # 1 / (2 C)
    torch.testing.assert_close(kd_loss(student, teacher, 1e4), expected, rtol=1e-3, atol=0)


def test_it_trains_as_kd_does_without_labels():
    ours, kd = make("WAKD", wakd_temperature=2.0), make("KD", kd_alpha=1.0, kd_temperature=2.0)
    for algorithm in (ours, kd):
        run(algorithm, minibatches(3))
    assert same_bits(bits(ours.network), bits(kd.network))


def test_labels_do_not_matter():
    one, other = make("WAKD"), make("WAKD")
    for batch in minibatches(3):
        one.update(batch)
        other.update([(x, (y + 1) % 3) for x, y in batch])
    assert same_bits(bits(one.network), bits(other.network))


def test_it_predicts_with_the_mean_of_the_weights_since_its_start():
    algorithm, seen = make("WAKD", wakd_start=3), []
    for batch in minibatches(6):
        algorithm.update(batch)
        seen.append(bits(algorithm.network))
    for name, tensor in algorithm.average.network.state_dict().items():
        mean = torch.stack([state[name].double() for state in seen[2:]]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-6)
    x = minibatches()[0][0][0]
    algorithm.eval()
    assert torch.equal(algorithm.predict(x), algorithm.average(x))


def test_the_mean_of_numbers_is_the_official_codes():
    network = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(network)
    for value in (1.0, 2, 6, 7):
        torch.nn.init.constant_(network.weight, value)
        average.update(network)
    assert average.network.weight.item() == pytest.approx(4)


@pytest.mark.parametrize(("total_steps", "start"), [(5001, 500), (50001, 5000), (3, 1)])
def test_by_default_it_averages_from_a_tenth_of_the_run(total_steps, start):
    assert make("WAKD", total_steps=total_steps).average.start == start


def test_a_teacher_of_its_own_warms_up_before_the_average_begins():
    algorithm = make("WAKD", teacher=None, teacher_steps=4, total_steps=34)
    assert algorithm.average.start == 4 + 3


def test_its_teacher_stays_as_it_is():
    teacher = Teacher()
    before, algorithm = bits(teacher), make("WAKD", teacher=teacher)
    for batch in minibatches(3):
        algorithm.update(batch)
        algorithm.eval()
        algorithm.train()
    assert same_bits(before, bits(teacher)) and not teacher.training
