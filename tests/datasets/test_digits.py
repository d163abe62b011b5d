import hashlib
import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from domainbed_kd import datasets
from domainbed_kd.datasets import looks

# Of plain, colour, texture, sketch. Results depend on them: they change with a new version only.
HASHES = ["b0d9073d17fa751e", "481ac07a6a763fab", "3a4d04bc194f5cde", "9fbe5146a4454662"]


@pytest.fixture(scope="module")
def domains():
    return looks.domains()


def test_the_asset_holds_the_images_that_scikit_learn_carries():
    with np.load(looks.ASSET) as file:
        np.testing.assert_array_equal(file["images"], load_digits().images)
        np.testing.assert_array_equal(file["labels"], load_digits().target)


def test_its_maker_writes_the_same_bytes_again(tmp_path):
    import importlib.util

    path = looks.ASSET.parents[2] / "tools" / "make_digits.py"
    spec = importlib.util.spec_from_file_location("make_digits", path)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert maker.main([str(tmp_path / "again.npz")]) == 0
    with np.load(looks.ASSET) as old, np.load(tmp_path / "again.npz") as new:
        assert sorted(old) == sorted(new)
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])
            assert old[name].dtype == new[name].dtype


def test_the_images_are_the_same_on_every_machine(domains):
    found = [hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
             for images, labels in domains]
    assert found == HASHES


def test_global_random_numbers_do_not_notice():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    datasets.DigitsDG(None, [0], {})
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_each_digit_is_in_one_domain_only(monkeypatch):
    # Painted as they come, the 8x8 images can be counted: some occur twice in the source itself.
    for look in ("plain", "colour", "texture", "sketch"):
        monkeypatch.setattr(looks, look, lambda ink, random: ink[..., None])
    monkeypatch.setattr(looks, "strokes", lambda images, random: images)
    dealt = np.concatenate([images for images, _ in looks.domains()])
    source = load_digits().images[..., None]
    painted = np.floor(255 * source / 16 + 0.4987).astype(np.uint8)
    assert sorted(map(bytes, dealt)) == sorted(map(bytes, painted))


def test_classes_are_balanced_and_in_random_order(domains):
    for _, labels in domains:
        counts = np.bincount(labels, minlength=10)
        assert counts.sum() in (449, 450) and counts.min() >= 43 and counts.max() <= 46
        assert (np.diff(labels) == 0).mean() < 0.2


def test_images_show_the_digit_that_their_label_says(domains):
    # Nearest class mean, within the plain look: 10 % would be chance.
    images, labels = domains[0]
    x = images.reshape(len(images), -1) / 255
    means = np.stack([x[::2][labels[::2] == c].mean(0) for c in range(10)])
    distances = ((x[1::2, None] - means) ** 2).sum(-1)
    assert (distances.argmin(1) == labels[1::2]).mean() > 0.8


def test_the_looks_are_truly_different(domains):
    plain, colour, texture, sketch = (images / 255 for images, _ in domains)
    sides = [x[:, :, [0, -1]].reshape(len(x), -1, 3) for x in (plain, colour, texture, sketch)]
    saturation = [np.ptp(x, axis=-1).mean() for x in (plain, colour, texture, sketch)]
    assert saturation[0] == saturation[3] == 0 and min(saturation[1:3]) > 0.2
    assert sides[0].mean() < 0.05 and sides[3].mean() > 0.8  # black, white
    variation = [b.std(axis=1).mean() for b in sides]
    assert variation[2] > 1.5 * max(variation[0], variation[1], variation[3])  # a pattern
    light_ground = sides[1].mean(axis=(1, 2)) > 0.5
    assert 0.4 < light_ground.mean() < 0.6  # colour: either polarity


def test_digitsdg_gives_tensors_between_0_and_1():
    dataset = datasets.DigitsDG(None, [0], {})
    assert len(dataset) == 4 and dataset.input_shape == (3, 32, 32) and dataset.num_classes == 10
    assert dataset.CHECKPOINT_FREQ == 100
    assert dataset.class_names == datasets.class_names("DigitsDG") == [
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert len(dataset.domain_names) == len(dataset.ENVIRONMENTS) == 4
    for domain in dataset:
        x, y = domain.tensors
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.shape[1:] == (3, 32, 32) and 0 <= x.min() < 0.1 and 0.9 < x.max() <= 1
        assert datasets.plain(domain) is domain


@pytest.mark.slow
def test_erm_learns_three_looks_in_300_steps_and_loses_much_on_the_sketch():
    from domainbed_kd import hparams_registry
    from domainbed_kd.algorithms import get_algorithm_class

    def accuracy(x, y):
        with torch.no_grad():
            return (algorithm.predict(x).argmax(1) == y).float().mean().item()

    # As cheap a run as the demo makes.
    hparams = hparams_registry.default_hparams("ERM", "DigitsDG") | {
        "wrn_depth": 10, "wrn_widen": 1, "lr": 3e-3, "batch_size": 16}
    *seen, (sketch_x, sketch_y) = [d.tensors for d in datasets.DigitsDG(None, [3], hparams)]
    torch.manual_seed(0)
    algorithm = get_algorithm_class("ERM")((3, 32, 32), 10, 3, hparams)
    for _ in range(300):
        batch = [torch.randint(90, len(y), (16,)) for _, y in seen]
        algorithm.update([(x[i], y[i]) for (x, y), i in zip(seen, batch)])
    algorithm.eval()
    held_out = np.mean([accuracy(x[:90], y[:90]) for x, y in seen])
    assert held_out >= 0.85
    assert 0.2 < accuracy(sketch_x, sketch_y) < held_out - 0.1
