"""The protocol of the runs behind a table, in one line."""

import os
from typing import NamedTuple

from domainbed_kd import datasets
from domainbed_kd.algorithms import display_name, ignores_clip, network_is_clips
from domainbed_kd.console import count
from domainbed_kd.folder import composition
from domainbed_kd.folder.args import teachers
from domainbed_kd.results.records import Grid

_UNKNOWN = "not recorded"
#: The initial weights of a network that is a CLIP's, here and in published.csv.
CLIP_WEIGHTS = "CLIP"


class Protocol(NamedTuple):
    """Settings that must be equal for accuracies on a dataset to be comparable."""

    #: The student's network and its initial weights.
    backbone: str
    weights: str
    steps: int
    #: None for methods without one.
    teacher: str | None
    is_fast: bool


def student(dataset: str, hparams: dict) -> tuple[str, str]:
    """The network and the initial weights that these hparams give a student.

    Records of old versions of DomainBed lack some hparams. Their student is a torchvision ResNet
    with frozen BatchNorm.
    """
    facts = datasets.facts(dataset)
    side = facts.SIDE or hparams.get("image_size", 224)
    if type(side) is not int:
        return _UNKNOWN, _UNKNOWN
    if facts.TASK.per_pixel and side <= 64 and not hparams.get("backbone"):
        name, weights = "U-Net", "random"
    elif backbone := hparams.get("backbone"):
        name, weights = str(backbone), "random" if backbone == "small_vit" else "timm"
    elif side < 32:
        name, weights = "small CNN", "random"
    elif side < 64:
        name = f"WRN-{hparams.get('wrn_depth', 16)}-{hparams.get('wrn_widen', 2)}"
        weights = "random"
    elif hparams.get("vit"):
        name, weights = "ViT-B/14", "DINOv2"
    elif "resnet18" in hparams:
        is_augmix = hparams.get("resnet50_augmix", False)
        name = "ResNet-18" if hparams["resnet18"] and not is_augmix else "ResNet-50"
        name += " with frozen BatchNorm" if hparams.get("freeze_bn", True) else ""
        weights = "AugMix" if is_augmix else "ImageNet"
    else:
        return _UNKNOWN, _UNKNOWN
    given = hparams.get("weights")
    if given is not None:
        weights = "random" if given == "none" else str(given)
    return name, weights


def of_runs(grid: Grid) -> dict[tuple[str, str], set[Protocol]]:
    """{(dataset, algorithm): the protocols of its runs}."""
    has_teachers = any(curve.args.get("teacher") for _, curve in grid.trained)
    names = {os.path.basename(str(curve.args["output_dir"])): run.algorithm
             for run, curve in grid.trained if has_teachers and curve.args.get("output_dir")}
    found = {}
    for run, curve in grid.trained:
        args, hparams = curve.args, curve.hparams
        runs = map(os.path.basename, teachers(args))
        taught_by = [f"a run of {display_name(names[name])}" if name in names else "another run"
                     for name in runs] + composition.others(hparams)
        teacher = " and ".join(taught_by) or None
        if not teacher and "clip_backbone" in hparams and not ignores_clip(args["algorithm"]):
            mix = hparams.get("rise_teachers") or hparams["clip_backbone"]
            teacher = "CLIP " + " + ".join(map(str, mix if isinstance(mix, list) else [mix]))
        if curve.teacher_problem:
            teacher = f"{teacher or 'not recorded'}, {curve.teacher_problem}"
        network = (
            (str(hparams["clip_backbone"]), CLIP_WEIGHTS)
            if network_is_clips(args["algorithm"]) and "clip_backbone" in hparams
            else student(run.dataset, hparams))
        found.setdefault((run.dataset, run.algorithm), set()).add(Protocol(
            *network, args.get("steps") or (
                datasets.facts(run.dataset).N_STEPS if run.dataset in datasets.DATASETS
                else grid.n_steps[run.dataset]),
            teacher, bool(args.get("fast"))))
    return found


def in_words(name: str, value: str) -> str:
    """A setting in words, given its name, one of `folder.args.SETTINGS`, and its value as text."""
    if name == "fast":
        return "fast mode" if value == "True" else "exact mode"
    return f"{name} {'default' if value == 'None' else value}"


def line(protocols: dict[tuple[str, str], set[Protocol]], grid: Grid, dataset: str | None,
         selection: str, rows: list[str]) -> str:
    """The protocol of a dataset's table, or of that of averages for None.

    What not all runs share is followed by the algorithms, or datasets, that have it. `protocols`
    are from `of_runs`; `rows` are the algorithms in the table's order.
    """
    mine = {(on, name): protocols[on, name] for name in rows
            for on in grid.datasets if on == (dataset or on) and (on, name) in protocols}
    several = dataset is None and len({key[0] for key in mine}) > 1

    def told(describe) -> str:
        """Each value that occurs and, if not all share it, the algorithms or datasets with it."""
        who = {}
        for (on, algorithm), found in mine.items():
            for value in sorted({describe(protocol) for protocol in found} - {None}):
                who.setdefault(value, []).append(on if several else display_name(algorithm))
        if len(who) == 1 and sum(map(len, who.values())) == len(mine):
            return next(iter(who))
        return ", ".join(f"{value} ({', '.join(dict.fromkeys(names))})"
                         for value, names in who.items())

    parts = [
        "network " + told(lambda p: p.backbone),
        "initial weights " + told(lambda p: p.weights),
        told(lambda p: f"{p.steps:,} steps"),
        f"{count(len(grid.hparams_seeds), 'draw')} of hparams, "
        f"{count(len(grid.trial_seeds), 'trial')}",
        f"selected by {selection}",
        told(lambda p: "fast mode" if p.is_fast else "exact mode"),
        "teacher " + (told(lambda p: p.teacher) or "none")]
    return f"Protocol: {'; '.join(parts)}."
