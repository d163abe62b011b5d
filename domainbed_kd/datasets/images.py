"""How an image becomes a tensor: reading, DomainBed's transforms, and images listed by path."""

import contextlib
import io
from collections.abc import Iterator
from types import MappingProxyType

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: What the hparam `view_statistics` takes: {name: (mean, std) per channel}.
STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # OpenAI's
    "half": ((0.5,) * 3, (0.5,) * 3),
}
# DomainBed's view of training images: least share of the area, jitter of colours, share of grays.
_VIEW = {"view_crop": 0.7, "view_jitter": 0.3, "view_gray": 0.1}
_LIMITS = {"view_crop": 1, "view_jitter": 0.5, "view_gray": 1}


def load_image(path: str, whole: bool = False):
    """The image as 8-bit RGB; a truncated file gives what there is of it, as in DomainBed.

    Grey values of 16 bits are divided by 257, so that 0 is black and 65,535 white; DomainBed clips
    them at 255. As there, a rotation that the file's EXIF data ask for is not applied. `whole`
    refuses a truncated file; not while another thread wants the other.

    Raises:
        As `opened`, and ValueError if not all of the image is there or its values have no range.
    """
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = not whole
    with opened(path) as image:
        if (rgb := _as_rgb(image)) is not None:
            return rgb
        mode = image.mode
    kind = "floats" if mode == "F" else "integers of 32 bits"
    raise ValueError(f"{path} holds {kind}, and nothing says which is white. Convert it to 8 or "
                     "16 bits per channel.")


@contextlib.contextmanager
def opened(path: str, what: str = "an image") -> Iterator:
    """A file as Pillow's image, which is decoded inside.

    Raises:
        FileNotFoundError: if the file has been taken away since the folder was listed.
        OSError: if the system does not let it be read, or it is not a regular file.
        ValueError: if the file is not `what`.
    """
    from PIL import Image

    from domainbed_kd.folder import files

    try:
        with io.BufferedReader(files.open_regular(path)) as file, Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there any more. Put the images back: the same "
                                "command goes on from the run's last state.") from None
    except (OSError, SyntaxError, ValueError, RuntimeError,
            Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not Pillow's
            error.filename = str(path)
            raise
        raise ValueError(f"{path} cannot be read as {what}. Replace it.") from error


def _as_rgb(image):
    """A Pillow image as RGB; None if its values have no range of their own."""
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
    """The hparam of that name, one of those that begin with view_, or its default."""
    value, most = hparams.get(name, _VIEW[name]), _LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"hparams[{name!r}] is {value!r}; it takes a number from 0 to {most}.")
    return value


def statistics(hparams) -> tuple:
    """(mean, std) per channel that images are normalized with."""
    name = hparams.get("view_statistics", "imagenet")
    if name not in STATISTICS:
        raise ValueError(f"hparams['view_statistics'] is {name!r}; it takes "
                         f"{', '.join(STATISTICS)}.")
    return STATISTICS[name]


def differs_in_colour(hparams) -> bool:
    """Whether colours are distorted or normalized otherwise than DomainBed's."""
    return (any(view(hparams, name) != _VIEW[name] for name in ("view_jitter", "view_gray"))
            or statistics(hparams) != STATISTICS["imagenet"])


def make_transform(first: list, augment: bool, hparams=MappingProxyType({})):
    """Resizing or cropping, augmentation if asked for, normalization: DomainBed's by default."""
    from torchvision import transforms as T

    distortions = [T.RandomHorizontalFlip(), T.ColorJitter(*4 * [view(hparams, "view_jitter")]),
                   T.RandomGrayscale(view(hparams, "view_gray"))] if augment else []
    transform = T.Compose(
        [*first, *distortions, T.ToTensor(), T.Normalize(*statistics(hparams))])
    # For GPUs, which finish images themselves and, in fast mode, distort and resize them.
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
