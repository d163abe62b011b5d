"""Teachers: finished runs, frozen, and the audit of any teacher; CLIP is in clip_teacher.py."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from domainbed_kd import averaging, checkpoints, console, datasets, networks, tasks
from domainbed_kd.clip_teacher import CLIP, ImageTower, check_class_names, clip
from domainbed_kd.datasets import images
from domainbed_kd.folder import composition, files
from domainbed_kd.folder.args import are_args

if TYPE_CHECKING:
    from domainbed_kd.algorithms.base import Algorithm

__all__ = ["CLIP", "ImageTower", "audit", "audit_confusion", "check_class_names", "clip",
           "from_run", "given", "in_two", "layers_of"]


def given(hparams: dict[str, Any], num_classes: int,
          input_shape: Sequence[int] | None = None) -> networks.Frozen | None:
    """hparams["teacher"], a finished run's folder or a module x -> logits; None if there is none.

    Raises:
        FileNotFoundError, ValueError: as `from_run`.
    """
    teacher = hparams.get("teacher")
    if teacher is None:
        return None
    if isinstance(teacher, nn.Module):
        return networks.Frozen(teacher)
    if wanted := composition.teacher_of_method(hparams):
        raise ValueError(_NOT_TRAINED.format(wanted.shown))
    return _of_same_view(teacher, hparams, num_classes, input_shape)


def _of_same_view(folder: str | Path, hparams: dict[str, Any], num_classes: int,
                  input_shape: Sequence[int] | None) -> networks.Frozen:
    """As `from_run`, for a student with these hparams; both must normalize images alike.

    Warns on stderr of a run of another trial seed, which splits each domain's images otherwise.
    """
    teacher = from_run(Path(folder), hparams.get("dataset"), hparams.get("test_envs"), num_classes,
                       input_shape)
    own = hparams.get("view_statistics", "imagenet")
    if teacher.statistics != own:
        raise ValueError(f"The teacher in {folder} takes images with view_statistics "
                         f"{teacher.statistics!r}, and the student's have {own!r}. Train both with "
                         "the same.")
    if hparams.get("trial_seed") not in (None, teacher.trial_seed):
        print(f"The teacher in {folder} has trial seed {teacher.trial_seed}, and this run has "
              f"{hparams['trial_seed']}: it may have trained on this run's validation images, so "
              "that selection by these is too optimistic. Train both with the same trial seed.",
              file=sys.stderr)
    return teacher


_NOT_TRAINED = ("The teacher {} is a run that a sweep trains first. Launch this by `sweep launch`, "
                "or name its folder: --teacher FOLDER.")


def is_taught_by_target(algorithm_class: "type[Algorithm]", hparams: dict[str, Any]) -> bool:
    """Whether with these hparams its teacher may see the domains that it is tested on."""
    return any(hparams.get(name) == value
               for name, value in algorithm_class.taught_by_target.items())


def may_know_target(algorithm: str, hparams: dict[str, Any]) -> bool:
    """Whether a run's teacher, or any of theirs, may have seen the domains that it is tested on."""
    from domainbed_kd import algorithms

    return (is_taught_by_target(algorithms.get_algorithm_class(algorithm), hparams)
            or any(each.name and may_know_target(each.name, each.hparams_of_run(hparams))
                   for each in composition.runs(hparams)))


def in_two(teacher: composition.Teacher, hparams: dict[str, Any], num_classes: int,
           input_shape: Sequence[int], folders: Iterator[str | nn.Module], needs_features: bool
           ) -> tuple[networks.Frozen, networks.Frozen]:
    """A teacher in two parts: from images to features (B, D), and from these to logits (B, C).

    `hparams`, `num_classes` and `input_shape` are the student's. `folders` yields, for each run
    among the teachers in turn, its folder or, in Python, a module x -> logits. Unless features are
    needed, a run's first part may make the logits and its second be the identity.
    """
    if teacher.kind == "clip":
        check_class_names(f"The teacher {teacher.shown}", hparams, num_classes)
        usual = datasets.facts(hparams.get("dataset") or "").CLIP_BACKBONE or "ViT-B-16"
        name = teacher.name or usual
        known = hparams if teacher.name is None else hparams | {"clip_model": None}
        eye = clip(known | {"clip_backbone": name}, input_shape)
        template = hparams.get("teacher_template", "a photo of a {}")
        text = eye.sentences([template], hparams["class_names"])[:, 0]
        return eye, networks.Frozen(networks.CosineClassifier(text, eye.scale))
    folder = teacher.name if teacher.kind == "folder" else next(folders, None)
    if folder is None:
        raise ValueError(_NOT_TRAINED.format(teacher.shown))
    run = (networks.Frozen(folder) if isinstance(folder, nn.Module)
           else _of_same_view(folder, hparams, num_classes, input_shape))
    if not needs_features:
        return run, networks.Frozen(nn.Identity())
    layers = layers_of(run, input_shape)
    if layers is None:
        raise ValueError(f"The teacher in {folder} has no features: it does not predict by a "
                         'featurizer and a classifier. Copy its logits: "distill": "logit".')
    features = networks.Frozen(layers[:-1])
    features.weights_loaded = 1.0
    return features, networks.Frozen(layers[-1])


