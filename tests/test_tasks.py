"""What is measured: accuracy of images, and mean intersection over union of pixels."""

import functools
import math

import numpy as np
import pytest
import torch

from domainbed_kd import algorithms, datasets, tasks
from domainbed_kd.algorithms import composed
from domainbed_kd.algorithms.kddg import keep_mask
from domainbed_kd.losses import kd_loss, kd_per_sample, mean_of_labelled
from domainbed_kd.tasks import IGNORED


def maps(n_classes=5, size=(6, 9), n=4, seed=0, ignored=0.3):
    """Logits (n, C, H, W), and labels of which a share is ignored."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_classes, *size, generator=random)
    y = torch.randint(0, n_classes, (n, *size), generator=random)
    y[torch.rand(y.shape, generator=random) < ignored] = IGNORED
    return logits, y


def counted(logits, y, batch=2):
    counter = tasks.SEGMENTATION.counter()
    for part, labels in zip(logits.split(batch), y.split(batch)):
        counter.add(part, labels)
    return counter


def naive_ious(guess, y, n_classes):
    """By sets of pixels; None for a class that is neither in the labels nor guessed."""
    found = []
    for c in range(n_classes):
        said = {i for i, (g, t) in enumerate(zip(guess, y)) if g == c and t != IGNORED}
        true = {i for i, t in enumerate(y) if t == c}
        found.append(len(said & true) / len(said | true) if said | true else None)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_miou_is_that_of_sets_of_pixels_over_the_whole_set(seed):
    logits, y = maps(seed=seed)
    counter = counted(logits, y)
    naive = naive_ious(logits.argmax(1).flatten().tolist(), y.flatten().tolist(), 5)
    assert counter.by_class() == pytest.approx(naive, rel=1e-12)
    assert counter.score() == pytest.approx(sum(naive) / 5, rel=1e-12)


def test_miou_is_that_of_scikit_learns_confusion_matrix():
    from sklearn import metrics

    logits, y = maps(seed=3)
    counter, valid = counted(logits, y), y != IGNORED
    matrix = metrics.confusion_matrix(y[valid], logits.argmax(1)[valid])
    np.testing.assert_array_equal(counter.counts, matrix)
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert counter.score() == pytest.approx(iou.mean(), rel=1e-12)


def test_miou_is_torchmetrics():
    from torchmetrics import classification as metrics

    logits, y = maps(seed=4)
    theirs = metrics.MulticlassJaccardIndex(5, ignore_index=IGNORED)
    for part, labels in zip(logits.split(2), y.split(2)):
        theirs.update(part, labels)
    assert counted(logits, y).score() == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_a_class_counts_if_it_occurs_or_is_guessed():
    y = torch.tensor([[[0, 0, 1, IGNORED]]])
    guess = torch.tensor([[[0, 2, 1, 3]]])  # 2 is guessed only, 3 on an ignored pixel, 4 not at all
    logits = torch.nn.functional.one_hot(guess, 5).permute(0, 3, 1, 2).float()
    counter = counted(logits, y)
    assert counter.by_class() == [0.5, 1.0, 0.0, None, None]
    assert counter.score() == 0.5


def test_the_mean_of_batches_would_be_another_number():
    logits, y = maps(seed=1)
    batches = [counted(part, labels).score() for part, labels in zip(logits.split(2), y.split(2))]
    assert not math.isclose(np.mean(batches), counted(logits, y).score(), rel_tol=1e-3)


def test_maps_of_another_size_are_resized_and_labels_are_not():
    logits, y = maps(size=(6, 9))
    big = y.repeat_interleave(4, 1).repeat_interleave(4, 2)
    counter = tasks.SEGMENTATION.counter()
    counter.add(logits, big)
    assert counter.counts.sum() == 16 * (y != IGNORED).sum()


def test_images_are_counted_as_domainbed_does():
    counter = tasks.CLASSIFICATION.counter()
    counter.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]))
    counter.add(torch.tensor([[0.5], [-0.5], [-1.0]]), torch.tensor([1, 1, 0]))
    assert counter.score() == 3 / 5 and counter.by_class() is None


# Losses on pixels.


def pixels(y):
    """(image, row, column) of each pixel that counts."""
    return [(b, i, j) for b in range(len(y)) for i in range(y.shape[1]) for j in range(y.shape[2])
            if y[b, i, j] != IGNORED]


def test_distillation_leaves_ignored_pixels_out():
    student, y = maps(seed=5)
    teacher, _ = maps(seed=6)
    naive = []
    for b, i, j in pixels(y):
        p, q = ((z[b, :, i, j].double() / 2.0).softmax(0) for z in (teacher, student))
        naive.append(4 * sum((a * (a / c).log()).item() for a, c in zip(p, q)))
    assert kd_loss(student, teacher, 2.0, y).item() == pytest.approx(np.mean(naive), rel=1e-5)
    changed = torch.where((y == IGNORED).unsqueeze(1), 100 * teacher, teacher)
    assert kd_loss(student, changed, 2.0, y) == kd_loss(student, teacher, 2.0, y)


def test_nothing_is_learnt_from_a_batch_that_is_ignored_whole():
    student, y = maps()
    student.requires_grad_()
    kd_loss(student, student.detach() + 1, 2.0, torch.full_like(y, IGNORED)).backward()
    assert not student.grad.any()


@pytest.mark.parametrize("rule", ["none", "correct", "confident", "both"])
def test_kddg_filters_pixels_as_it_does_images(rule):
    student, y = maps(seed=7)
    teacher, _ = maps(seed=8)
    keep = keep_mask(student, teacher, y, rule)
    rows = y != IGNORED
    of_rows = keep_mask(student.movedim(1, -1)[rows], teacher.movedim(1, -1)[rows], y[rows], rule)
    assert keep[rows].equal(of_rows) and not keep[~rows].any()


def task_hparams(name, **changes):
    from domainbed_kd import hparams_registry

    return hparams_registry.default_hparams(name, "DigitsSeg") | {
        "task": "segmentation", "total_steps": 10} | changes


class OneByOne(torch.nn.Module):
    """A teacher of maps: random, always the same."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 11, 1)

    def forward(self, x):
        return self.conv(x)


