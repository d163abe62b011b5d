"""Spawrious: dogs with misleading backgrounds, in six variants."""

from pathlib import Path

from domainbed_kd.datasets.base import MultipleDomainDataset, Source
from domainbed_kd.datasets.images import (
    STATISTICS,
    ImageList,
    image_size,
    make_transform,
    statistics,
)


class _Spawrious(MultipleDomainDataset):
    """Four breeds of dogs, whose backgrounds change between training and test.

    Lynch et al., "Spawrious", 2023, https://arxiv.org/abs/2303.05470. Images are read from
    `<data_dir>/{0|1}/<background>/<breed>/`. The first domain is the test domain, regardless of
    `test_envs`. Files are sorted by name; DomainBed uses the disk's order.
    """

    ENVIRONMENTS = ["Test", "SC_group_1", "SC_group_2"]
    CLASSES = ("bulldog", "corgi", "dachshund", "labrador")
    num_classes = len(CLASSES)
    NORMALIZATION = STATISTICS["imagenet"]
    NEEDS_FILES = True
    SOURCE = Source("size unknown", "by hand", "see its page",
                    "https://github.com/aengusl/spawrious", layout="<0 or 1>/<background>/<breed>/")
    #: The breeds' order in the lists of backgrounds below.
    BREEDS = ("bulldog", "dachshund", "labrador", "corgi")
    N_IMAGES = 3168
    #: Each breed's background in training and test, and the one that all share in training.
    TRAIN: tuple = ()
    TEST: tuple = ()
    FILLER = ""

    def __init__(self, root, test_envs, hparams):
        from torchvision import transforms as T

        size = image_size(hparams)
        self.NORMALIZATION = statistics(hparams)
        resize = T.Resize((size, size))
        plain_transform = make_transform([resize], augment=False, hparams=hparams)
        training_transform = make_transform(
            [resize], augment=hparams["data_augmentation"], hparams=hparams)
        root = self.folder(root)
        self.datasets = [ImageList(
            self._group(root, self.TEST, 0) + self._group(root, self.TEST, 1), self.CLASSES,
            plain_transform, plain_transform)]
        self.datasets += [ImageList(
            self._training_group(root, group), self.CLASSES, training_transform, plain_transform)
            for group in (0, 1)]
        self.input_shape = (3, size, size)

    def _samples(self, root: Path, folder: int, background: str, breed: str,
                 limit: int | None = None) -> list[tuple[str, int]]:
        path = root / str(folder) / background / breed
        files = sorted(path.iterdir()) if path.is_dir() else []
        images = [str(f) for f in files if f.suffix in (".png", ".jpg", ".jpeg")]
        if not images:
            raise FileNotFoundError(
                f"{type(self).__name__}: there are no images in {path}. Spawrious belongs in "
                f"{root}/0/<background>/<breed>/ and {root}/1/...; "
                "python -m domainbed_kd.scripts.download says where it comes from.")
        return [(image, self.CLASSES.index(breed)) for image in images[:limit]]

    def _group(self, root: Path, backgrounds: tuple, group: int, limit: int | None = None) -> list:
        """One background per breed; many-to-many swaps neighbours in the second group."""
        samples = []
        for k, breed in enumerate(self.BREEDS):
            folder, place = (group, k) if self.FILLER else (0, k ^ group)
            samples += self._samples(root, folder, backgrounds[place], breed, limit)
        return samples

    def _training_group(self, root: Path, group: int) -> list:
        if not self.FILLER:
            return self._group(root, self.TRAIN, group, self.N_IMAGES)
        correlated = int((0.97, 0.87)[group] * self.N_IMAGES)
        samples = self._group(root, self.TRAIN, group, correlated)
        for breed in self.BREEDS:
            samples += self._samples(
                root, group, self.FILLER, breed, self.N_IMAGES - correlated)
        return samples


class SpawriousO2O_easy(_Spawrious):
    """One background per breed, and others in the test."""

    TRAIN = ("desert", "jungle", "dirt", "snow")
    TEST = ("dirt", "snow", "desert", "jungle")
    FILLER = "beach"


class SpawriousO2O_medium(_Spawrious):
    """One background per breed, and others in the test."""

    TRAIN = ("mountain", "beach", "dirt", "jungle")
    TEST = ("jungle", "dirt", "beach", "snow")
    FILLER = "desert"


class SpawriousO2O_hard(_Spawrious):
    """One background per breed, and others in the test."""

    TRAIN = ("jungle", "mountain", "snow", "desert")
    TEST = ("mountain", "snow", "desert", "jungle")
    FILLER = "beach"


class SpawriousM2M_easy(_Spawrious):
    """Two breeds share two backgrounds, and two others in the test."""

    TRAIN = ("desert", "mountain", "dirt", "jungle")
    TEST = ("dirt", "jungle", "mountain", "desert")


class SpawriousM2M_medium(_Spawrious):
    """Two breeds share two backgrounds, and two others in the test."""

    TRAIN = ("beach", "snow", "mountain", "desert")
    TEST = ("desert", "mountain", "beach", "snow")


class SpawriousM2M_hard(_Spawrious):
    """Two breeds share two backgrounds, and two others in the test."""

    TRAIN = ("dirt", "jungle", "snow", "beach")
    TEST = ("snow", "beach", "dirt", "jungle")
