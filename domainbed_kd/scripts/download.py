"""Fetches data sets into the folders that the loaders read, and verifies what is there.

DomainBed's script fetches TerraIncognita unless it is edited; here --datasets names what to fetch.
Archives go to DATA_DIR/downloads. An interrupted download goes on where it broke off; unpacking
is all or nothing, and then the archive is deleted. Its SHA-256 stays there as ARCHIVE.sha256: an
archive fetched later must have the same. Put a file there yourself to check the first.
"""

import argparse
import functools
import gzip
import hashlib
import json
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from domainbed_kd import datasets
from domainbed_kd.console import Parser, run_main

CHUNK = 1 << 20  # bytes
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}

# The pictures of Caltech Camera Traps that DomainBed takes (Beery et al., ECCV 2018).
TERRA_URL = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps/"
TERRA_LOCATIONS = ("38", "43", "46", "100")
TERRA_ANNOTATIONS = ("cis_test", "cis_val", "train", "trans_test", "trans_val")

# Published numbers of images by domain; by class in label order where these are known.
PUBLISHED = {
    "VLCS": {"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376},
    "PACS": {"art_painting": (379, 255, 285, 184, 201, 295, 449),
             "cartoon": (389, 457, 346, 135, 324, 288, 405),
             "photo": (189, 202, 182, 186, 199, 280, 432),
             "sketch": (772, 740, 753, 608, 816, 80, 160)},
    "OfficeHome": {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357},
    "TerraIncognita": {"location_100": 4741, "location_38": 9736, "location_43": 3970,
                       "location_46": 5883},
    "DomainNet": {"clipart": 48129, "infograph": 51605, "painting": 72266, "quickdraw": 172500,
                  "real": 172947, "sketch": 69128},
}


def build_parser() -> argparse.ArgumentParser:
    """DomainBed's flag, then ours."""
    parser = Parser(prog="python -m domainbed_kd.scripts.download", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, epilog=listing(SOURCES))
    parser.add_argument("--data_dir", type=Path, help="folder that holds the data sets; required")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="NAME",
                        help="what to fetch or, with --verify, to verify (all that are there)")
    parser.add_argument("--verify", action="store_true",
                        help="fetch nothing; count images against the published numbers")
    parser.add_argument("--list", action="store_true", help="show what can be fetched, and stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0: everything is there and as published. 1: something is not, or a person has to get it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in args.datasets:
        check_name(name)
    if args.list:
        print(listing(args.datasets or SOURCES))
        return 0
    if args.data_dir is None:
        parser.error("--data_dir is required")
    if args.verify:
        names = args.datasets or [n for n in PUBLISHED if folder_of(n, args.data_dir).is_dir()]
        if not names:
            raise ValueError(f"{args.data_dir} holds none of {', '.join(PUBLISHED)}.")
        return 0 if all([verify(name, args.data_dir) for name in names]) else 1
    if not args.datasets:
        print(listing(SOURCES))
        raise ValueError("Nothing was fetched. Name what to fetch, for example --datasets PACS.")
    return 0 if all([install(name, args.data_dir) for name in args.datasets]) else 1


def check_name(name: str) -> None:
    """Refuses names of no data set, and of those that need no files.

    Raises:
        NotImplementedError, ValueError: saying so.
    """
    datasets.get_dataset_class(name)
    if name not in SOURCES:
        raise ValueError(f"{name} has no files to fetch: it is built in, or your own.")


def folder_of(name: str, data_dir: Path) -> Path:
    """Where the loaders look for a data set."""
    return data_dir / datasets.get_dataset_class(name).FOLDER


def install(name: str, data_dir: Path) -> bool:
    """Fetches, unpacks and verifies a data set that is not there; False if it is not complete."""
    source, folder = SOURCES[name], folder_of(name, data_dir)
    if folder != data_dir and folder.exists():
        print(f"{name}: {folder} is there already. Delete it to fetch it again.", file=sys.stderr)
    elif source.fetch is None:
        print(f"{name} cannot be fetched by this script. Get it from {source.page} and unpack it "
              f"as {data_dir / source.layout}. {source.note}".rstrip())
        return False
    else:
        print(f"{name}: {source.size} from {source.via}. Licence: {source.licence}. "
              f"{source.page}", file=sys.stderr)
        source.fetch(data_dir)
    return verify(name, data_dir) if name in PUBLISHED else True


# Verifying.


def verify(name: str, data_dir: Path) -> bool:
    """Prints a data set's numbers of images beside the published; False if they differ.

    Raises:
        ValueError: if none were published by domain.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name} has no published numbers of images by domain to compare with. "
                         f"There are some for {', '.join(PUBLISHED)}.")
    folder, classes = folder_of(name, data_dir), datasets.get_dataset_class(name).CLASSES
    found = {_bare(path.name): path for path in _subfolders(folder)}
    rows = []
    for domain, published in PUBLISHED[name].items():
        path = found.pop(_bare(domain), folder / domain)
        counts = {c.name: sum(f.suffix.lower() in IMAGE_SUFFIXES for f in c.rglob("*"))
                  for c in _subfolders(path)}
        by_class = dict(zip(classes, published)) if isinstance(published, tuple) else {}
        total = sum(by_class.values()) or published
        rows.append((path.name, sum(counts.values()), total,
                     _difference(counts, total, classes, by_class)))
    rows += [(path.name, "", "", "does not belong here") for path in found.values()]

    print(f"{name} in {folder}")
    print(f"  {'domain':16}{'found':>9}{'published':>11}  ")
    for domain, n, total, difference in rows:
        print(f"  {domain:16}{n:>9}{total:>11}  {difference or 'ok'}")
    return not any(difference for *_, difference in rows)


def _difference(counts: dict, total: int, classes: tuple, by_class: dict) -> str:
    """What a domain has too few or too many of; empty if it is as published."""
    def amount(n):
        return f"{n} missing" if n > 0 else f"{-n} too many"

    if not counts:
        return "all missing"
    parts = [f"{c} {amount(n - counts.get(c, 0))}" for c, n in by_class.items()
             if n != counts.get(c, 0)]
    if not by_class:
        parts = [f"no {c}" for c in classes if not counts.get(c)]
    parts += [f"unknown class {c}" for c in counts if c not in classes]
    short = total - sum(counts.values())
    return "; ".join(([amount(short)] if short else []) + parts)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _bare(name: str) -> str:
    """A folder's name without what differs between copies: "Real World" is "real_world"."""
    return name.lower().replace("_", "").replace(" ", "")


# Fetching.


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, fp, code, message, headers, newurl):
        if request.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.HTTPError(
                newurl, code, "redirected away from https", headers, fp)
        return super().redirect_request(request, fp, code, message, headers, newurl)


