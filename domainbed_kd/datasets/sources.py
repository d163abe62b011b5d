"""Fetches datasets, and lists their sources and licences."""

import http.client
import json
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from domainbed_kd import datasets
from domainbed_kd.datasets import archives, counts

# The part of Caltech Camera Traps that DomainBed uses (Beery et al., ECCV 2018).
TERRA_URL = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps/"
TERRA_LOCATIONS = ("38", "43", "46", "100")
TERRA_ANNOTATIONS = ("cis_test", "cis_val", "train", "trans_test", "trans_val")


def check_name(name: str) -> None:
    """Refuses unknown names, and datasets without files to fetch."""
    if not datasets.get_dataset_class(name).SOURCE:
        raise ValueError(f"{name} has no files to fetch: it is built in, or your own.")


def install(name: str, data_dir: Path) -> bool:
    """Fetches and unpacks a missing dataset, then verifies it; False if it is incomplete."""
    cls = datasets.get_dataset_class(name)
    source, folder = cls.SOURCE, cls.folder(data_dir)
    if folder != data_dir and folder.exists():
        print(f"{name}: {folder} exists already. Delete it to fetch it again.", file=sys.stderr)
    elif source.via not in FETCHERS:
        print(f"{name} cannot be fetched by this script. Get it from {source.page} and unpack it "
              f"as {folder / source.layout}. {source.note}".rstrip())
        return False
    else:
        print(f"{name}: {source.size} from {source.via}. Licence: {source.licence}. "
              f"{source.page}", file=sys.stderr)
        FETCHERS[source.via](cls, data_dir)
    return counts.verify(name, data_dir) if cls.PUBLISHED else True


def _from_drive(cls: type, data_dir: Path) -> None:
    source, folder = cls.SOURCE, cls.folder(data_dir)
    path = _downloads(data_dir) / source.archive
    archives.fetch_drive(source.id, path)
    with archives.verified(path), archives.beside(data_dir) as unpacked:
        archives.unpack(path, unpacked, f"https://drive.google.com/uc?id={source.id}")
        if not (unpacked / source.inside).is_dir():
            raise ValueError(f"{path} holds no folder {source.inside}. Unpack it by hand as "
                             f"{folder}.")
        (unpacked / source.inside).rename(folder)


def _downloads(data_dir: Path) -> Path:
    folder = data_dir / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def terra_places(annotations: dict) -> Iterator[tuple[str, str]]:
    """(image name, "location_<n>/<class>") for each annotation that belongs to the dataset.

    Annotations are COCO-style: `images` (id, file_name, location), `categories` (id, name),
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
    """Unpacks TerraIncognita's images to `folder/location_<n>/<class>/`.

    An image with several classes goes to each of them, as in DomainBed.
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


def _fetch_terra(cls: type, data_dir: Path) -> None:
    downloads = _downloads(data_dir)
    paths = [downloads / f"eccv_18_{part}.tar.gz" for part in ("all_images_sm", "annotations")]
    for path in paths:
        archives.fetch_url(TERRA_URL + path.name, path)
    with (archives.verified(paths[0]), archives.verified(paths[1]),
          archives.beside(data_dir) as unpacked):
        build_terra(*paths, unpacked / "terra")
        (unpacked / "terra").rename(cls.folder(data_dir))


def _fetch_torchvision(cls: type, data_dir: Path) -> None:
    from torchvision import datasets as kinds

    for name in cls.SOURCE.id.split():
        try:
            getattr(kinds, name)(data_dir, download=True)
        except (RuntimeError, http.client.HTTPException) as error:
            raise OSError(f"{name} cannot be fetched to {data_dir} ({error!r}).") from error


def _fetch_wilds(cls: type, data_dir: Path) -> None:
    name = cls.SOURCE.id
    try:
        from wilds import get_dataset
    except ImportError as error:
        raise ValueError(f"{name} is fetched by the package wilds ({error}). Run: pip install "
                         "domainbed_kd[wilds]") from error
    try:
        get_dataset(dataset=name, root_dir=str(data_dir), download=True)
    except (RuntimeError, http.client.HTTPException) as error:
        raise OSError(f"{name} cannot be fetched to {data_dir} ({error!r}).") from error


# By `Source.via`: functions that take a dataset's class and the data directory.
FETCHERS = {"Google Drive (gdown)": _from_drive, "https": _fetch_terra,
            "https (torchvision)": _fetch_torchvision, "https (wilds)": _fetch_wilds}


def known() -> list[str]:
    """The datasets with published files."""
    return [name for name in datasets.DATASETS if datasets.facts(name).SOURCE]


def listing(names: Iterable[str]) -> str:
    """A table of the datasets' sources and licences."""
    rows = [("dataset", "size", "fetched by", "licence", "page")]
    for name in names:
        source = datasets.facts(name).SOURCE
        rows.append((name, source.size, source.via, source.licence, source.page))
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return "\n".join("".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
                     for row in rows)