@torch.no_grad()
def layers_of(teacher: networks.Frozen, input_shape: Sequence[int]) -> nn.Sequential | None:
    """The layers by which a teacher predicts, the last one its classifier; None without any.

    Tries, on random images, which of its networks predicts as it does.
    """
    module: Any = teacher.module
    candidates = [getattr(getattr(module, "average", None), "network", None),
                  getattr(module, "network", module)]
    if hasattr(module, "featurizer") and hasattr(module, "classifier"):
        candidates.append(nn.Sequential(module.featurizer, module.classifier))
    x = torch.rand(2, *input_shape)
    x = x.to(next((p.device for p in module.parameters()), x.device))
    for network in candidates:
        with contextlib.suppress(RuntimeError):  # parts that do not fit together, as MTL's
            if (isinstance(network, nn.Sequential) and len(network) > 1
                    and torch.allclose(network(x), teacher(x))):
                return network
    return None


def from_run(folder: Path, dataset: str | None, test_envs: list[int] | None,
             num_classes: int | None = None,
             input_shape: Sequence[int] | None = None) -> networks.Frozen:
    """The predictor that a finished run saved, ours or DomainBed's, as a teacher.

    Inputs are (B, *input_shape), normalized as the run's dataset is; outputs are (B, C) logits.
    Arguments that are None, as a fork does not know them, are not compared.

    Raises:
        FileNotFoundError: if the run has not finished or saved no model.
        ValueError: if it trained on another dataset, on images of another shape or on other
            classes, if it or a teacher of its own may have seen a domain the student is tested on,
            or if its weights do not all fit.
    """
    from domainbed_kd import algorithms

    model = saved_by_run(folder, dataset, test_envs)
    args = model["args"]
    if num_classes not in (None, model["model_num_classes"]):
        raise ValueError(f"The teacher in {folder} knows {model['model_num_classes']} classes, "
                         f"the student's dataset has {num_classes}. Name another teacher.")
    if input_shape is not None and tuple(input_shape) != tuple(model["model_input_shape"]):
        raise ValueError(
            f"The teacher in {folder} takes images of shape {tuple(model['model_input_shape'])}, "
            f"the student's are {tuple(input_shape)}. Train both at the same size.")
    task = datasets.facts(args["dataset"]).TASK
    context = {"total_steps": 0, "class_names": model.get("class_names"), "task": task.name}
    if dataset is not None:
        context["normalization"] = datasets.get_dataset_class(dataset).NORMALIZATION and (
            images.statistics(model["model_hparams"]))
    # All weights are loaded below, so none need to be downloaded first.
    hparams = context | console.renamed(model["model_hparams"]) | {"weights": "none"}
    if "teacher" in args:
        hparams["teacher"] = nn.Identity()  # not in the state dict, and not needed to predict
    cls = averaging.averaged(
        algorithms.get_algorithm_class(args["algorithm"]), hparams.get("averaging"))
    algorithm = cls(model["model_input_shape"], model["model_num_classes"],
                    model["model_num_domains"], hparams)
    try:
        algorithm.load_state_dict({name: value for name, value in model["model_dict"].items()
                                   if not name.startswith(composition.STATE)})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"The teacher in {folder} does not load into {args['algorithm']}: "
                         f"{reason}") from None
    teacher = networks.Frozen(algorithm)
    teacher.weights_loaded = 1.0
    teacher.held_out, teacher.trial_seed = args["test_envs"], args["trial_seed"]
    teacher.statistics = hparams.get("view_statistics", "imagenet")
    return teacher


def saved_by_run(folder: Path, dataset: str | None, test_envs: list[int] | None) -> dict[str, Any]:
    """The content of a run's model.pkl, if the run may teach; arguments and errors of `from_run`.

    Neither its weights nor its shapes are compared with anything.
    """
    if not files.is_done(folder):
        raise FileNotFoundError(f"{folder} holds no finished run. Train the teacher there first.")
    if not (folder / files.MODEL).exists():
        raise FileNotFoundError(
            f"{folder} holds no model.pkl. Train the teacher again without --skip_model_save.")
    model = checkpoints.load(folder / files.MODEL)
    if problem := _flaw(model):
        raise ValueError(f"{folder / files.MODEL} is not the model of a run: {problem}. Name the "
                         "folder of a run of train.")
    args = model["args"]
    if dataset not in (None, args["dataset"]):
        raise ValueError(f"The teacher in {folder} trained on {args['dataset']}, the student "
                         f"trains on {dataset}. Name a teacher of the same dataset.")
    seen = sorted(set(test_envs or ()) - set(args["test_envs"]))
    if seen:
        raise ValueError(
            f"The teacher in {folder} trained on environments {seen}, on which the student is "
            "tested. Name a teacher that held them out.")
    if test_envs and may_know_target(args["algorithm"], model["model_hparams"]):
        raise ValueError(
            f"The teacher in {folder}, a run of {args['algorithm']}, learned from a teacher that "
            "may have trained on its test environments, on which the student is tested too. Name "
            "a teacher whose own teachers held them out.")
    return model


