import colorsys
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_cache import read, root, run  # noqa: F401
from torchvision import transforms as T
from torchvision.transforms import functional

from domainbed_kd import datasets
from domainbed_kd.datasets import images
from domainbed_kd.run import augmentation

MEAN = torch.tensor(datasets.IMAGENET_MEAN).view(3, 1, 1)
STD = torch.tensor(datasets.IMAGENET_STD).view(3, 1, 1)


def photo(seed=0, height=40, width=30):
    """A smooth image with strong colours, as Pillow has it."""
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def jittered(x, *operations):
    """An image (1, 3, H, W) in [0, 255] after colour operations: (name, factor) in turn."""
    jitter = augmentation.Jitter(x)
    jitter.load(x, False)
    for name, factor in operations:
        getattr(jitter, name)(factor)
    return jitter.colours()


def apply(name, x, factor):
    """A colour operation's result (3, H, W) in [0, 255]."""
    return jittered(x[None], (name, factor))[0]


THEIRS = {"brighten": functional.adjust_brightness, "contrast": functional.adjust_contrast,
          "saturate": functional.adjust_saturation, "shift_hue": functional.adjust_hue}


@pytest.mark.parametrize("name", ["brighten", "contrast", "saturate"])
@pytest.mark.parametrize("factor", [0.7, 0.95, 1.0, 1.3])
def test_colour_operations_are_torchvisions_on_pillow_but_for_rounding(name, factor):
    wanted = as_tensor(THEIRS[name](photo(), factor)).float()
    assert (apply(name, as_tensor(photo()), factor) - wanted).abs().max() < 2


@pytest.mark.parametrize("order", list(itertools.permutations(THEIRS)))
def test_colour_operations_in_turn_clip_after_each_as_torchvisions_do(order):
    image = Image.blend(photo(), Image.new("RGB", (30, 40), "white"), 0.3)
    for strength in (0.7, 1.0, 1.3):
        operations = [(name, strength - (name == "shift_hue")) for name in order]
        wanted = as_tensor(image) / 255
        for name, factor in operations:
            wanted = THEIRS[name](wanted, factor)
        errors = jittered(as_tensor(image)[None], *operations)[0] - 255 * wanted
        assert errors.abs().max() < 4 and errors.abs().mean() < 0.6


@pytest.mark.parametrize("shift", [-0.5, -0.3, -0.26, -0.2, -0.1, -0.01, 0.0, 0.07, 0.2, 0.3, 0.5])
def test_hues_turn_as_in_hsv(shift):
    x = torch.cat([torch.rand(3, 6, 50), torch.rand(1, 1, 50).expand(3, 1, 50),
                   torch.eye(3).view(3, 1, 3).expand(3, 1, 3).repeat(1, 1, 17)[..., :50]], dim=1)
    x = (255 * x).to(torch.uint8)

    def turned(red, green, blue):
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        return colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)

    wanted = torch.tensor([turned(*pixel) for pixel in (x / 255).flatten(1).T.tolist()])
    found = apply("shift_hue", x, shift)
    assert (found - 255 * wanted.T.view_as(x)).abs().max() < 2
    assert (found - 255 * wanted.T.view_as(x)).abs().mean() < 0.6


def test_hues_turn_as_far_as_torchvisions():
    wanted = as_tensor(functional.adjust_hue(photo(), 0.2)).float()
    assert (apply("shift_hue", as_tensor(photo()), 0.2) - wanted).abs().mean() < 2


@pytest.mark.parametrize("steps", [
    [T.RandomResizedCrop(32, scale=(0.7, 1.0))], [T.Resize((32, 32))],
    [T.Resize((36, 36)), T.RandomResizedCrop(32, scale=(0.7, 1.0))]], ids=len)
def test_crops_are_torchvisions_on_pillow_but_for_rounding(steps, monkeypatch):
    monkeypatch.setattr(T.RandomResizedCrop, "get_params", staticmethod(
        lambda image, scale, ratio: augmentation.window(image.height, image.width, scale, ratio)))
    for seed in range(10):
        torch.manual_seed(seed)
        wanted = as_tensor(T.Compose(steps)(photo())).int()
        torch.manual_seed(seed)
        ours = augmentation.Geometry(steps)(photo())
        assert ours.dtype == torch.uint8 and (ours.int() - wanted).abs().max() <= 2


