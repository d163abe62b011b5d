"""Datasets of images with masks: street scenes from five collections, and a user's own folders.

A mask is a PNG with one channel that holds each pixel's class number; 255 is ignored. Masks are
resized in training only, by nearest neighbours.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from domainbed_kd.datasets.base import MultipleDomainDataset, Source
from domainbed_kd.datasets.image_folders import subfolders
from domainbed_kd.datasets.images import (
    STATISTICS,
    image_size,
    load_image,
    opened,
    statistics,
    view,
)
from domainbed_kd.tasks import IGNORED, SEGMENTATION

VOID = 255
# Image sides are multiples of this, as networks halve their maps.
MULTIPLE = 16
# How many crops of an image are tried to find one with a labelled pixel.
MOST_CROPS = 10


class MaskedImages:
    """Images with masks, by path: float32 (3, H, W) and int64 (H, W), IGNORED where not labelled.

    Args:
        pairs: the paths of each image and its mask.
        n_train: how many of these, from the first, are the collection's training images; the rest
            are its validation images. None where it does not distinguish them.
        classes: the class of each of the 256 values of a mask, VOID to ignore it.
        transform: takes and returns an image and a mask.
        plain_transform: the same without crops and distortions.

    Raises:
        ValueError: if a mask is invalid, or hardly any of its pixels are labelled.
    """

    def __init__(self, pairs: list[tuple[str, str]], n_train: int | None, classes: bytes,
                 transform: Callable, plain_transform: Callable):
        self.pairs, self.n_train, self.classes = pairs, n_train, classes
        self.transform, self.plain_transform = transform, plain_transform

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        import numpy as np
        import torch

        path, mask_path = self.pairs[i]
        image = load_image(path)
        mask = np.frombuffer(self.classes, np.uint8)[load_mask(mask_path)]
        if mask.shape != (image.height, image.width):
            raise ValueError(f"{mask_path} is {mask.shape[1]} x {mask.shape[0]} pixels, its image "
                             f"{image.width} x {image.height}. Replace it.")
        for _ in range(MOST_CROPS):
            x, y = self.transform(image, torch.from_numpy(mask))
            if self.transform is self.plain_transform or (y != VOID).any():
                return x, y.long().masked_fill(y == VOID, IGNORED)
        raise ValueError(f"{mask_path}: {MOST_CROPS} crops held no labelled pixel. Take the image "
                         "out of the training images.")


def load_mask(path: str):
    """A mask's values, uint8 (H, W), VOID for those above 255; of a palette, the indices.

    In masks with three 16-bit channels, such as SYNTHIA's, the first is the class.

    Raises:
        As `images.opened`, and ValueError if it holds colours.
    """
    import numpy as np

    with opened(path, "a mask") as image:
        values = np.asarray(image)
        if values.ndim == 3:
            import torchvision

            values = torchvision.io.decode_image(str(path), "UNCHANGED").numpy()
            values = values[0] if values.dtype == np.uint16 else values
    if values.ndim != 2:
        raise ValueError(f"{path} holds colours. A mask has one channel, of class numbers.")
    return np.where(values < VOID, values, VOID).astype(np.uint8)


def _normalized(hparams) -> Callable:
    import torch
    from torchvision.transforms import v2

    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics(hparams))])


class Together:
    """Transforms an image and its mask: the geometry of both, the colours of the image."""

    def __init__(self, steps: list, hparams):
        from torchvision.transforms import v2

        self.steps, self.last = v2.Compose(steps), _normalized(hparams)

    def __call__(self, image, mask):
        """Takes a Pillow image and a mask, uint8 (H, W); returns float32 (3, h, w) and (h, w)."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        # Wrapped, as steps ignore a plain tensor next to an image.
        image, mask = self.steps(tv_tensors.Image(functional.pil_to_tensor(image)),
                                 tv_tensors.Mask(mask))
        return self.last(image.data), mask.data


class Whole:
    """The whole image with its shorter side resized to `size`; the mask unchanged."""

    def __init__(self, size: int, hparams):
        self.size, self.last = size, _normalized(hparams)

    def __call__(self, image, mask):
        """As `Together`; both image sides are multiples of MULTIPLE."""
        from torchvision.transforms.v2 import functional

        shorter = min(image.size)
        sides = [MULTIPLE * max(1, round(self.size * side / shorter / MULTIPLE))
                 for side in (image.height, image.width)]
        pixels = functional.resize(functional.pil_to_tensor(image), sides, antialias=True)
        return self.last(pixels), mask