@functools.cache
def digits_seg():
    return datasets.get_dataset_class("DigitsSeg")(None, [], {})


def digits(n=2, ignored=0.2):
    random = torch.Generator().manual_seed(0)
    batches = []
    for domain in digits_seg():
        x, y = (tensor[:n].clone() for tensor in domain.tensors)
        y[torch.rand(y.shape, generator=random) < ignored] = IGNORED
        batches.append((x, y))
    return batches


@pytest.mark.parametrize("on", ["all", "ce", "kd"])
@pytest.mark.parametrize("norm", ["batch", "kept"])
def test_kddgs_loss_on_maps_is_that_of_its_labelled_pixels_one_by_one(on, norm):
    torch.manual_seed(0)
    make = algorithms.get_algorithm_class("KDDG")
    algorithm = make((3, 64, 64), 11, 3, task_hparams(
        "KDDG", teacher=OneByOne(), kddg_filter_on=on, kddg_norm=norm))
    batch = digits()[:3]
    x, y = (torch.cat(part) for part in zip(*batch))
    with torch.no_grad():
        student, teacher = algorithm.network(x), algorithm.teacher(x)
    rows = y != IGNORED
    s, t, labels = student.movedim(1, -1)[rows], teacher.movedim(1, -1)[rows], y[rows]
    keep = keep_mask(s, t, labels, "both")
    ce = torch.nn.functional.cross_entropy(s, labels, reduction="none")
    kd = kd_per_sample(s, t, 2.0)
    loss = 0.5 * ce * (keep if on != "kd" else 1) + 0.5 * kd * (keep if on != "ce" else 1)
    n = len(labels) if norm == "batch" else keep.sum()
    values = algorithm.update(batch)
    assert values["loss"].item() == pytest.approx((loss.sum() / n).item(), rel=1e-4)
    assert values["filtered"].item() == pytest.approx(1 - keep.mean().item(), abs=1e-5)