@pytest.mark.parametrize("height, width", [(40, 30), (20, 50)])
def test_windows_are_drawn_as_torchvisions_are(height, width):
    n, scale, ratio = 3000, (0.5, 1.0), (3 / 4, 4 / 3)
    image = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    wanted, found = (torch.tensor([draw() for _ in range(n)]).float() for draw in (
        lambda: T.RandomResizedCrop.get_params(image, scale, ratio),
        lambda: augmentation.window(height, width, scale, ratio)))
    for moment in (1, 2):
        a, b = wanted**moment, found**moment
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * ((a.var(0) + b.var(0)) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("height, width", [(4, 100), (100, 4)])
def test_an_image_that_no_window_fits_is_cut_in_the_middle_as_torchvision_does(height, width):
    scale, ratio = (0.9, 1.0), (3 / 4, 4 / 3)
    wanted = T.RandomResizedCrop.get_params(Image.new("RGB", (width, height)), scale, ratio)
    assert augmentation.window(height, width, scale, ratio) == wanted


def unnormalized(x):
    return x * STD + MEAN


def test_brightness_is_uniform_and_gray_images_keep_their_gray():
    x = torch.full((4000, 3, 2, 2), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    values = unnormalized(augmentation.distorted(x)) * 255
    assert (values.amax((1, 2, 3)) - values.amin((1, 2, 3))).max() < 0.1
    found = (values.mean((1, 2, 3)) / 100).sort().values
    uniform = torch.linspace(0.7, 1.3, 4000)
    assert (found - uniform).abs().max() < 0.6 * 1.95 / 4000**0.5  # Kolmogorov-Smirnov, 0.1 %


def test_half_of_all_images_are_flipped_and_a_tenth_are_gray():
    x = torch.zeros(4000, 3, 1, 2, dtype=torch.uint8)
    x[:, 0, :, 0] = 250
    torch.manual_seed(0)
    y = unnormalized(augmentation.distorted(x))
    flipped = y.amax(1)[:, 0, 1] > y.amax(1)[:, 0, 0]
    gray = (y.amax(1) - y.amin(1)).amax((1, 2)) < 1e-3
    for share, wanted in ((flipped, 0.5), (gray, 0.1)):
        assert abs(share.float().mean() - wanted) < 4 * (wanted * (1 - wanted) / 4000)**0.5


def statistics(x):
    """Rows (N, 13): each image's channel means, spreads, their correlations, and two corners."""
    flat = unnormalized(x).flatten(2)
    centred = flat - flat.mean(2, keepdim=True)
    products = (centred[:, [0, 0, 1]] * centred[:, [1, 2, 2]]).mean(2)
    return torch.cat([flat.mean(2), flat.std(2), products, flat[:, :2, 0], flat[:, :2, -1]], dim=1)


def test_distorted_images_have_the_statistics_of_domainbeds():
    image, n = photo(3, 12, 12), 3000
    theirs = images.make_transform([], augment=True)
    torch.manual_seed(0)
    wanted = statistics(torch.stack([theirs(image) for _ in range(n)]))
    found = statistics(augmentation.distorted(as_tensor(image).expand(n, 3, 12, 12)))
    for moment in (1, 2):
        a, b = wanted**moment, found**moment
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        # Pillow rounds down three times: it is darker by up to 1.5 of 255.
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * error + 2 / 255).all()


def test_without_kernels_images_on_a_gpu_are_distorted_alike_and_without_waiting(monkeypatch):
    x = torch.stack([as_tensor(photo(seed, 12, 12)) for seed in range(20)])
    torch.manual_seed(0)
    wanted = augmentation.distorted(x)

    def waits(self):
        raise AssertionError("this would wait for the GPU")

    monkeypatch.setattr(augmentation, "kernels_run", lambda device, shape: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    distort = augmentation._distort

    def checked(*args):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "__float__", "__bool__", "tolist"):
                patch.setattr(torch.Tensor, name, waits)
            distort(*args)

    monkeypatch.setattr(augmentation, "_distort", checked)
    torch.manual_seed(0)
    torch.testing.assert_close(augmentation.distorted(x), wanted)


def test_kernels_that_cannot_be_compiled_are_named_once(capsys):
    augmentation.kernels_run.cache_clear()
    for _ in range(2):  # Triton has no driver for a CPU
        assert not augmentation.kernels_run(torch.device("cpu"), torch.Size([3, 8, 8]))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Install a C compiler and Python's headers" in said


KERNELS = """
import itertools, sys, torch
from domainbed_kd import datasets
from domainbed_kd.run import kernels
x, settings = torch.load(sys.argv[1])
torch.save(kernels.distort(x, settings, datasets.IMAGENET_MEAN, datasets.IMAGENET_STD), sys.argv[2])
"""


@pytest.fixture(scope="module")
def by_kernels(tmp_path_factory):
    """(images, their settings, the kernels' result): on a GPU, or by Triton's interpreter."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("kernels")
    orders = torch.tensor(list(itertools.permutations(range(4))))
    n = len(orders)
    x = torch.stack([as_tensor(photo(seed, 37, 33)) for seed in range(n)])
    generator = torch.Generator().manual_seed(0)
    factors = torch.empty(n, 4).uniform_(0.7, 1.3, generator=generator) - torch.tensor([0, 0, 0, 1])
    flips, grays = torch.arange(n)[:, None] % 2, torch.arange(n)[:, None] % 5 == 0
    settings = torch.cat([orders, factors, flips, grays], dim=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.save((x.to(device), settings.to(device)), folder / "in")
    subprocess.run(
        [sys.executable, "-c", KERNELS, folder / "in", folder / "out"], check=True,
        env=os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"}))
    return x, settings, torch.load(folder / "out").cpu()


def test_kernels_distort_as_operations_on_one_image_do(by_kernels):
    x, settings, found = by_kernels
    wanted = torch.empty(x.shape)
    for i, (*values, flip, gray) in enumerate(settings.tolist()):
        part = slice(i, i + 1)
        augmentation._distort(augmentation.Jitter(x[part]), x[part], wanted[part], flip, gray,
                              [int(place) for place in values[:4]], values[4:])
    errors = (unnormalized(found) - unnormalized(wanted)).abs() * 255
    assert errors.max() < 4 and errors.mean() < 0.4  # of hues, one rounds to whole colours


def test_kernels_do_what_torchvision_does_to_float_images(by_kernels):
    operations = list(THEIRS.values())
    for image, row, found in zip(*by_kernels):
        *values, flip, gray = row.tolist()
        wanted = image / 255
        for i in map(int, values[:4]):
            wanted = operations[i](wanted, values[4 + i])
        wanted = wanted.flip(-1) if flip else wanted
        wanted = functional.rgb_to_grayscale(wanted, 3) if gray else wanted
        # torchvision's shares of red, green and blue are rounded to four digits.
        torch.testing.assert_close(unnormalized(found), wanted, rtol=0, atol=5e-4)


SIZES = [(40, 30), (33, 50), (32, 32), (90, 41), (20, 7)]


@pytest.mark.parametrize("side", [32, 17])
def test_images_of_several_sizes_are_resized_as_pillow_does_each(side):
    pictures = [photo(seed, height, width) for seed, (height, width) in enumerate(SIZES)]
    x = torch.randint(256, (len(SIZES), 90, 50, 3), dtype=torch.uint8)  # what is beside is not read
    for row, picture in zip(x, pictures):
        row[:picture.height, :picture.width] = torch.from_numpy(np.array(picture))
    heights, widths = torch.tensor(SIZES).T
    found = augmentation.resized(x, heights, widths, side)
    wanted = torch.stack([as_tensor(T.Resize((side, side))(picture)) for picture in pictures])
    assert found.dtype == torch.uint8 and (found.int() - wanted.int()).abs().max() <= 1


def test_images_are_normalized_and_random_numbers_come_from_the_global_stream():
    x = torch.randint(0, 256, (5, 3, 9, 9), dtype=torch.uint8)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(augmentation.distorted(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float32
    values = 255 * unnormalized(draws[0])
    assert -1 < values.min() and values.max() < 256  # rounding a clipped colour may lead out


# In a run.


def test_only_domains_that_are_augmented_change(root, tmp_path):  # noqa: F811
    for cache in (None, tmp_path / "cache"):
        dataset = read(root, cache, test_envs=[1], augment=True)
        before = [dataset[1][i][0] for i in range(len(dataset[1]))]
        plain = [datasets.plain(dataset[0])[i][0] for i in range(len(dataset[0]))]
        augmentation.speed_up(dataset)
        assert dataset[0][0][0].dtype == torch.uint8 and dataset[0][0][0].shape == (3, 32, 32)
        assert all(torch.equal(dataset[1][i][0], x) for i, x in enumerate(before))
        assert all(torch.equal(datasets.plain(dataset[0])[i][0], x) for i, x in enumerate(plain))


def test_a_fast_run_is_the_same_with_a_cache_or_without(root, tmp_path):  # noqa: F811
    without = run(tmp_path / "without", root, "--fast")
    cache = ["--image_cache", str(tmp_path / "cache"), "--loader_processes", "2"]
    assert run(tmp_path / "with", root, "--fast", *cache) == without and len(without) == 2