def _flaw(model: object) -> str | None:
    """Why a checkpoint is not the model of a run; None if it is."""
    if not isinstance(model, dict):
        return f"it holds a {type(model).__name__}"
    kinds: dict[str, Any] = {"args": dict, "model_dict": dict, "model_hparams": dict,
             "model_input_shape": (tuple, list), "model_num_classes": int,
             "model_num_domains": int}
    if absent := sorted(kinds.keys() - model.keys()):
        return f"it lacks {', '.join(absent)}"
    for name, kind in kinds.items():
        if not isinstance(model[name], kind):
            return f"its {name} is a {type(model[name]).__name__}"
    if not are_args(model["args"]):
        return "its args do not say what the run trained"
    return None


def audit(algorithm: "Algorithm", batches: Iterable[tuple[Tensor, Tensor]],
          allow_bad: bool = False) -> dict[str, Any] | None:
    """Measures an algorithm's teacher on validation images, before the first step.

    Args:
        algorithm: one with `teacher_logits` and, usually, `teacher`.
        batches: (x, y) of the training domains' validation images, not augmented, on the
            algorithm's device.
        allow_bad: report a bad teacher's problem instead of raising it.

    Returns:
        `accuracy` and `chance`, in [0, 1], of maps the mean over classes; `n_images`;
        `weights_loaded`, a share, None for an object that was passed in; `preprocessing` and
        `problem`, in words, the latter None where there is none. None altogether without a
        teacher, or while it warms up.

    Raises:
        ValueError: if the teacher is near chance, its classes are in another order, or there are
            no images.
    """
    if algorithm.teacher_logits is None or not algorithm.teacher_is_ready():
        return None
    confusion, n_images, of_pixels = torch.zeros((), dtype=torch.long), 0, False
    for x, y in batches:
        logits = algorithm.teacher_logits(x)
        n_images, of_pixels = n_images + len(y), y.dim() > 1
        confusion = confusion + tasks.confusion(tasks.at_size_of(logits, y), y).cpu()
    if not n_images:
        raise ValueError("The teacher cannot be audited: no validation images were given.")
    if of_pixels:  # as many as there are images, and of each class that occurs the same
        of_label = confusion.sum(dim=1, keepdim=True)
        confusion = n_images / (of_label > 0).sum() * confusion / of_label.clamp(min=1)
    problem = audit_confusion(confusion)
    if problem and not allow_bad:
        raise ValueError(f"The teacher {problem} Choose another, or pass --allow_bad_teacher.")
    teacher = algorithm.part("teacher")
    return {
        "accuracy": confusion.trace().item() / n_images, "chance": 1 / len(confusion),
        "n_images": n_images, "weights_loaded": getattr(teacher, "weights_loaded", None),
        "preprocessing": getattr(teacher, "preprocessing", "the student's"), "problem": problem}


def audit_confusion(confusion: Tensor) -> str | None:
    """The problem of a teacher, by its counts (C labels, C guesses); None without one.

    Classes are in another order if the labels' most frequent guesses all differ, and if renaming
    the guesses accordingly adds more than 0.2 to the accuracy. Chance is 1 / C. A teacher is near
    chance if its accuracy is less than 3 standard errors of a random guesser's above it, but never
    if it is more than halfway from chance to 1. With so few images that 3 standard errors lead
    beyond 1, nothing is concluded.
    """
    n_classes, n_images = len(confusion), confusion.sum().item()
    chance = 1 / n_classes
    bound = chance + 3 * (chance * (1 - chance) / n_images) ** 0.5
    if bound > 1:
        return None
    bound = min(bound, (1 + chance) / 2)
    accuracy = confusion.trace().item() / n_images
    labels = confusion.sum(dim=1).nonzero().flatten()
    count, guess = confusion[labels].max(dim=1)
    gain = count.sum().item() / n_images - accuracy
    if len(guess.unique()) == len(guess) and gain > 0.2:
        order = ", ".join(f"{g} for {y}" for y, g in zip(labels.tolist(), guess.tolist())
                          if g != y)
        return (f"has its classes in another order: it says {order}. In the labels' order it "
                f"would be right on {accuracy + gain:.0%} of the training domains' validation "
                f"images, not {accuracy:.0%}.")
    if accuracy < bound:
        return (f"is near chance: right on {accuracy:.1%} of {n_images} validation images of the "
                f"training domains, where guessing gives {chance:.1%} and {bound:.1%} is asked "
                "for.")
    return None
