"""Images with masks: five collections in their own layouts, and folders of a user's own."""

import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed_kd import datasets
from domainbed_kd.datasets import masks
from domainbed_kd.run import splits
from domainbed_kd.scripts import collect_results, train
from domainbed_kd.tasks import IGNORED

HPARAMS = {"data_augmentation": True, "image_size": 32}


def picture(path, size=(48, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (*size[::-1], 3), np.uint8)).save(path)


def mask(path, values, size=(48, 32), palette=False):
    """Columns of equal width, one for each value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.repeat(np.array(values, np.uint8), size[0] // len(values))
    columns = np.resize(columns, size[0])
    image = Image.fromarray(np.tile(columns, (size[1], 1)))
    if palette:
        image.putpalette(np.random.RandomState(1).randint(0, 255, 768).tolist())
    image.save(path)


def synthia(path, values, size=(48, 32), channels=3):
    """Channels of 16 bits: the class and, if there are more, an instance and nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], channels), ">u2")
    pixels[..., 0] = np.repeat(values, size[0] // len(values))[:size[0]]
    pixels[..., 1:2] = 700
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    colours = {1: 0, 2: 4, 3: 2}[channels]  # grey, grey with alpha, RGB
    head = struct.pack(">IIBBBBB", *size, 16, colours, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.fixture
def streets(tmp_path):
    """The five collections, a handful of images each; values and classes as the maps say."""
    root = tmp_path / "street_scenes"
    for part, n in (("train", 6), ("valid", 2)):
        for i in range(n):
            picture(root / f"gtav/images/{part}/01/{i}.png")
            mask(root / f"gtav/labels/{part}/01/{i}.png", [7, 26, 0, 33], palette=True)
    for i in range(7):
        picture(root / f"synthia/RGB/{i}.png")
        synthia(root / f"synthia/GT/LABELS/{i}.png", [3, 8, 0, 22])
    for part, n in (("train", 5), ("val", 2)):
        for i in range(n):
            picture(root / f"cityscapes/leftImg8bit/{part}/ulm/{i}_leftImg8bit.png")
            mask(root / f"cityscapes/gtFine/{part}/ulm/{i}_gtFine_labelIds.png", [7, 26, 4, 33])
            picture(root / f"bdd100k/images/10k/{part}/{i}.jpg")
            mask(root / f"bdd100k/labels/sem_seg/masks/{part}/{i}.png", [0, 13, 255, 18])
    for part, n in (("training", 5), ("validation", 2)):
        for i in range(n):
            picture(root / f"mapillary/{part}/images/{i}.jpg", (64, 48))
            mask(root / f"mapillary/{part}/labels/{i}.png", [13, 55, 65, 52], (64, 48))
    return tmp_path


def build(root, test_envs=(), **hparams):
    return datasets.get_dataset_class("StreetScenes")(root, list(test_envs), HPARAMS | hparams)


def test_every_collections_labels_become_the_same_classes(streets):
    wanted = {"gtav": {0, 13, 18, IGNORED}, "synthia": {0, 13, IGNORED},
              "cityscapes": {0, 13, 18, IGNORED}, "bdd100k": {0, 13, 18, IGNORED},
              "mapillary": {0, 13, 18, IGNORED}}
    dataset = build(streets, [0, 1, 2, 3, 4])
    for name, domain in zip(dataset.ENVIRONMENTS, dataset):
        x, y = domain[0]
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert set(y.unique().tolist()) == wanted[name]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_of_16_bit_masks_the_first_channel_is_the_class(channels, tmp_path):
    synthia(tmp_path / "mask.png", [3, 8, 0, 300], channels=channels)
    assert set(np.unique(masks.load_mask(str(tmp_path / "mask.png")))) == {0, 3, 8, 255}


@pytest.mark.parametrize("name, train, val", [
    ("gtav", ("images/train/01/7.png", "labels/train/01/7.png"),
     ("images/valid/02/7.png", "labels/valid/02/7.png")),
    ("gtav", ("images/7.png", "labels/7.png"), None),
    ("synthia", ("RGB/train/7.png", "GT/LABELS/train/7.png"),
     ("RGB/val/7.png", "GT/LABELS/val/7.png")),
    ("synthia", ("RGB/7.png", "GT/LABELS/7.png"), None),
    ("cityscapes",
     ("leftImg8bit/train/ulm/7_leftImg8bit.png", "gtFine/train/ulm/7_gtFine_labelIds.png"),
     ("leftImg8bit/val/bonn/7_leftImg8bit.png", "gtFine/val/bonn/7_gtFine_labelIds.png")),
    ("bdd100k", ("images/train/7.jpg", "labels/train/7_train_id.png"),
     ("images/val/7.jpg", "labels/val/7_train_id.png")),
    ("bdd100k", ("images/10k/train/7.jpg", "labels/sem_seg/masks/train/7.png"),
     ("images/10k/val/7.jpg", "labels/sem_seg/masks/val/7.png")),
    ("mapillary", ("training/images/7.jpg", "training/labels/7.png"),
     ("validation/images/7.jpg", "validation/labels/7.png"))])
def test_each_layout_of_a_collection_is_read(name, train, val, streets):
    folder = streets / "street_scenes" / name
    shutil.rmtree(folder)
    parts = [train, val] if val else [train]
    for image, label in parts:
        picture(folder / image)
        mask(folder / label, [0, 7])
    domain = build(streets)[datasets.get_dataset_class("StreetScenes").ENVIRONMENTS.index(name)]
    assert domain.pairs == [(str(folder / image), str(folder / label)) for image, label in parts]
    assert domain.n_train == (1 if val else None)


@pytest.mark.parametrize("names, table", [
    (("cityscapes", "gtav"),
     "7:0 8:1 11:2 12:3 13:4 17:5 19:6 20:7 21:8 22:9 23:10 24:11 25:12 26:13 27:14 28:15 31:16 "
     "32:17 33:18"),
    (("synthia",),
     "1:10 2:2 3:0 4:1 5:4 6:8 7:5 8:13 9:7 10:11 11:18 12:17 15:6 16:9 17:12 18:14 19:15 20:16 "
     "21:3"),
    (("bdd100k",), " ".join(f"{i}:{i}" for i in range(19))),
    (("mapillary",),
     "13:0 24:0 41:0 2:1 15:1 17:2 6:3 3:4 45:5 47:5 48:6 50:7 30:8 29:9 27:10 19:11 20:12 21:12 "
     "22:12 55:13 61:14 54:15 58:16 57:17 52:18")])
def test_labels_are_mapped_as_robustnet_maps_them(names, table):
    published = {int(value): int(i) for value, i in (pair.split(":") for pair in table.split())}
    for name in names:
        assert datasets.get_dataset_class("StreetScenes").TRAIN_IDS[name] == published


def test_a_whole_image_is_resized_and_its_mask_is_not(streets):
    x, y = build(streets, [0, 1, 2, 3, 4])[4][0]
    assert x.shape == (3, 32, 48) and y.shape == (48, 64)  # 42.7 is 48 at a multiple of 16


def test_crops_move_images_and_masks_together(tmp_path):
    """Of an image that is its own mask, every crop still is."""
    for i in range(2):
        for name in ("a", "b"):
            values = np.kron(np.random.RandomState(i).randint(0, 3, (8, 12)), np.ones((8, 8)))
            (tmp_path / "own" / name / "images").mkdir(parents=True, exist_ok=True)
            (tmp_path / "own" / name / "labels").mkdir(parents=True, exist_ok=True)
            Image.fromarray((100 * values).astype(np.uint8)).convert("RGB").save(
                tmp_path / "own" / name / "images" / f"{i}.png")
            Image.fromarray(values.astype(np.uint8)).save(
                tmp_path / "own" / name / "labels" / f"{i}.png")
    (tmp_path / "own" / "classes.txt").write_text("low\nmiddle\nhigh\n")
    dataset = datasets.get_dataset_class("FolderSeg:own")(
        tmp_path, [1], HPARAMS | {"view_jitter": 0, "view_gray": 0, "image_size": 64})
    assert dataset.class_names == ["low", "middle", "high"]
    assert datasets.class_names("FolderSeg:own", tmp_path) == dataset.class_names
    torch.manual_seed(0)
    mean, std = dataset.NORMALIZATION
    n_ignored = 0
    for _ in range(20):
        x, y = dataset[0][0]
        assert x.shape == (3, 64, 64) and y.shape == (64, 64)
        gray = 255 * (x[0] * std[0] + mean[0])
        seen = y != IGNORED
        n_ignored += (~seen).sum().item()
        assert (gray[~seen].abs() < 1).all()  # outside the image
        away = (gray - 100 * y).abs()[seen]
        assert (away < 40).float().mean() > 0.8  # all but edges, which are blurred
    assert n_ignored > 0


def test_collections_are_split_as_they_are_published(streets):
    made = splits.make_splits(build(streets, [2, 3]), [2, 3], 0, 0.2)
    sizes = [(len(a), len(b)) for a, b in zip(made.in_, made.out)]
    assert sizes == [(6, 2), (6, 1), (2, 1), (2, 1), (5, 2)]  # synthia has no parts of its own
    dataset = made.in_[2].underlying_dataset
    assert all("/val/" in dataset.pairs[key][0] for key in made.in_[2].keys)
    assert all("/train/" in dataset.pairs[key][0] for key in made.out[2].keys)
    again = splits.make_splits(build(streets, [2, 3]), [2, 3], 7, 0.2)
    assert again.out[2].keys == made.out[2].keys


def test_deeplab_trains_on_two_collections_and_is_tested_on_three(streets, capsys):
    flags = ["--dataset", "StreetScenes", "--data_dir", str(streets), "--test_envs", "2", "3", "4",
             "--steps", "2", "--checkpoint_freq", "1", "--hparams", json.dumps({
                 "image_size": 80, "batch_size": 2, "weights": "none", "resnet18": True,
                 "resnet50_augmix": False})]
    out = streets / "sweep" / "run"
    assert train.main([*flags, "--output_dir", str(out)]) == 0
    record = json.loads((out / "results.jsonl").read_text().splitlines()[-1])
    assert record["metric"] == "miou" and 0 <= record["env4_in_acc"] <= 1
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(streets / "sweep")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ERM"))
    assert "X" not in line  # gtav and synthia, which all runs train on, have no columns
    assert f"{100 * record['env2_in_acc']:.1f}" in line


@pytest.mark.parametrize("change, says", [
    (lambda own: (own / "classes.txt").unlink(), "classes.txt is not there"),
    (lambda own: next((own / "a" / "labels").glob("*")).unlink(), "Each image needs its mask"),
    (lambda own: picture(own / "a" / "labels" / "0.png"), "holds colours"),
    (lambda own: mask(own / "a" / "labels" / "0.png", [0, 1], (16, 16)), "its image 48 x 32"),
    (lambda own: mask(own / "a" / "labels" / "0.png", [255]), "held no labelled pixel"),
    (lambda own: (own / "a" / "labels" / "0.png").write_text("no"), "cannot be read as a mask")])
def test_what_is_wrong_with_a_folder_is_said_in_one_line(change, says, tmp_path):
    own = tmp_path / "own"
    for name in ("a", "b"):
        picture(own / name / "images" / "0.png")
        mask(own / name / "labels" / "0.png", [0, 1])
    (own / "classes.txt").write_text("sky\nground\n")
    change(own)
    with pytest.raises((FileNotFoundError, ValueError), match=says) as error:
        _ = datasets.get_dataset_class("FolderSeg:own")(tmp_path, [1], HPARAMS)[0][0]
    assert "\n" not in str(error.value)


def test_a_value_that_is_no_class_is_ignored(tmp_path):
    mask(tmp_path / "mask.png", [0, 1, 7, 255])
    values = masks.load_mask(str(tmp_path / "mask.png"))
    found = np.frombuffer(masks.table({0: 0, 1: 1}), np.uint8)[values]
    assert set(np.unique(found)) == {0, 1, 255}