def crops(size: int, hparams) -> Together:
    """Square crops of `size` pixels; with augmentation from images of half to twice that size."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    if not hparams["data_augmentation"]:
        return Together([v2.Resize(size, antialias=True), v2.CenterCrop(size)], hparams)
    outside = {tv_tensors.Image: 0, tv_tensors.Mask: VOID}
    return Together([
        v2.RandomShortestSize(list(range(size // 2, 2 * size + 1, MULTIPLE)), antialias=True),
        v2.RandomCrop(size, pad_if_needed=True, fill=outside), v2.RandomHorizontalFlip(),
        v2.ColorJitter(*4 * [view(hparams, "view_jitter")]),
        v2.RandomGrayscale(view(hparams, "view_gray"))], hparams)


class MaskFolders(MultipleDomainDataset):
    """A folder of images and masks for each domain; `hparams["image_size"]` is 512 by default.

    Training uses square crops of that size. Evaluation uses whole images, with the shorter side
    resized to it; predictions are resized to the mask, which stays unchanged.

    Raises:
        FileNotFoundError: if images or masks are missing.
        ValueError: if `image_size` is not a multiple of 16.
    """

    TASK = SEGMENTATION
    CHECKPOINT_FREQ = 500
    EVALUATION_BATCH = 1
    NORMALIZATION = STATISTICS["imagenet"]
    NEEDS_FILES = True
    HPARAMS = {"lr": (1e-4, lambda r: 10 ** r.uniform(-4.5, -3)),
               "batch_size": (4, lambda r: int(2 ** r.uniform(1, 4)))}

    def __init__(self, root, test_envs, hparams):
        size = image_size(hparams, 512)
        if size % MULTIPLE:
            raise ValueError(f"hparams['image_size'] is {size}; segmentation takes a multiple of "
                             f"{MULTIPLE}, such as 512.")
        self.NORMALIZATION = statistics(hparams)
        whole, cut = Whole(size, hparams), crops(size, hparams)
        self.input_shape = (3, size, size)
        self.datasets = []
        for i, name in enumerate(self.domain_folders(root)):
            pairs, n_train, classes = self.domain(self.folder(root) / name)
            for _, mask in pairs:
                if not Path(mask).is_file():
                    raise FileNotFoundError(f"{type(self).__name__}: {mask} is not there. Each "
                                            "image needs its mask.")
            self.datasets.append(MaskedImages(
                pairs, n_train, classes, whole if i in test_envs else cut, whole))

    def domain(self, folder: Path) -> tuple[list[tuple[str, str]], int | None, bytes]:
        """The first three arguments of `MaskedImages` for a domain's folder."""
        raise NotImplementedError(f"{type(self).__name__} does not implement domain().")


def table(train_ids: dict[int, int]) -> bytes:
    """The class of each of a mask's 256 values; VOID for values without one."""
    return bytes(train_ids.get(value, VOID) for value in range(256))


class Layout(NamedTuple):
    """Where a collection's files are: patterns of image paths below its folder."""

    train: str
    #: None where the collection does not split training from validation.
    val: str | None
    #: Replacements that turn an image's path into its mask's.
    mask: dict[str, str]


_CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11,
               25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
_SYNTHIA = {1: 10, 2: 2, 3: 0, 4: 1, 5: 4, 6: 8, 7: 5, 8: 13, 9: 7, 10: 11, 11: 18, 12: 17, 15: 6,
            16: 9, 17: 12, 18: 14, 19: 15, 20: 16, 21: 3}
_MAPILLARY = {13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7,
              30: 8, 29: 9, 27: 10, 19: 11, 20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16,
              57: 17, 52: 18}


