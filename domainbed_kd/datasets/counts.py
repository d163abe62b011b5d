"""Published image counts, and whether a local copy has them."""

from pathlib import Path

from domainbed_kd import datasets
from domainbed_kd.datasets.image_folders import subfolders

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


def published() -> list[str]:
    """The datasets with published image counts."""
    return [name for name in datasets.DATASETS if datasets.facts(name).PUBLISHED]


def sizes(name: str, data_dir: str | Path | None) -> list[int]:
    """Each domain's number of images, in order: as published, or as found in a user's own folder.

    Empty if neither exists.
    """
    cls = datasets.get_dataset_class(name)
    if cls.PUBLISHED or not issubclass(cls, datasets.ImageFolders):
        return [sum(n) if isinstance(n, tuple) else n for n in cls.PUBLISHED.values()]
    return [_images_in(cls.folder(data_dir) / domain) for domain in cls.domain_folders(data_dir)]


def _images_in(folder: Path) -> int:
    return sum(f.suffix.lower() in _IMAGE_SUFFIXES for f in folder.rglob("*"))


def verify(name: str, data_dir: Path) -> bool:
    """Prints a dataset's image counts next to the published ones; False if they differ."""
    cls = datasets.get_dataset_class(name)
    if not cls.PUBLISHED:
        raise ValueError(f"{name} has no published numbers of images by domain to compare with. "
                         f"There are some for {', '.join(published())}.")
    folder, classes = cls.folder(data_dir), cls.CLASSES
    found = {_bare(name): name for name in subfolders(folder)}
    rows = []
    for domain, numbers in cls.PUBLISHED.items():
        name = found.pop(_bare(domain), domain)
        counts = {c: _images_in(folder / name / c) for c in subfolders(folder / name)}
        by_class = dict(zip(classes, numbers)) if isinstance(numbers, tuple) else {}
        total = sum(by_class.values()) or numbers
        rows.append((name, sum(counts.values()), total,
                     _difference(counts, total, classes, by_class)))
    rows += [(name, "", "", "does not belong here") for name in found.values()]

    print(f"{name} in {folder}")
    print(f"  {'domain':16}{'found':>9}{'published':>11}  ")
    for domain, n, total, difference in rows:
        print(f"  {domain:16}{n:>9}{total:>11}  {difference or 'ok'}")
    return not any(difference for *_, difference in rows)


def _difference(counts: dict, total: int, classes: tuple, by_class: dict) -> str:
    """How a domain's counts differ from the published ones; empty if they do not."""
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


def _bare(name: str) -> str:
    """A folder's name for comparison: "Real World" equals "real_world"."""
    return name.lower().replace("_", "").replace(" ", "")
