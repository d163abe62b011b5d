"""The base class of all datasets: a list of domains, with the dataset's properties on the class."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from domainbed_kd.tasks import CLASSIFICATION, Task

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset


def plain(dataset: Any) -> Any:
    """The images of a domain, or of a split of one, without augmentation.

    A shallow copy, or the argument itself where images are not augmented.
    """
    if hasattr(dataset, "underlying_dataset"):
        same = copy.copy(dataset)
        same.underlying_dataset = plain(dataset.underlying_dataset)
        return same
    if hasattr(dataset, "plain"):
        return dataset.plain()
    if not hasattr(dataset, "plain_transform"):
        return dataset
    same = copy.copy(dataset)
    same.transform = dataset.plain_transform
    return same


class Source(NamedTuple):
    """Where a dataset's files come from."""

    size: str
    #: How they are fetched: a key of `sources.FETCHERS`, or "by hand".
    via: str
    licence: str
    page: str
    #: A Google Drive file id, or dataset names in the package wilds or torchvision.
    id: str = ""
    #: The archive's file name, and the folder in it that becomes the dataset's.
    archive: str = ""
    inside: str = ""
    #: For fetching by hand: the layout below the dataset's folder, and advice.
    layout: str = ""
    note: str = ""


class MultipleDomainDataset:
    """A list of domains.

    A subclass fills `self.datasets`, `self.input_shape` (C, H, W) and `self.num_classes` in
    `__init__(root, test_envs, hparams)`. The class attributes below describe it. The package reads
    these instead of asking for datasets by name, so a user's own class can set them too.
    """

    #: The kind of labels, and the metric.
    TASK: Task = CLASSIFICATION
    #: Steps of a run, and steps between two evaluations.
    N_STEPS = 5001
    CHECKPOINT_FREQ = 100
    #: Evaluation batch size; 1 where image sizes differ.
    EVALUATION_BATCH = 64
    #: Workers whose random streams a loader simulates: DomainBed's eight.
    N_WORKERS = 8
    #: Whether images are small: DomainBed's hparams then have a larger lr and batch.
    SMALL_IMAGES = False
    #: The images' side in pixels; None where hparams["image_size"] sets it, 224 by default.
    SIDE: int | None = None
    #: Random batch sizes are at most 2 ** this; 2 ** 9 for small images.
    MAX_LOG2_BATCH = 5.5
    #: Hparams that differ from DomainBed's for this image size: {name: (default, draw)}.
    HPARAMS: dict[str, tuple[Any, Any]] = {}
    #: Whether it reads files, and their folder in the data directory.
    NEEDS_FILES = False
    FOLDER = ""
    #: Where its files come from; None if it needs none, or has a user's own.
    SOURCE: Source | None = None
    #: Published image counts by domain; by class too, in label order, where these are known.
    PUBLISHED: dict[str, int | tuple[int, ...]] = {}
    #: A CLIP trained for its classes; None leaves the choice to the method.
    CLIP_BACKBONE: str | None = None
    #: Short labels of the domains, in order.
    ENVIRONMENTS: list[str] | None = None
    #: The shape (C, H, W), where DomainBed has it on the class.
    INPUT_SHAPE: tuple[int, ...] | None = None
    #: Class folder names in label order, and words for names that need other ones.
    CLASSES: tuple[str, ...] = ()
    WORDS: dict[str, str] = {}
    #: The domains as words, in order.
    DOMAIN_NAMES: tuple[str, ...] | None = None
    #: (mean, std) per channel that normalize images in [0, 1]; None if images are not normalized.
    NORMALIZATION: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    datasets: "list[Dataset[tuple[Tensor, Any]]]"
    input_shape: tuple[int, ...]
    num_classes: int

    if TYPE_CHECKING:
        def __init__(self, root: str | Path | None, test_envs: list[int],
                     hparams: dict[str, Any]) -> None: ...

    @classmethod
    def folder(cls, data_dir: str | Path | None) -> Path:
        """The folder that holds its files."""
        if data_dir is None:
            raise ValueError(f"{cls.__name__}: no data directory is given. Pass --data_dir.")
        return Path(data_dir) / cls.FOLDER

    @classmethod
    def domain_folders(cls, data_dir: str | Path | None) -> list[str]:
        """The names of the domains' folders, in order; empty where domains are not folders."""
        return []

    @classmethod
    def read_classes(cls, data_dir: str | Path | None) -> list[str]:
        """The classes' folder names, in label order; empty where files do not define them."""
        return []

    @classmethod
    def words(cls, classes: Iterable[str]) -> list[str]:
        """Words for the classes' folder names: "alarm clock" for "Alarm_Clock"."""
        return [cls.WORDS.get(c, c.replace("_", " ").lower()) for c in classes]

    @property
    def class_names(self) -> list[str] | None:
        """The classes as words, in label order."""
        return self.words(self.CLASSES) or None

    @property
    def domain_names(self) -> list[str] | None:
        """The domains as words, in order; None where names do not describe the images."""
        return None if self.DOMAIN_NAMES is None else list(self.DOMAIN_NAMES)

    def __getitem__(self, index: int) -> "Dataset[tuple[Tensor, Any]]":
        return self.datasets[index]

    def __len__(self) -> int:
        return len(self.datasets)
