"""What hparams make of the view of training images."""

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed_kd import clip_teacher, datasets
from domainbed_kd.datasets import images
from domainbed_kd.run import build


@pytest.fixture
def folder(tmp_path):
    random = np.random.RandomState(0)
    for domain in "ab":
        for label in "xy":
            path = tmp_path / "Own" / domain / label
            path.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(random.randint(0, 256, (20, 20, 3), np.uint8)).save(
                    path / f"{i}.png")
    return tmp_path


def dataset_of(folder, **hparams):
    args = {"dataset": "Folder:Own", "data_dir": str(folder), "test_envs": [0]}
    datasets.get_dataset_class("Folder:Own", str(folder))
    return build.make_dataset(
        args, {"data_augmentation": True, "image_size": 16} | hparams)


def test_by_default_the_view_is_domainbeds(folder):
    from torchvision import transforms as T

    ours, image = dataset_of(folder)[1].transform, Image.open(folder / "Own/b/x/0.png")
    theirs = T.Compose([  # DomainBed b93c22a, datasets.py
        T.RandomResizedCrop(16, scale=(0.7, 1.0)), T.RandomHorizontalFlip(),
        T.ColorJitter(0.3, 0.3, 0.3, 0.3), T.RandomGrayscale(), T.ToTensor(),
        T.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])])
    views = []
    for transform in (ours, theirs):
        torch.manual_seed(0)
        views.append(torch.stack([transform(image) for _ in range(20)]))
    assert torch.equal(*views)


def test_without_jitter_gray_and_crop_it_is_the_image_or_its_mirror(folder):
    dataset = dataset_of(folder, view_crop=1.0, view_jitter=0.0, view_gray=0)
    [domain] = [dataset[1]]
    image = Image.open(folder / "Own/b/x/0.png")
    torch.manual_seed(0)
    views = [domain.transform(image) for _ in range(30)]
    crops = {tuple(v.shape) for v in views}
    assert crops == {(3, 16, 16)}
    plain = domain.plain_transform(image)
    whole = [v for v in views if torch.allclose(v, plain, atol=0.05)
             or torch.allclose(v, plain.flip(-1), atol=0.05)]
    assert len(whole) > 0  # of those that are wider or higher than the image, the middle is taken


@pytest.mark.parametrize("name, mean, std", [
    ("imagenet", 0.485, 0.229), ("clip", 0.48145466, 0.26862954), ("half", 0.5, 0.5)])
def test_statistics_hold_for_training_and_test_images_and_are_told_to_teachers(
        folder, name, mean, std):
    dataset = dataset_of(folder, view_statistics=name)
    image = Image.open(folder / "Own/b/x/0.png").resize((16, 16), Image.BILINEAR)
    red = (np.asarray(image)[..., 0] / 255 - mean) / std
    found = dataset[0].transform(image)[0]
    np.testing.assert_allclose(found, red, rtol=1e-4, atol=1e-5)
    known = {"normalization": dataset.NORMALIZATION}
    assert clip_teacher.normalization(known, (3, 16, 16)) == images.STATISTICS[name]


@pytest.mark.parametrize("hparams, words", [
    ({"view_crop": 2}, "view_crop"), ({"view_jitter": 0.6}, "from 0 to 0.5"),
    ({"view_gray": "no"}, "view_gray"), ({"view_statistics": "zero"}, "imagenet, clip, half")])
def test_what_is_no_view_is_refused(folder, hparams, words):
    with pytest.raises(ValueError, match=words):
        dataset_of(folder, **hparams)


def test_a_view_is_refused_where_it_has_no_meaning(folder):
    with pytest.raises(ValueError, match="its images are not augmented"):
        build.make_dataset({"dataset": "Debug28", "data_dir": None, "test_envs": [0]},
                           {"view_crop": 0.5})
    with pytest.raises(ValueError, match="--fast distorts"):
        build.check_view(datasets.get_dataset_class("PACS"), {"view_jitter": 0.0}, True)
    build.check_view(datasets.get_dataset_class("PACS"), {"view_crop": 0.1}, True)


def test_a_teacher_of_other_statistics_is_refused(folder, tmp_path):
    import json

    from domainbed_kd.scripts import train

    small = {"batch_size": 1, "image_size": 32, "wrn_depth": 10, "wrn_widen": 1}
    flags = ["--dataset", "Folder:Own", "--data_dir", str(folder), "--test_envs", "0", "--steps",
             "1", "--holdout_fraction", "0.5"]
    assert train.main(["--algorithm", "ERM", *flags, "--output_dir", str(tmp_path / "half"),
                       "--hparams", json.dumps(small | {"view_statistics": "half"})]) == 0
    with pytest.raises(ValueError, match="the student's have 'imagenet'"):
        train.main(["--algorithm", "KD", *flags, "--output_dir", str(tmp_path / "kd"),
                    "--teacher", str(tmp_path / "half"), "--hparams", json.dumps(small)])
