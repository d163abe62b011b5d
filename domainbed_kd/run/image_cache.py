"""A dataset's images, decoded once per machine and memory-mapped by every run.

A file holds the pixels of all images at their original sizes, one image after the other, then a
JSON index, then the index's length. It is replaced atomically, so that readers need no lock.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from domainbed_kd import datasets
from domainbed_kd.folder import files
from domainbed_kd.folder.foreign import parse_json

# How many decoded images are held in memory at a time.
_AT_ONCE = 256


class _Entry(NamedTuple):
    """A source file's size in bytes and modification time in ns, and its pixels' place."""

    size: int
    mtime: int
    offset: int
    height: int
    width: int


class ImageCache:
    """The images of an existing cache file, by the paths of their source files.

    Args:
        path: the file.
        root: the folder that the index's paths are relative to.

    Raises:
        ValueError: if it is not a cache file, or if another version of Pillow decoded it.
    """

    def __init__(self, path: Path, root: Path):
        self._path, self._root = path, root
        # "c" makes it writable for torch; slices of a plain array are faster than of a memmap.
        with files.open_regular(path) as file:
            self._pixels = np.asarray(np.memmap(file, np.uint8, "c"))
        end = len(self._pixels) - 8
        start = end - int.from_bytes(self._pixels[max(end, 0):].tobytes(), "little")
        index = parse_json(self._pixels[max(start, 0):max(end, 0)].tobytes())
        if not isinstance(index, dict) or index.get("Pillow") != PIL.__version__:
            raise ValueError(f"{path} was not decoded by Pillow {PIL.__version__}.")
        self._entries = {name: _Entry(*entry) for name, entry in index["images"].items()}
        self._found = {}  # entries by path

    def __reduce__(self):
        return ImageCache, (self._path, self._root)

    def array(self, path: str) -> np.ndarray:
        """An image's pixels, uint8 (H, W, 3); writing to them does not change the file."""
        if path not in self._found:
            self._found[path] = self._entries[os.path.relpath(path, self._root)]
        _, _, offset, height, width = self._found[path]
        return self._pixels[offset:offset + 3 * height * width].reshape(height, width, 3)

    def __call__(self, path: str) -> Image.Image:
        """The image, as `datasets.load_image` returns it."""
        return Image.fromarray(self.array(path))

    def holds(self, name: str, stamp: tuple[int, int]) -> bool:
        """Whether it has the source file of that name, with that (size, modification time)."""
        return name in self._entries and self._entries[name][:2] == stamp


def attach(dataset, folder: Path) -> None:
    """Makes a dataset of image files read from a cache, which is built if necessary."""
    domains = [d for d in dataset if getattr(d, "loader", None) is datasets.load_image]
    if not domains:
        return
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--image_cache {folder} is a file; it takes a folder.")
    paths = [path for domain in domains for path, _ in domain.samples]
    cache = _opened(type(dataset).__name__, paths, folder)
    for domain in domains:
        domain.loader = cache


def _opened(dataset_name: str, paths: list[str], folder: Path) -> ImageCache:
    root = Path(os.path.commonpath(map(os.path.dirname, paths)))
    place = hashlib.md5(str(root.resolve()).encode()).hexdigest()[:12]
    path = folder / f"{dataset_name.replace(':', '_')}-{place}.images"
    stamps = {}
    for source in paths:
        found = os.stat(source)
        stamps[os.path.relpath(source, root)] = found.st_size, found.st_mtime_ns
    cache, valid = _look_up(path, root, stamps)
    if valid:
        return cache
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be building it
        cache, valid = _look_up(path, root, stamps)
        if not valid:
            print(f"Decoding the images of {dataset_name} into {path}.", file=sys.stderr)
            cut = []
            images = _decoded(root, stamps, cache, cut)
            files.write_atomically(path, lambda beside: _write(beside, stamps, images))
            if cut:
                print(f"{len(cut)} of its {len(stamps)} image files are truncated or damaged. The "
                      "part that can be read is used, as in DomainBed: "
                      f"{', '.join(cut[:3])}{', ...' if cut[3:] else '.'}", file=sys.stderr)
            cache = ImageCache(path, root)
    return cache


def _look_up(path: Path, root: Path, stamps: dict) -> tuple[ImageCache | None, bool]:
    """The cache, if the file is one, and whether it holds all source files unchanged."""
    try:
        cache = ImageCache(path, root)
    except (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError):
        return None, False
    return cache, all(cache.holds(name, stamp) for name, stamp in stamps.items())


def _decoded(root: Path, stamps: dict, old: ImageCache | None, cut: list[str]
             ) -> Iterator[np.ndarray]:
    """The images' pixels, from the old cache where unchanged; truncated ones are added to `cut`."""
    def pixels(name):
        if old and old.holds(name, stamps[name]):
            return old.array(str(root / name))
        try:
            return np.asarray(datasets.load_image(str(root / name), whole=True))
        except ValueError:
            return None

    names = list(stamps)
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(names), _AT_ONCE):
            some = names[i:i + _AT_ONCE]
            for name, image in zip(some, list(pool.map(pixels, some))):
                if image is None:  # truncated or, if this fails too, not an image
                    image = np.asarray(datasets.load_image(str(root / name)))
                    cut.append(str(root / name))
                yield image


def _write(path: Path, stamps: dict, images: Iterable[np.ndarray]) -> None:
    entries = {}
    with path.open("wb") as file:
        for (name, stamp), image in zip(stamps.items(), images):
            entries[name] = [*stamp, file.tell(), *image.shape[:2]]
            file.write(image.tobytes())
        index = json.dumps({"Pillow": PIL.__version__, "images": entries}).encode()
        file.write(index + len(index).to_bytes(8, "little"))
