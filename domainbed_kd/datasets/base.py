"""The base of every dataset: a list of domains, and facts on its class."""

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

    A shallow copy; where there is no augmentation to leave out, the argument itself.
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
    """The origin of a dataset's files."""

    size: str
    #: Who fetches them, one of `sources.FETCHERS`, or "by hand".
    via: str
    licence: str
    page: str
    #: What is fetched: a file's id at Google Drive, or names of datasets in the package wilds or
    #: torchvision.
    id: str = ""
    #: The name that the archive gets, and the folder in it that becomes the dataset's.
    archive: str = ""
    inside: str = ""
    #: For who fetches them by hand: what lies below the dataset's folder, and what else to know.
    layout: str = ""
    note: str = ""


class MultipleDomainDataset:
    """A list of domains.

    A subclass fills `self.datasets`, `self.input_shape` (C, H, W) and `self.num_classes` in
    `__init__(root, test_envs, hparams)`. The class attributes below say what is true of it; the
    package reads them and asks for no dataset by name, so a user's own class may set them too.
    """

    #: What its labels are, and what is measured.
    TASK: Task = CLASSIFICATION
    #: Steps of a run, and between two evaluations.
    N_STEPS = 5001
    CHECKPOINT_FREQ = 100
    #: Images at a time in an evaluation; 1 where sizes differ.
    EVALUATION_BATCH = 64
    #: Streams of random numbers that a loader simulates: DomainBed's eight workers.
    N_WORKERS = 8
    #: Whether the images are small: DomainBed's hparams then have a larger lr and batch.
    SMALL_IMAGES = False
    #: The images' side in pixels; None where hparams["image_size"] sets it, 224 by default.
    SIDE: int | None = None
    #: Random batch sizes are at most 2 ** this; 2 ** 9 for small images.
    MAX_LOG2_BATCH = 5.5
    #: Hparams that differ from DomainBed's for images of its size: {name: (default, draw)}.
    HPARAMS: dict[str, tuple[Any, Any]] = {}
    #: Whether it is read from files, and the folder below the data directory that holds them.
    NEEDS_FILES = False
    FOLDER = ""
    #: Where its files come from; None if it needs none, or they are somebody's own.
    SOURCE: Source | None = None
    #: Published numbers of images by domain; by class in label order where these are known.
    PUBLISHED: dict[str, int | tuple[int, ...]] = {}
    #: The CLIP that knows its classes, if it is not a public one; None leaves that to the method.
    CLIP_BACKBONE: str | None = None
    #: Short labels of the domains, in order.
    ENVIRONMENTS: list[str] | None = None
    #: Where DomainBed states the shape (C, H, W) on the class.
    INPUT_SHAPE: tuple[int, ...] | None = None
    #: The classes' folder names in label order, and words where these differ from the names.
    CLASSES: tuple[str, ...] = ()
    WORDS: dict[str, str] = {}
    #: The domains as words, in order.
    DOMAIN_NAMES: tuple[str, ...] | None = None
    #: (mean, std) per channel that images in [0, 1] were normalized with; None if they were not.
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
        """The names of the domains' folders, in order; none where domains are not folders."""
        return []

    @classmethod
    def read_classes(cls, data_dir: str | Path | None) -> list[str]:
        """The classes' folder names, in label order; none where files do not tell them."""
        return []

    @classmethod
    def words(cls, classes: Iterable[str]) -> list[str]:
        """The words for classes' folder names: "Alarm_Clock" is an "alarm clock"."""
        return [cls.WORDS.get(c, c.replace("_", " ").lower()) for c in classes]

    @property
    def class_names(self) -> list[str] | None:
        """The classes as words, in label order."""
        return self.words(self.CLASSES) or None

    @property
    def domain_names(self) -> list[str] | None:
        """The domains as words, in order; None where their names do not describe their look."""
        return None if self.DOMAIN_NAMES is None else list(self.DOMAIN_NAMES)

    def __getitem__(self, index: int) -> "Dataset[tuple[Tensor, Any]]":
        return self.datasets[index]

    def __len__(self) -> int:
        return len(self.datasets)