class StreetScenes(MaskFolders):
    """19 pixel classes in rendered and real street scenes, each collection in its own layout.

    `gtav` (Richter et al., ECCV 2016), `synthia` (RAND-CITYSCAPES; Ros et al., CVPR 2016),
    `cityscapes` (Cordts et al., CVPR 2016), `bdd100k` (Yu et al., CVPR 2020), `mapillary` (Vistas
    1.2; Neuhold et al., ICCV 2017). Where a collection has validation images, training domains are
    validated on them, and test domains are measured on them.
    """

    FOLDER = "street_scenes"
    SOURCE = Source("size unknown", "by hand", "those of the five collections",
                    "https://github.com/shachoi/RobustNet",
                    layout="<collection>/",
                    note="Collections: gtav, synthia, cityscapes, bdd100k and mapillary, each in "
                         "its own layout; see docs/tasks.md.")
    ENVIRONMENTS = ["gtav", "synthia", "cityscapes", "bdd100k", "mapillary"]
    N_STEPS = 40001
    CLASSES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light",
               "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
               "bus", "train", "motorcycle", "bicycle")
    num_classes = len(CLASSES)
    LAYOUTS = {
        "gtav": [Layout("images/train/**/*.png", "images/valid/**/*.png", {"images/": "labels/"}),
                 Layout("images/*.png", None, {"images/": "labels/"})],
        "synthia": [Layout("RGB/train/*.png", "RGB/val/*.png", {"RGB/": "GT/LABELS/"}),
                    Layout("RGB/*.png", None, {"RGB/": "GT/LABELS/"})],
        "cityscapes": [Layout(
            "leftImg8bit/train/*/*_leftImg8bit.png", "leftImg8bit/val/*/*_leftImg8bit.png",
            {"_leftImg8bit.png": "_gtFine_labelIds.png", "leftImg8bit/": "gtFine/"})],
        "bdd100k": [Layout("images/train/*.jpg", "images/val/*.jpg",
                           {"images/": "labels/", ".jpg": "_train_id.png"}),
                    Layout("images/10k/train/*.jpg", "images/10k/val/*.jpg",
                           {"images/10k/": "labels/sem_seg/masks/", ".jpg": ".png"})],
        "mapillary": [Layout("training/images/*.jpg", "validation/images/*.jpg",
                             {"/images/": "/labels/", ".jpg": ".png"})]}
    TRAIN_IDS = {"gtav": _CITYSCAPES, "synthia": _SYNTHIA, "cityscapes": _CITYSCAPES,
                 "bdd100k": {i: i for i in range(19)}, "mapillary": _MAPILLARY}

    @classmethod
    def domain_folders(cls, data_dir) -> list[str]:
        """The collections' names."""
        return list(cls.ENVIRONMENTS)

    def domain(self, folder: Path) -> tuple[list[tuple[str, str]], int | None, bytes]:
        """The images of the first layout whose patterns match files."""
        for layout in self.LAYOUTS[folder.name]:
            train = sorted(folder.glob(layout.train))
            val = sorted(folder.glob(layout.val)) if layout.val else []
            if train and (val or not layout.val):
                pairs = [(str(path), str(folder / _replaced(
                    path.relative_to(folder).as_posix(), layout.mask))) for path in train + val]
                n_train = len(train) if layout.val else None
                return pairs, n_train, table(self.TRAIN_IDS[folder.name])
        known = " or ".join(" and ".join(filter(None, layout[:2]))
                            for layout in self.LAYOUTS[folder.name])
        raise FileNotFoundError(f"{type(self).__name__}: {folder} holds no images; it should have "
                                f"{known}.")


def _replaced(path: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        path = path.replace(old, new, 1)
    return path


class FolderSeg(MaskFolders):
    """Images in `<data_dir>/FOLDER/<domain>/images/`, PNG masks of the same names in `labels/`.

    `<data_dir>/FOLDER/classes.txt` names a class in each line; line 1 is class 0. Domains are
    split at random, like DomainBed's.
    """

    def __init__(self, root, test_envs, hparams):
        self.names = self.read_classes(root)
        super().__init__(root, test_envs, hparams)
        self.num_classes = len(self.names)
        self.ENVIRONMENTS = self.domain_folders(root)

    @property
    def class_names(self) -> list[str]:
        """The classes as words, in label order."""
        return self.words(self.names)

    @classmethod
    def read_classes(cls, data_dir) -> list[str]:
        """The lines of classes.txt."""
        path = cls.folder(data_dir) / "classes.txt"
        if not path.is_file():
            raise FileNotFoundError(f"{cls.__name__}: {path} is not there. It names the classes, "
                                    "one a line: line 1 is class 0.")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]

    @classmethod
    def domain_folders(cls, data_dir) -> list[str]:
        """The names of the domains' folders, in order; hidden ones are left out."""
        folder = cls.folder(data_dir)
        names = subfolders(folder)
        if not names:
            raise FileNotFoundError(f"{cls.__name__}: {folder} holds no domains. Images belong in "
                                    f"{folder}/<domain>/images/, masks in <domain>/labels/.")
        return names

    def domain(self, folder: Path) -> tuple[list[tuple[str, str]], int | None, bytes]:
        """All files in `images`; a mask's values are classes."""
        paths = sorted(path for path in (folder / "images").glob("*") if path.is_file())
        if not paths:
            raise FileNotFoundError(f"{type(self).__name__}: {folder / 'images'} holds no images.")
        pairs = [(str(path), str(folder / "labels" / f"{path.stem}.png")) for path in paths]
        return pairs, None, table({i: i for i in range(len(self.names))})
