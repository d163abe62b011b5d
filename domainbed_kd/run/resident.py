"""Images kept in the memory of a run's device, and the last steps of their transforms there.

In fast mode all images of a dataset are kept at their original sizes, and are cropped, resized and
distorted on the device. In exact mode only images with a deterministic transform are kept, as
Pillow resized them; the others come from the loaders as bytes. An item of a resident domain is an
image's number and whether to augment it.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision import transforms as T

from domainbed_kd import machine, networks
from domainbed_kd.datasets.images import opened
from domainbed_kd.run import augmentation
from domainbed_kd.run.image_cache import ImageCache

# How many pixels are resized together, which bounds memory.
_AT_ONCE = 2**25
# How many images are read before they are sent to the device, for the same reason.
_SENT = 256


class Domain(TensorDataset):
    """Replaces `domain`, whose images are on the device: items are (number, augment?) (2,), label.

    `first` is the number of its first image.
    """

    def __init__(self, domain, first: int, augment: bool):
        numbers = torch.arange(first, first + len(domain))
        augment_each = torch.full_like(numbers, augment)
        super().__init__(torch.stack([numbers, augment_each], dim=1), torch.tensor(domain.targets))
        self.domain, self.first = domain, first
        self.samples, self.classes = domain.samples, domain.classes
        self.transform = domain.plain_transform

    def plain(self) -> "Domain":
        """The same images, not augmented."""
        return Domain(self.domain, self.first, augment=False)


class Finish:
    """Turns a batch into images, on the device.

    uint8 images are distorted if the run `is_fast`; otherwise they are looked up in `table`.
    `room` is the number of bytes that further images may take there.
    """

    def __init__(self, device: torch.device, is_fast: bool):
        self.device, self.is_fast, self.room = device, is_fast, 0
        self.table: Tensor | None = None
        self.store: Callable[[Tensor], Tensor] | None = None

    def __call__(self, *batches: Tensor) -> Tensor:
        """Images, float32 (B, 3, H, W), of batches: uint8 images or numbers of resident ones."""
        if batches[0].dtype == torch.int64:
            return self.store(torch.cat(batches))
        # Joined on the device: on the host the result would not be in pinned memory.
        x = torch.cat([networks.sent(part, self.device) for part in batches])
        return augmentation.distorted(x) if self.is_fast else looked_up(x, self.table)

    def reserve(self, n_bytes: int) -> bool:
        """Takes this much room if it is there; returns whether it was."""
        fits = n_bytes <= self.room
        self.room -= n_bytes * fits
        return fits

    def takes(self, x: Tensor) -> bool:
        """Whether the batch needs this."""
        return x.dtype == torch.uint8 or (x.dtype == torch.int64 and self.store is not None)


def looked_up(x: Tensor, table: Tensor) -> Tensor:
    """Applies a transform's last steps to uint8 (B, 3, H, W), by their table (3, 256)."""
    place = x.to(torch.int32) + 256 * torch.arange(3, dtype=torch.int32, device=x.device).view(
        3, 1, 1)
    return table.view(-1).index_select(0, place.flatten()).view(x.shape)


