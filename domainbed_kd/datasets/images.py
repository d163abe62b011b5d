"""Turning images into tensors: reading, DomainBed's transforms, and images listed by path."""

import contextlib
import io
from collections.abc import Iterator
from types import MappingProxyType

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Values of the hparam `view_statistics`: {name: (mean, std) per channel}.
STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # OpenAI's
    "half": ((0.5,) * 3, (0.5,) * 3),
}
# DomainBed's augmentation: smallest crop's share of the area, colour jitter, share of gray images.
_VIEW = {"view_crop": 0.7, "view_jitter": 0.3, "view_gray": 0.1}
_LIMITS = {"view_crop": 1, "view_jitter": 0.5, "view_gray": 1}


def load_image(path: str, whole: bool = False):
    """The image as 8-bit RGB; of a truncated file, the part that can be read, as in DomainBed.

    16-bit grey values are divided by 257, so that 0 is black and 65,535 white; DomainBed clips
    them at 255. As in DomainBed, EXIF rotation is not applied. `whole` refuses truncated files;
    threads must not mix the two, as the setting is global.

    Raises:
        As `opened`, and ValueError for a truncated image, or values of unknown range.
    """
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = not whole
    with opened(path) as image:
        if (rgb := _as_rgb(image)) is not None:
            return rgb
        mode = image.mode
    kind = "floats" if mode == "F" else "integers of 32 bits"
    raise ValueError(f"{path} holds {kind} of unknown range. Convert it to 8 or 16 bits per "
                     "channel.")


@contextlib.contextmanager
def opened(path: str, what: str = "an image") -> Iterator:
    """A file as a Pillow image, to be decoded inside.

    Raises:
        FileNotFoundError: if the file was removed after the folder was listed.
        OSError: if it cannot be read, or is not a regular file.
        ValueError: if the file is not `what`.
    """
    from PIL import Image

    from domainbed_kd.folder import files

    try:
        with io.BufferedReader(files.open_regular(path)) as file, Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} no longer exists. Put the images back: the same command "
                                "continues from the run's last state.") from None
    except (OSError, SyntaxError, ValueError, RuntimeError,
            Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno:  # from the system, not from Pillow
            error.filename = str(path)
            raise
        raise ValueError(f"{path} cannot be read as {what}. Replace it.") from error


def _as_rgb(image):
    """A Pillow image as RGB; None if the range of its values is unknown."""
    if image.mode.startswith("I;16") or (image.mode, image.format) in (
            ("I", "PNG"), ("I", "PPM")):
        import numpy as np
        from PIL import Image

        grey = (np.asarray(image, dtype=np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    return None if image.mode in ("I", "F") else image.convert("RGB")


def image_size(hparams, default: int = 224) -> int:
    """Side in pixels of a dataset's images."""
    size = hparams.get("image_size", default)
    if type(size) is not int or size < 1:
        raise ValueError(f"hparams['image_size'] is {size!r}; it must be a side in whole pixels, "
                         "such as 224.")
    return size


def view(hparams, name: str) -> float:
    """The value of an hparam whose name begins with view_, or its default."""
    value, most = hparams.get(name, _VIEW[name]), _LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"hparams[{name!r}] is {value!r}; it takes a number from 0 to {most}.")
    return value


def statistics(hparams) -> tuple:
    """The (mean, std) per channel for normalizing images."""
    name = hparams.get("view_statistics", "imagenet")
    if name not in STATISTICS:
        raise ValueError(f"hparams['view_statistics'] is {name!r}; it takes "
                         f"{', '.join(STATISTICS)}.")
    return STATISTICS[name]


def differs_in_colour(hparams) -> bool:
    """Whether colours are distorted or normalized differently from DomainBed's."""
    return (any(view(hparams, name) != _VIEW[name] for name in ("view_jitter", "view_gray"))
            or statistics(hparams) != STATISTICS["imagenet"])


def make_transform(first: list, augment: bool, hparams=MappingProxyType({})):
    """DomainBed's transform by default: geometry, augmentation if requested, normalization."""
    from torchvision import transforms as T

    distortions = [T.RandomHorizontalFlip(), T.ColorJitter(*4 * [view(hparams, "view_jitter")]),
                   T.RandomGrayscale(view(hparams, "view_gray"))] if augment else []
    transform = T.Compose(
        [*first, *distortions, T.ToTensor(), T.Normalize(*statistics(hparams))])
    # Read on GPUs, which apply the last steps there and, in fast mode, all of them.
    transform.geometry, transform.is_augmented = first, augment
    return transform


class ImageList:
    """Images by (path, label), with the attributes of torchvision's ImageFolder."""

    loader = staticmethod(load_image)

    def __init__(self, samples: list[tuple[str, int]], classes, transform, plain_transform):
        self.samples = samples
        self.targets = [y for _, y in samples]
        self.classes = list(classes)
        self.class_to_idx = {c: y for y, c in enumerate(classes)}
        self.transform = transform
        self.plain_transform = plain_transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, y = self.samples[i]
        return self.transform(self.loader(path)), y