OF_PIXELS = [name for name in algorithms.SHIPPED
             if not algorithms.get_algorithm_class(name).needs_image_labels]


@pytest.mark.parametrize("name", [name for name in OF_PIXELS if name != "MosaicKD"])
def test_no_loss_has_a_gradient_by_the_logits_of_ignored_pixels(name):
    torch.manual_seed(0)
    algorithm = algorithms.get_algorithm_class(name)((3, 64, 64), 11, 3, task_hparams(
        name, teacher=OneByOne(), linear_steps=0))
    batch = digits(ignored=0)[:3]
    for _, y in batch:
        y[:, :20] = IGNORED  # of every image, as Mixup mixes two
    gradients = []

    def watch(module, inputs, logits):
        if logits.requires_grad:
            logits.register_hook(gradients.append)

    algorithm.classifier.register_forward_hook(watch)
    for _ in range(2):
        algorithm.update(batch)
    assert gradients and all(g[:, :, 20:].any() for g in gradients)
    assert not any(g[:, :, :20].any() for g in gradients)


def test_mosaickds_student_learns_on_synthetic_pixels_and_on_real_ones_that_are_not_ignored():
    torch.manual_seed(0)
    algorithm = algorithms.get_algorithm_class("MosaicKD")((3, 64, 64), 11, 3, task_hparams(
        "MosaicKD", teacher=OneByOne(), lr=0.0, mosaic_lr_g=0.0, mosaic_kd_steps=1,
        mosaic_width=8, mosaic_batch=2))
    batch = digits(n=1)[:3]
    x, y = (torch.cat(part) for part in zip(*batch))
    noise = torch.Generator().manual_seed(algorithm.noise_seed.item())
    with torch.no_grad():
        _, fake = (algorithm.synthesize(2, noise) for _ in range(2))  # the first are the players'
        seen = torch.cat([fake, x])
        student, teacher = algorithm.network(seen), algorithm.teacher(seen)
    rows = torch.cat([torch.ones(2, 64, 64, dtype=torch.bool), y != IGNORED])
    terms = kd_per_sample(student.movedim(1, -1)[rows], teacher.movedim(1, -1)[rows], 1.0)
    values = algorithm.update(batch)
    assert values["distill"].item() == pytest.approx(terms.double().mean().item(), rel=1e-4)


# Teachers on top.


def composed_on_maps(teachers_of, name="ERM", **changes):
    torch.manual_seed(0)
    hparams = task_hparams(name, teachers=["run:ERM"] * len(teachers_of), teacher=teachers_of,
                           **changes)
    return composed.assembled(algorithms.get_algorithm_class(name), hparams)(
        (3, 64, 64), 11, 3, hparams)


@pytest.mark.parametrize("mix", ["sum", "mean"])
def test_teachers_on_top_teach_labelled_pixels_one_by_one(mix):
    torch.manual_seed(3)
    teachers = [OneByOne(), OneByOne()]
    algorithm = composed_on_maps(teachers, distill_weight=0.7, distill_temperature=2.0,
                                 teacher_mix=mix)
    batch = digits(n=1)[:3]
    x, y = (torch.cat(part) for part in zip(*batch))
    with torch.no_grad():
        student, seen = algorithm.network(x).double(), [t(x).double() for t in teachers]
    cost, kd = [], []
    for b, i, j in pixels(y)[::7]:
        q = (student[b, :, i, j] / 2).softmax(0)
        p = [(z[b, :, i, j] / 2).softmax(0) for z in seen]
        if mix == "mean":
            p = [(p[0] + p[1]) / 2]
        cost.append(-student[b, :, i, j].log_softmax(0)[y[b, i, j]].item())
        kd.append(np.mean([4 * (each * (each / q).log()).sum().item() for each in p]))
    every_seventh = torch.full_like(y, IGNORED)
    for b, i, j in pixels(y)[::7]:
        every_seventh[b, i, j] = y[b, i, j]
    n = len(batch[0][0])
    values = algorithm.update(list(zip(x.split(n), every_seventh.split(n))))
    assert values["loss"].item() == pytest.approx(np.mean(cost) + 0.7 * np.mean(kd), rel=1e-4)
    assert values["logit"].item() == pytest.approx(np.mean(kd), rel=1e-4)