def fetch_url(url: str, path: Path) -> None:
    """Downloads to `path`, going on from `path`.part if there is one.

    Raises:
        OSError: if the server cannot be reached or breaks off; what came is kept.
    """
    from tqdm import tqdm

    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.build_opener(_NoDowngrade).open(request, timeout=60) as response:
            if response.status != 206:  # the server sends all of it
                start = 0
            length = response.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            with part.open("ab" if start else "wb") as file, tqdm(
                    total=total, initial=start, unit="B", unit_scale=True, desc=path.name,
                    disable=not sys.stderr.isatty()) as bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 416 and start:
            part.unlink()  # longer than the file on the server, so not a part of it
            return fetch_url(url, path)
        raise OSError(f"{url} cannot be fetched ({error}). If it was the connection, run the same "
                      "command again: it goes on where it broke off.") from error
    size = part.stat().st_size
    if total is not None and size != total:
        raise OSError(f"{url} broke off after {size} of {total} bytes. Run the same command "
                      "again: it goes on from there.")
    part.rename(path)


def fetch_drive(file_id: str, path: Path) -> None:
    """Downloads a file from Google Drive to `path`.

    Raises:
        ValueError: if gdown is not installed.
        OSError: if Drive does not give the file.
    """
    if path.exists():
        return
    try:
        import gdown
    except ImportError:
        raise ValueError(f"{path.name} is on Google Drive, which needs gdown. Run: pip install "
                         "domainbed_kd[download]") from None
    from gdown.exceptions import FileURLRetrievalError

    try:
        gdown.download(id=file_id, output=str(path), quiet=not sys.stderr.isatty(), resume=True)
    except (FileURLRetrievalError, OSError) as error:
        raise OSError(
            f"Google Drive does not give {path.name} ({error}). Download https://drive.google.com/"
            f"uc?id={file_id} in a browser, save it as {path}, and run the same command again."
        ) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def verified(path: Path) -> Iterator[None]:
    """Inside, an archive may be unpacked: its SHA-256 is what `path`.sha256 says, if that exists.

    Afterwards the SHA-256 is written there and the archive, no longer needed, is deleted.

    Raises:
        ValueError: if it is another; the archive is deleted.
    """
    digest, known = sha256(path), path.with_name(f"{path.name}.sha256")
    expected = (known.read_text(encoding="utf-8").split() or [""])[0] if known.exists() else digest
    if digest != expected:
        path.unlink()
        raise ValueError(
            f"{path.name} has the SHA-256 {digest}, but {known} says {expected}. It is deleted. "
            f"Run the same command again; if its publisher changed it, delete {known} first.")
    yield
    known.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    path.unlink()