class Originals:
    """Images at their original sizes, in one row of pixels.

    Args:
        pixels: uint8 (P, 3), image after image.
        sizes: heights and widths, int64 (N, 2).
        side: of the returned images, in pixels.
        crop: the augmentation's crop.
        table: the output of a transform's last steps for each value, float32 (3, 256).
    """

    def __init__(self, pixels: Tensor, sizes: Tensor, side: int, crop: T.RandomResizedCrop | None,
                 table: Tensor):
        self.pixels, self.sizes, self.side, self.crop, self.table = pixels, sizes, side, crop, table
        self.starts = sizes.prod(dim=1).cumsum(0) - sizes.prod(dim=1)

    def __call__(self, rows: Tensor) -> Tensor:
        """Images, float32 (B, 3, side, side), by rows (B, 2); either all are augmented or none."""
        numbers, augment = rows[:, 0], bool(rows[0, 1])
        sizes = self.sizes[numbers]
        if augment:
            draws = torch.rand(len(rows), 10, 4).tolist()
            windows = torch.tensor([
                augmentation.window(*size, self.crop.scale, self.crop.ratio, each)
                for size, each in zip(sizes.tolist(), draws)])
        else:
            windows = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
        height, width = windows[:, 2:].amax(dim=0).tolist()
        about = torch.cat([self.starts[numbers, None], sizes[:, 1:], windows], dim=1)
        about = networks.sent(about, self.pixels.device)
        x = torch.cat([self._cut(part, height, width)
                       for part in about.split(max(1, _AT_ONCE // (height * width)))])
        return augmentation.distorted(x) if augment else looked_up(x, self.table)

    def _cut(self, about: Tensor, height: int, width: int) -> Tensor:
        start, row, top, left, heights, widths = about.T
        y = torch.arange(height, device=about.device).view(1, -1, 1)
        x = torch.arange(width, device=about.device).view(1, 1, -1)
        y = torch.minimum(y, heights.view(-1, 1, 1) - 1) + top.view(-1, 1, 1)
        x = torch.minimum(x, widths.view(-1, 1, 1) - 1) + left.view(-1, 1, 1)
        place = start.view(-1, 1, 1) + y * row.view(-1, 1, 1) + x
        cut = self.pixels.index_select(0, place.flatten()).view(len(about), height, width, 3)
        return augmentation.resized(cut, heights, widths, self.side)


def pays_on(device: torch.device) -> bool:
    """Whether keeping images in the device's memory saves time."""
    return device.type == "cuda"


def settle(dataset, finish: Finish, room: int) -> None:
    """Prepares a dataset of image files for a run on a GPU, and sets up `finish` accordingly.

    Domains that fit into `room` bytes of the device's memory are replaced by `Domain`s; in exact
    mode the other domains return bytes. Datasets whose transforms are not from
    `images.make_transform` stay unchanged.
    """
    domains = [domain for domain in dataset if hasattr(domain, "samples")
               and all(hasattr(getattr(domain, name, None), "geometry")
                       for name in ("transform", "plain_transform"))]
    if len(domains) < len(dataset):
        return
    finish.table = _table(domains[0].plain_transform.transforms[-2:]).to(finish.device)
    finish.room = room
    if finish.is_fast:
        _settle_originals(dataset, domains, finish)
        return
    _settle_finished(dataset, domains, finish)
    # Domains may share a transform, and it may be the plain one too; splits compare the two.
    for transform in {id(t): t for domain in domains
                      for t in (domain.transform, domain.plain_transform)}.values():
        transform.transforms[-2:] = [T.PILToTensor()]


def _table(last: list) -> Tensor:
    """The output of a transform's last steps for each value of each channel: float32 (3, 256)."""
    values = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    return T.Compose(last)(Image.fromarray(values))[:, 0].contiguous()


def _settle_originals(dataset, domains: list, finish: Finish) -> None:
    crops = {id(d.transform): d.transform.geometry for d in domains if d.transform.is_augmented}
    plain = domains[0].plain_transform.geometry
    if len(plain) != 1 or not isinstance(plain[0], T.Resize) or any(
            len(steps) != 1 or not isinstance(steps[0], T.RandomResizedCrop)
            for steps in crops.values()):
        return
    sizes, n_pixels = [], 0
    for height, width in itertools.chain.from_iterable(map(_sizes, domains)):
        sizes.append((height, width))
        n_pixels += height * width
        if 3 * n_pixels > finish.room:  # before all files of a large dataset are opened
            return
    finish.reserve(3 * n_pixels)
    pixels = torch.empty(n_pixels, 3, dtype=torch.uint8, device=finish.device)
    _fill(pixels, domains, lambda image: np.asarray(image).reshape(-1, 3))
    crop = next((steps[0] for steps in crops.values()), None)
    finish.store = Originals(
        pixels, torch.tensor(sizes), plain[0].size[0], crop, finish.table)
    _replace(dataset, domains)


def _settle_finished(dataset, domains: list, finish: Finish) -> None:
    domains = [domain for domain in domains if domain.transform is domain.plain_transform]
    if not domains:
        return
    resize = T.Compose(domains[0].plain_transform.geometry)
    shape = (sum(map(len, domains)), 3, *dataset.input_shape[1:])
    if not finish.reserve(math.prod(shape)):
        return
    pixels = torch.empty(shape, dtype=torch.uint8, device=finish.device)
    _fill(pixels, domains, lambda image: np.asarray(resize(image)).transpose(2, 0, 1)[None])
    finish.store = lambda rows: looked_up(
        pixels[networks.sent(rows[:, 0], pixels.device)], finish.table)
    _replace(dataset, domains)


def _sizes(domain) -> Iterator[tuple[int, int]]:
    """Heights and widths of a domain's images, from the cache or the files' headers."""
    for path, _ in domain.samples:
        if isinstance(domain.loader, ImageCache):
            yield domain.loader.array(path).shape[:2]
        else:
            with opened(path) as image:
                yield image.height, image.width


def _fill(pixels: Tensor, domains: list, rows: Callable[..., np.ndarray]) -> None:
    """Fills `pixels` with `rows` of each image of the domains, in order."""
    paths = ((domain.loader, path) for domain in domains for path, _ in domain.samples)
    start = 0
    with ThreadPoolExecutor(machine.available()) as pool:
        while some := list(itertools.islice(paths, _SENT)):
            part = np.concatenate(list(pool.map(lambda pair: rows(pair[0](pair[1])), some)))
            pixels[start:start + len(part)] = torch.from_numpy(part).to(pixels.device)
            start += len(part)


def _replace(dataset, domains: list) -> None:
    first = 0
    for i, domain in enumerate(dataset.datasets):
        if any(domain is each for each in domains):
            dataset.datasets[i] = Domain(domain, first, domain.transform.is_augmented)
            first += len(domain)