def test_shares_by_accuracy_are_those_of_labelled_pixels():
    torch.manual_seed(3)
    teachers = [OneByOne(), OneByOne()]
    algorithm = composed_on_maps(teachers, teacher_mix="accuracy")
    (x, y), *_ = digits()
    rows = y != IGNORED

    def validate(predict):
        logits = predict(x)
        return torch.nn.functional.cross_entropy(logits, y).item()

    algorithm.checkpoint(0, False, validate, None)
    right = [(t(x).argmax(1) == y)[rows].float().mean().item() for t in teachers]
    torch.testing.assert_close(algorithm.taught.shares, torch.tensor(right) / sum(right),
                               rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OF_PIXELS)
def test_teachers_go_on_top_of_a_method_of_pixels_or_it_says_why_not(name):
    cls = algorithms.get_algorithm_class(name)
    if (cls.learns_from_run or cls.teacher_logits or cls.no_teachers or cls.rearranges_images):
        with pytest.raises(ValueError, match="teachers do not go with this: ") as error:
            composed_on_maps([OneByOne()], name)
        assert "\n" not in str(error.value)
        return
    algorithm = composed_on_maps([OneByOne()], name)
    before = [p.clone() for p in algorithm.network.parameters()]
    values = algorithm.update(digits()[:3])
    assert values["logit"] > 0 and math.isfinite(values["loss"])
    assert not all(p.equal(was) for p, was in zip(algorithm.network.parameters(), before))


@pytest.mark.parametrize("name, hparams, says", [
    ("ERM", {"teachers": ["run:ERM"], "distill": "feature"}, 'distill takes "logit" alone'),
    ("ERM", {"teachers": ["run:ERM"], "distill": "feature_mse"}, 'distill takes "logit" alone'),
    ("ERM", {"teachers": ["run:ERM"], "distill": ["logit", "relation"]}, '"logit" alone'),
    ("ERM", {"teachers": ["run:ERM"], "distill": "text"}, '"logit" alone'),
    ("ERM", {"teachers": ["clip"]}, "CLIP cannot teach where each pixel has a label"),
    ("ERM", {"teachers": ["timm:resnet18"]}, "resnet18 cannot teach where each pixel has a label"),
    ("ERM", {"teachers": ["run:CORAL"]}, "CORAL cannot teach where each pixel has a label"),
    ("KD", {"teacher": "run:CORAL"}, "CORAL cannot teach where each pixel has a label"),
    ("Mixup", {"teachers": ["run:ERM"]}, "nothing tells which pixels are ignored")])
def test_teachers_that_have_no_meaning_on_pixels_are_refused_in_one_line(name, hparams, says):
    with pytest.raises(ValueError, match=says) as error:
        composed.check(algorithms.get_algorithm_class(name), hparams | {"task": "segmentation"})
    assert "\n" not in str(error.value)


def test_the_mean_of_images_is_the_plain_mean_to_the_bit():
    values = torch.randn(37)
    assert mean_of_labelled(values, torch.zeros(37)) == values.mean()


# Which methods learn from pixels, and how the others refuse.


@pytest.mark.parametrize("name", algorithms.SHIPPED)
def test_a_method_learns_from_pixels_or_says_why_not(name):
    cls = algorithms.get_algorithm_class(name)
    if cls.needs_image_labels:
        assert cls.needs_image_labels == cls.needs_image_labels.strip(". \n")
        return
    torch.manual_seed(0)
    algorithm = cls((3, 64, 64), 11, 3, task_hparams(name, teacher_steps=1))
    batch = digits()[:3]
    for _ in range(3):
        values = algorithm.update(batch)
    assert all(math.isfinite(value) for value in values.values())
    algorithm.eval()
    assert algorithm.predict(batch[0][0]).shape == (2, 11, 64, 64)