# Unpacking.


@contextmanager
def _archive_errors(archive: Path) -> Iterator[None]:
    """Inside, an archive that is damaged or dangerous is refused in one line."""
    try:
        yield
    except tarfile.FilterError as error:
        raise ValueError(f"{archive} is not unpacked, as it would write outside its folder: "
                         f"{error}. Get it from elsewhere.") from error
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error,
            EOFError) as error:
        reason = " ".join(str(error).split())  # tarfile's takes lines
        raise ValueError(f"{archive} is damaged ({reason}). Delete it and run the same command "
                         "again.") from error


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a .zip or .tar.* into an existing folder.

    Raises:
        ValueError: if it is damaged, or would write outside the folder.
    """
    with _archive_errors(archive):
        if archive.suffix != ".zip":
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            return
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                path = PurePosixPath(name.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise ValueError(f"{archive} is not unpacked, as it would write outside its "
                                     f"folder: {name}. Get it from elsewhere.")
            file.extractall(folder)


def _from_drive(data_dir: Path, file_id: str, archive: str, inside: str, folder: str) -> None:
    """Fetches an archive whose folder `inside` becomes `data_dir/folder`."""
    path = _downloads(data_dir) / archive
    fetch_drive(file_id, path)
    with verified(path), _beside(data_dir) as unpacked:
        unpack(path, unpacked)
        if not (unpacked / inside).is_dir():
            raise ValueError(f"{path} holds no folder {inside}. Unpack it by hand as "
                             f"{data_dir / folder}.")
        (unpacked / inside).rename(data_dir / folder)


@contextmanager
def _beside(data_dir: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, on the disk where what is made in it belongs."""
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpacking-") as folder:
        yield Path(folder)


def _downloads(data_dir: Path) -> Path:
    folder = data_dir / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# TerraIncognita.


def terra_places(annotations: dict) -> Iterator[tuple[str, str]]:
    """(name of an image, "location_<n>/<class>") of the annotations that belong to the data set.

    Args:
        annotations: COCO-style: `images` (id, file_name, location), `categories` (id, name),
            `annotations` (image_id, category_id).
    """
    classes = {c["id"]: c["name"] for c in annotations["categories"]
               if c["name"] in datasets.TerraIncognita.CLASSES}
    images = {image["id"]: image for image in annotations["images"]
              if str(image["location"]) in TERRA_LOCATIONS}
    for annotation in annotations["annotations"]:
        image = images.get(annotation["image_id"])
        label = classes.get(annotation["category_id"])
        if image is not None and label is not None:
            yield (PurePosixPath(image["file_name"]).name,
                   f"location_{image['location']}/{label}")


def build_terra(images: Path, annotations: Path, folder: Path) -> None:
    """Unpacks the images that belong to TerraIncognita to `folder/location_<n>/<class>/`.

    An image of several classes goes to each of them, as in DomainBed.

    Raises:
        ValueError: if an archive is damaged or does not hold what it should.
    """
    places = defaultdict(set)
    with _archive_errors(annotations), tarfile.open(annotations) as tar:
        members = {PurePosixPath(member.name).name: member for member in tar}
        for name in TERRA_ANNOTATIONS:
            if f"{name}_annotations.json" not in members:
                raise ValueError(f"{annotations} holds no {name}_annotations.json.")
            with tar.extractfile(members[f"{name}_annotations.json"]) as file:
                for image, place in terra_places(json.load(file)):
                    places[image].add(place)
    with _archive_errors(images), tarfile.open(images, "r|*") as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if not member.isfile() or name not in places:
                continue
            content = tar.extractfile(member).read()
            for place in places.pop(name):
                (folder / place).mkdir(parents=True, exist_ok=True)
                (folder / place / name).write_bytes(content)
    if places:
        raise ValueError(f"{images} lacks {len(places)} annotated images, such as "
                         f"{min(places)}.")


