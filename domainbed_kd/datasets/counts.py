"""How many images a dataset should have, as published, and whether a copy has them."""

from pathlib import Path

from domainbed_kd import datasets

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}

#: Published numbers of images by domain; by class in label order where these are known.
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


def folder_of(name: str, data_dir: Path) -> Path:
    """Where the loaders look for a dataset."""
    return data_dir / datasets.get_dataset_class(name).FOLDER


def verify(name: str, data_dir: Path) -> bool:
    """Prints a dataset's numbers of images beside the published ones; False if they differ.

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
        counts = {c.name: sum(f.suffix.lower() in _IMAGE_SUFFIXES for f in c.rglob("*"))
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
