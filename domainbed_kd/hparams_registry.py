"""Hyper-parameters: what all algorithms share, plus each algorithm's own search space.

As in DomainBed, every random value has its own stream, seeded by (seed, name), so that adding,
removing or reordering entries changes no other draw. Values are plain Python, so they survive JSON.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from domainbed_kd import algorithms, datasets
from domainbed_kd.algorithms.base import Space, Takes, fixed
from domainbed_kd.console import did_you_mean, parse_hparams
from domainbed_kd.folder import composition
from domainbed_kd.seeds import seed_hash

# Hparams that only --hparams sets, as they are never drawn: {name: meaning (default)}.
OPTIONAL = {
    "image_size": "side in pixels of an image folder's images (224)",
    "weights": "initial weights: a file, 'none', or with resnet50_augmix false torchvision's name",
    "backbone": "any timm model, by name; 'small_vit' for images under 32 pixels",
    "wrn_depth": "depth of the network for 32-pixel images (16)",
    "wrn_widen": "width factor of the network for 32-pixel images (2)",
    "teachers": "list of teachers on top of an algorithm, such as 'run:SWAD' (docs/composition.md)",
    "distill": "with teachers: 'logit', 'feature', 'feature_mse', 'relation', 'text', or a list",
    "distill_weight": "likewise: weight of the teachers' terms (1)",
    "distill_temperature": "likewise: temperature that softens the copied predictions (4)",
    "teacher_mix": "likewise: a term for each ('sum'), or one for their 'mean' or by 'accuracy'",
    "teacher_template": "likewise: the sentence that a CLIP reads ('a photo of a {}')",
    "base_weight": "likewise: weight of the algorithm's own loss (1)",
    "teacher": "the teacher of a method that learns from a run, such as 'run:SWAD' ('run:ERM')",
    "optimizer": "of any method: 'adam', 'sgd' with momentum 0.9, or 'adamw' ('adam')",
    "schedule": "of every optimiser's lr: 'none', 'step' or 'cosine' ('none')",
    "schedule_drops": "with schedule 'step': shares of the run after which lr is a tenth ([0.8])",
    "view_crop": "of training images: the least share of an image that a crop keeps (0.7)",
    "view_jitter": "likewise: how much colours change, 0 to 0.5 (0.3)",
    "view_gray": "likewise: the share that becomes gray (0.1)",
    "view_statistics": "mean and deviation of all images: 'imagenet', 'clip' or 'half' (0.5 each)",
    "label_smoothing": "of ERM, ARM, SMA, SWAD, LinearProbe: share of a label for all classes (0)",
    "averaging": "'sma', 'swad' or 'beta': average the weights of any algorithm",
    "sma_start": "with averaging by 'sma': the first update averaged (2 % of the run: 100 of 5001)",
    "swad_interval": "with averaging by 'swad': steps between validations (100; 50 on VLCS)",
    "swad_n_converge": "likewise: validations, the first the best, that begin the valley (3)",
    "swad_n_tolerance": "likewise: validations, all above the threshold, that end it (6)",
    "swad_tolerance_ratio": "likewise: share that the threshold adds to the losses (0.3, VLCS 0.2)",
    "beta_average": "with averaging by 'beta': its parameter; below 1 both ends count most (0.5)",
    "beta_start": "likewise: the first update averaged; 0 is for students that start trained (0)",
    "class_groups": "number of classes in a training batch, the same in every domain (all)",
    "mended": "true: fix the known defect in DomainBed's numbers of a method (docs/protocol.md)",
    "canonical_view": "true, or a list by teacher: frozen teachers see images not augmented",
    "class_names": "the classes as words, in label order, for methods that read text",
}


def _shared(dataset: str) -> Space:
    """{name: (default, draw)} of the hparams that every algorithm has (DomainBed b93c22a)."""
    facts = datasets.facts(dataset)
    small = facts.SMALL_IMAGES
    if small:
        lr, lr_draw = 1e-3, lambda r: 10 ** r.uniform(-4.5, -2.5)
        batch_size, batch_draw = 64, lambda r: int(2 ** r.uniform(3, 9))
    else:
        lr, lr_draw = 5e-5, lambda r: 10 ** r.uniform(-5, -3.5)
        top = facts.MAX_LOG2_BATCH
        batch_size, batch_draw = 32, lambda r: int(2 ** r.uniform(3, top))
    return {
        "data_augmentation": fixed(True),
        "resnet18": fixed(False),
        "resnet50_augmix": fixed(True),
        "dinov2": fixed(False),
        "vit": fixed(False),
        "vit_attn_tune": fixed(False),
        "freeze_bn": fixed(False),
        "lars": fixed(False),
        "linear_steps": fixed(500),
        "resnet_dropout": (0.0, lambda r: r.choice([0.0, 0.1, 0.5])),
        "vit_dropout": (0.0, lambda r: r.choice([0.0, 0.1, 0.5])),
        "class_balanced": fixed(False),
        "nonlinear_classifier": fixed(False),
        "lr": (lr, lr_draw),
        "weight_decay": (0.0, lambda r: 0.0 if small else 10 ** r.uniform(-6, -2)),
        "batch_size": (batch_size, batch_draw),
    } | facts.HPARAMS


def search_space(algorithm: str, dataset: str) -> Space:
    """{name: (default, draw)} of an algorithm on a dataset; draw(RandomState) -> value."""
    return _shared(dataset) | algorithms.get_algorithm_class(algorithm).search_space(dataset)


def default_hparams(algorithm: str, dataset: str) -> dict[str, Any]:
    """{name: value}, all at their defaults."""
    return _hparams(algorithm, dataset, None)


def random_hparams(algorithm: str, dataset: str, seed: int) -> dict[str, Any]:
    """{name: value}, each drawn from its own stream of `seed`."""
    return _hparams(algorithm, dataset, seed)


def _hparams(algorithm: str, dataset: str, seed: int | None) -> dict[str, Any]:
    # A fork's algorithm has its fork's hparams.
    brought = algorithms.get_algorithm_class(algorithm).all_hparams
    return brought(dataset, seed) if brought else _drawn(search_space(algorithm, dataset), seed)


def of_teachers(text: str | None, seed: int | None) -> dict[str, Any]:
    """The hparams that teachers in --hparams add: drawn, or without a seed their defaults."""
    return _drawn(composition.search_space(parse_hparams(text)) if text else {}, seed)


def _drawn(space: Space, seed: int | None) -> dict[str, Any]:
    """A draw of each entry, or its default without a seed."""
    def draw(name: str, default: Any, draw_value: Callable[[Any], Any]) -> Any:
        if seed is None:
            return default
        value = draw_value(np.random.RandomState(seed_hash(seed, name)))
        return value.item() if isinstance(value, np.generic) else value

    return {name: draw(name, *entry) for name, entry in space.items()}


def refuse_label_smoothing(algorithm: str, text: str | None) -> None:
    """Refuses label_smoothing in --hparams for methods that do not read it; plug-ins may read it.

    Raises:
        ValueError: naming the methods that do.
    """
    def reads_it(name: str) -> bool:
        return "label_smoothing" in algorithms.get_algorithm_class(name).takes

    if (text and parse_hparams(text).get("label_smoothing")
            and algorithms.canonical_name(algorithm) in algorithms.SHIPPED
            and not reads_it(algorithm)):
        raise ValueError(f"{algorithm} does not read the hparam label_smoothing, as only "
                         f"{', '.join(filter(reads_it, algorithms.SHIPPED))} do. Leave it out, or "
                         'give it to a teacher: {"run": "ERM", "hparams": {"label_smoothing": '
                         '0.1}}.')


def override(hparams: dict[str, Any], text: str | None, takes: Mapping[str, Takes] = {}
             ) -> dict[str, Any]:
    """`hparams` with those of a JSON object, such as '{"lr": 0.001}', on top.

    A value must be of its default's kind. As some of DomainBed's defaults are whole numbers where
    it draws fractions, a float that fits a method's `takes` will do too. Names that neither the
    algorithm nor `OPTIONAL` knows are accepted with a warning.

    Raises:
        ValueError: if the text is not a JSON object, or a value is not of its default's kind.
    """
    if text is None:
        return hparams
    changes = parse_hparams(text)
    for name, value in changes.items():
        if name not in hparams and name not in OPTIONAL:
            warnings.warn(f"--hparams: nothing here reads {name!r}."
                          f"{did_you_mean(name, [*hparams, *OPTIONAL])}", stacklevel=2)
        default = hparams.get(name)
        if default is not None and not _replaces(value, default) and not (
                isinstance(value, float) and name in takes and takes[name].fits(value)):
            raise ValueError(f"--hparams: {name} is {json.dumps(value)}, {_kind(value)}; it takes "
                             f"{_kind(default)}.")
    if not 0 < changes.get("batch_size", 1):
        raise ValueError(f"--hparams: batch_size is {changes['batch_size']}; it takes at least 1.")
    return hparams | changes


def _kind(value: object) -> str:
    return "an int" if type(value) is int else f"a {type(value).__name__}"


def _replaces(value: object, default: object) -> bool:
    """Whether a value is of its default's kind; an int may replace a float."""
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)