def _fetch_terra(data_dir: Path) -> None:
    downloads, target = _downloads(data_dir), folder_of("TerraIncognita", data_dir)
    paths = [downloads / f"eccv_18_{part}.tar.gz" for part in ("all_images_sm", "annotations")]
    for path in paths:
        fetch_url(TERRA_URL + path.name, path)
    with verified(paths[0]), verified(paths[1]), _beside(data_dir) as unpacked:
        build_terra(*paths, unpacked / "terra")
        (unpacked / "terra").rename(target)


# What other packages fetch.


def _fetch_mnist(data_dir: Path) -> None:
    from torchvision.datasets import MNIST

    try:
        MNIST(data_dir, download=True)
    except RuntimeError as error:
        raise OSError(f"MNIST cannot be fetched ({error}).") from error


def _fetch_wilds(data_dir: Path, name: str) -> None:
    try:
        from wilds import get_dataset
    except ImportError as error:
        raise ValueError(f"{name} is fetched by the package wilds ({error}). Run: pip install "
                         "domainbed_kd[wilds]") from error
    get_dataset(dataset=name, root_dir=str(data_dir), download=True)


class Source(NamedTuple):
    """Where a data set comes from; `fetch(data_dir)` is None if a person has to get it."""

    size: str
    via: str
    licence: str
    page: str
    fetch: Callable[[Path], None] | None = None
    layout: str = ""
    note: str = ""


_MNIST = Source("12 MB", "https (torchvision)", "CC BY-SA 3.0",
                "https://yann.lecun.com/exdb/mnist/", _fetch_mnist)
_SPAWRIOUS = Source("size unknown", "by hand", "see its page",
                    "https://github.com/aengusl/spawrious", layout="<0 or 1>/<background>/<breed>/")
SOURCES = {
    "ColoredMNIST": _MNIST,
    "RotatedMNIST": _MNIST,
    "VLCS": Source(
        "size unknown", "Google Drive (gdown)", "those of its four collections",
        "https://github.com/belaalb/G2DM",
        functools.partial(_from_drive, file_id="1skwblH1_okBwxWxmRsp9_qi15hyPpxg8",
                          archive="VLCS.tar.gz", inside="VLCS", folder="VLCS")),
    "PACS": Source(
        "0.2 GB", "Google Drive (gdown)", "none stated",
        "https://dali-dl.github.io/project_iccv2017.html",
        functools.partial(_from_drive, file_id="1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd",
                          archive="PACS.zip", inside="kfold", folder="PACS")),
    "OfficeHome": Source(
        "1 GB", "Google Drive (gdown)", "research only",
        "https://www.hemanthdv.org/officeHomeDataset.html",
        functools.partial(_from_drive, file_id="1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC",
                          archive="office_home.zip", inside="OfficeHomeDataset_10072016",
                          folder="office_home")),
    "TerraIncognita": Source("6 GB", "https", "CDLA-Permissive 1.0",
                             "https://lila.science/datasets/caltech-camera-traps", _fetch_terra),
    "DomainNet": Source(
        "18 GB", "by hand", "research only", "https://ai.bu.edu/M3SDA/",
        layout="domain_net/<domain>/<class>/",
        note="Take the cleaned version, and of each domain keep only the images that the page's "
             "lists train and test name: 586,575 in all. Then run this with --verify."),
    "SVIRO": Source("size unknown", "by hand", "CC BY-NC-SA 4.0", "https://sviro.kl.dfki.de",
                    layout="sviro/<car>/<class>/",
                    note="It is the folder SVIRO_DOMAINBED of the archive for DomainBed."),
    "WILDSCamelyon": Source("10 GB", "https (wilds)", "CC0 1.0",
                            "https://wilds.stanford.edu/datasets/",
                            functools.partial(_fetch_wilds, name="camelyon17")),
    "WILDSFMoW": Source("50 GB", "https (wilds)", "FMoW Challenge Public License",
                        "https://wilds.stanford.edu/datasets/",
                        functools.partial(_fetch_wilds, name="fmow")),
    **{name: _SPAWRIOUS for name in datasets.DATASETS if name.startswith("Spawrious")},
}


def listing(names: Iterable[str]) -> str:
    """Where these data sets can be fetched from and under what terms, as a table."""
    rows = [("data set", "size", "fetched by", "licence", "page")]
    for name in names:
        source = SOURCES[name]
        rows.append((name, source.size, source.via, source.licence, source.page))
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return "\n".join("".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
                     for row in rows)


if __name__ == "__main__":
    run_main(main)
