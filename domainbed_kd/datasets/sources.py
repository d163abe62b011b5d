"""Where datasets come from, under which terms, and how to get them."""

import functools
import http.client
import json
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from domainbed_kd import datasets
from domainbed_kd.datasets import archives, counts
from domainbed_kd.datasets.counts import folder_of

# The images of Caltech Camera Traps that DomainBed takes (Beery et al., ECCV 2018).
TERRA_URL = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps/"
TERRA_LOCATIONS = ("38", "43", "46", "100")
TERRA_ANNOTATIONS = ("cis_test", "cis_val", "train", "trans_test", "trans_val")


def check_name(name: str) -> None:
    """Refuses unknown names, and datasets that need no files.

    Raises:
        NotImplementedError, ValueError: saying so.
    """
    datasets.get_dataset_class(name)
    if name not in SOURCES:
        raise ValueError(f"{name} has no files to fetch: it is built in, or your own.")


def install(name: str, data_dir: Path) -> bool:
    """Fetches, unpacks and verifies a dataset that is not there; False if it is incomplete."""
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
    return counts.verify(name, data_dir) if name in counts.PUBLISHED else True


def _from_drive(data_dir: Path, file_id: str, archive: str, inside: str, folder: str) -> None:
    """Fetches an archive whose folder `inside` becomes `data_dir/folder`."""
    path = _downloads(data_dir) / archive
    archives.fetch_drive(file_id, path)
    with archives.verified(path), archives.beside(data_dir) as unpacked:
        archives.unpack(path, unpacked, f"https://drive.google.com/uc?id={file_id}")
        if not (unpacked / inside).is_dir():
            raise ValueError(f"{path} holds no folder {inside}. Unpack it by hand as "
                             f"{data_dir / folder}.")
        (unpacked / inside).rename(data_dir / folder)


def _downloads(data_dir: Path) -> Path:
    folder = data_dir / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# TerraIncognita.


def terra_places(annotations: dict) -> Iterator[tuple[str, str]]:
    """(name of an image, "location_<n>/<class>") of the annotations that belong to the dataset.

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


def _terra_places(text: bytes, archive: Path, name: str) -> list[tuple[str, str]]:
    try:
        return list(terra_places(json.loads(text)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}_annotations.json in {archive}, from {TERRA_URL}{archive.name}, "
                         f"is damaged ({type(error).__name__}: {error}). Delete the archive and "
                         "run the same command again.") from error


def build_terra(images: Path, annotations: Path, folder: Path) -> None:
    """Unpacks the images that belong to TerraIncognita to `folder/location_<n>/<class>/`.

    An image of several classes goes to each of them, as in DomainBed.

    Raises:
        ValueError: if an archive is damaged or does not hold what it should.
    """
    places = defaultdict(set)
    with archives.opened(annotations, TERRA_URL + annotations.name), tarfile.open(
            annotations) as tar:
        members = {PurePosixPath(member.name).name: member for member in tar}
        for name in TERRA_ANNOTATIONS:
            if f"{name}_annotations.json" not in members:
                raise ValueError(f"{annotations} holds no {name}_annotations.json.")
            with tar.extractfile(members[f"{name}_annotations.json"]) as file:
                for image, place in _terra_places(file.read(), annotations, name):
                    places[image].add(place)
    with archives.opened(images, TERRA_URL + images.name), tarfile.open(images, "r|*") as tar:
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
        archives.fetch_url(TERRA_URL + path.name, path)
    with (archives.verified(paths[0]), archives.verified(paths[1]),
          archives.beside(data_dir) as unpacked):
        build_terra(*paths, unpacked / "terra")
        (unpacked / "terra").rename(target)


# What other packages fetch.


def _fetch_mnist(data_dir: Path) -> None:
    from torchvision.datasets import MNIST

    try:
        MNIST(data_dir, download=True)
    except (RuntimeError, http.client.HTTPException) as error:
        raise OSError(f"MNIST cannot be fetched to {data_dir} ({error!r}).") from error


def _fetch_wilds(data_dir: Path, name: str) -> None:
    try:
        from wilds import get_dataset
    except ImportError as error:
        raise ValueError(f"{name} is fetched by the package wilds ({error}). Run: pip install "
                         "domainbed_kd[wilds]") from error
    try:
        get_dataset(dataset=name, root_dir=str(data_dir), download=True)
    except (RuntimeError, http.client.HTTPException) as error:
        raise OSError(f"{name} cannot be fetched to {data_dir} ({error!r}).") from error


class Source(NamedTuple):
    """Where a dataset comes from; `fetch(data_dir)` is None if a person has to get it."""

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
    """Where these datasets can be fetched from and under what terms, as a table."""
    rows = [("dataset", "size", "fetched by", "licence", "page")]
    for name in names:
        source = SOURCES[name]
        rows.append((name, source.size, source.via, source.licence, source.page))
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return "\n".join("".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
                     for row in rows)
