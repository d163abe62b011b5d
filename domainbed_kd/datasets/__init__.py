"""The datasets: DomainBed's, a user's own image folders, and digits that ship with the package.

Names, domain order, transforms, folder layouts and evaluation intervals are DomainBed's
(https://github.com/facebookresearch/DomainBed). A dataset is a list of domains ("environments");
a domain is a map-style dataset of (x, y): float32 (C, H, W) and a class index. A dataset's
properties (small images, side, files) are attributes of its class: see base.py.
torch is imported when a dataset is built, not with this module.
"""

from collections.abc import Collection
from pathlib import Path

from domainbed_kd.console import did_you_mean
from domainbed_kd.datasets.base import MultipleDomainDataset, plain
from domainbed_kd.datasets.digits import DigitsDG, DigitsSeg
from domainbed_kd.datasets.image_folders import (
    PACS,
    SVIRO,
    VLCS,
    DomainNet,
    ImageFolders,
    OfficeHome,
    TerraIncognita,
)
from domainbed_kd.datasets.images import IMAGENET_MEAN, IMAGENET_STD, ImageList, load_image
from domainbed_kd.datasets.masks import FolderSeg, StreetScenes
from domainbed_kd.datasets.small import CIFAR, ColoredMNIST, Debug28, Debug224, RotatedMNIST
from domainbed_kd.datasets.spawrious import (
    SpawriousM2M_easy,
    SpawriousM2M_hard,
    SpawriousM2M_medium,
    SpawriousO2O_easy,
    SpawriousO2O_hard,
    SpawriousO2O_medium,
)
from domainbed_kd.datasets.wilds import WILDSCamelyon, WILDSFMoW

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageFolders", "ImageList", "MultipleDomainDataset",
           "load_image", "plain"]

# DomainBed's datasets in its order, which its tables and a sweep's jobs follow.
_DOMAINBED = (
    Debug28, Debug224, ColoredMNIST, RotatedMNIST, VLCS, PACS, OfficeHome, TerraIncognita,
    DomainNet, SVIRO, WILDSCamelyon, WILDSFMoW, SpawriousO2O_easy, SpawriousO2O_medium,
    SpawriousO2O_hard, SpawriousM2M_easy, SpawriousM2M_medium, SpawriousM2M_hard)
DOMAINBED = tuple(cls.__name__ for cls in _DOMAINBED)
_CLASSES: dict[str, type[MultipleDomainDataset]] = {
    cls.__name__: cls for cls in (*_DOMAINBED, DigitsDG, DigitsSeg, StreetScenes, CIFAR)}
DATASETS: list[str] = list(_CLASSES)
#: Classes that read a user's own images, by the word before the colon in "Folder:NAME".
OWN = {"Folder": ImageFolders, "FolderSeg": FolderSeg}


def register(cls: type[MultipleDomainDataset]) -> type[MultipleDomainDataset]:
    """Adds a dataset class under its name; usable as a decorator."""
    if cls.__name__ not in DATASETS:
        DATASETS.append(cls.__name__)
    _CLASSES[cls.__name__] = cls
    return cls


def get_dataset_class(name: str, data_dir: str | Path | None = None
                      ) -> type[MultipleDomainDataset]:
    """The class with this name; for "Folder:NAME", a class of OWN that reads `<data_dir>/NAME`.

    For an unknown name, the message points to a folder in `data_dir` with that name.

    Raises:
        NotImplementedError: if there is none; the message suggests the nearest known name.
        ValueError: if NAME is not the name of a folder.
    """
    kind, colon, folder = name.partition(":")
    if colon and kind in OWN:
        if folder in ("", ".", "..") or "/" in folder or "\\" in folder:
            raise ValueError(f"{name}: after '{kind}:' comes the name of a folder in the data "
                             "directory, without a path.")
        return type(name, (OWN[kind],), {"FOLDER": folder, "__doc__": f"Images in {folder}."})
    if name not in _CLASSES:
        hint = did_you_mean(name, DATASETS)
        if data_dir and name and Path(data_dir, name).is_dir():
            hint = f" To read the images in {Path(data_dir, name)}, say Folder:{name}."
        raise NotImplementedError(
            f"Dataset not found: {name}.{hint} Known: {', '.join(DATASETS)}, Folder:NAME for "
            "images of your own in DATA_DIR/NAME, or FolderSeg:NAME for images with masks.")
    return _CLASSES[name]


def facts(name: str) -> type[MultipleDomainDataset]:
    """The class that holds a dataset's properties; the base class for an unknown name.

    Unknown names are a fork's datasets, whose hparams are drawn here too.
    """
    kind, colon, _ = name.partition(":")
    return _CLASSES.get(name) or (OWN.get(kind) if colon else None) or MultipleDomainDataset


def environments(name: str, data_dir: str | Path | None = None) -> list[str]:
    """Short labels of a dataset's domains, in order; folder names for "Folder:NAME".

    Raises:
        ValueError, FileNotFoundError: if the class names no domains, or the required folder is
            missing or not given.
    """
    cls = get_dataset_class(name)
    labels = cls.ENVIRONMENTS or cls.domain_folders(data_dir)
    if not labels:
        raise ValueError(f"{name}: its class does not name its domains. Set ENVIRONMENTS on it.")
    return list(labels)


def num_environments(name: str, data_dir: str | Path | None = None) -> int:
    """How many domains a dataset has; "Folder:NAME" needs `data_dir`."""
    return len(environments(name, data_dir))


def check_test_envs(name: str, n_envs: int, test_envs: Collection[int]) -> None:
    """Refuses test domains that do not exist, and holding out every domain."""
    asked = f"--test_envs {' '.join(map(str, test_envs))}"
    if not set(test_envs) <= set(range(n_envs)):
        raise ValueError(f"{asked}: {name} has environments 0 to {n_envs - 1}.")
    if len(set(test_envs)) == n_envs:
        raise ValueError(f"{asked} holds out all of {name}: no environment is left to train on.")


def class_names(name: str, data_dir: str | Path | None = None) -> list[str]:
    """A dataset's classes as words, in label order; "Folder:NAME" needs `data_dir`."""
    cls = get_dataset_class(name)
    return cls.words(cls.CLASSES or cls.read_classes(data_dir))


def domain_names(name: str) -> list[str] | None:
    """A dataset's domains as words, in order; None where names do not describe the images."""
    names = get_dataset_class(name).DOMAIN_NAMES
    return None if names is None else list(names)
