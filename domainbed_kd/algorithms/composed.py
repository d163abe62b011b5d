"""Teachers on top of any algorithm: `--hparams '{"teachers": ["run:SWAD"], "distill": "logit"}'`.

The algorithm keeps its loss L, its batches and its optimiser. Terms are added to L, computed from
the features and logits of its own forward pass:

    base_weight L + distill_weight / J * (sum over the J teachers and the words in `distill`)

logit: Hinton et al., 2014, `losses.kd_loss`; for segmentation the only word, averaged over the
pixels that are not ignored. feature: cosine distance of projected features, after Romero et al.,
"FitNets", ICLR 2015. feature_mse: their mean squared difference, as in FitNets. relation: Park et
al., "Relational Knowledge Distillation", CVPR 2019, on cosines. text: RISE's distances, with its
constants; see rise.py. ERM with one teacher, base_weight 1 - alpha and distill_weight alpha is KD.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import algorithms, averaging, networks, teachers
from domainbed_kd.algorithms import rise, scheduled
from domainbed_kd.algorithms.base import forked_rng
from domainbed_kd.folder import composition
from domainbed_kd.losses import kd_loss
from domainbed_kd.tasks import SEGMENTATION

# At this temperature the relative distance pulls as hard as the absolute one; see rise.py.
TEXT_TEMPERATURE = 0.1
# The cross-entropy of a wrong prediction, in nats, where `validate` is used to count these.
ERROR = 1000.0


def assembled(algorithm_class: type, hparams: dict) -> type:
    """The algorithm with the teachers, schedule and average that hparams put on top of it."""
    check(algorithm_class, hparams)
    if hparams.get("teachers"):
        algorithm_class = type(algorithm_class.__name__, (Composed, algorithm_class), {})
    if hparams.get("schedule", "none") != "none":
        algorithm_class = type(
            algorithm_class.__name__, (scheduled.Scheduled, algorithm_class),
            {"takes": algorithm_class.takes | scheduled.TAKES})
    return averaging.averaged(algorithm_class, hparams.get("averaging"))


def check(algorithm_class: type, hparams: dict) -> None:
    """Refuses teachers, averages and other hparams that an algorithm cannot take; builds nothing.

    Raises:
        ValueError: saying why.
    """
    algorithm_class.check_hparams(hparams)
    averaging.averaged(algorithm_class, hparams.get("averaging"))
    name, on_top = algorithm_class.shown_name(), composition.teachers(hparams)
    of_method = composition.teacher_of_method(hparams)
    if of_method and not algorithm_class.learns_from_run:
        raise ValueError(f"{name} does not learn from a run: leave out the hparam teacher, or put "
                         'the run on top of it: "teachers": [...].')
    if not teachers.is_taught_by_target(algorithm_class, hparams):
        _check_leaks(name, hparams)
    if hparams.get("task") == SEGMENTATION.name:
        _check_maps(name, on_top if of_method is None else [*on_top, of_method])
    if on_top:
        for cannot, reason in _obstacles(algorithm_class, hparams, on_top):
            if cannot:
                _refuse(name, reason)
    elif idle := [key for key in composition.OF_TEACHERS if key in hparams]:
        raise ValueError(f"{name}: {idle[0]} needs teachers. Name one, for example "
                         '"teachers": ["run:ERM"].')


def _obstacles(cls: type, hparams: dict, on_top: list[composition.Teacher]
               ) -> Iterator[tuple[object, str]]:
    """Whether each obstacle is there, and the reason to give then."""
    words, mix = composition.words(hparams), hparams.get("teacher_mix", "sum")
    template = hparams.get("teacher_template", "{}")
    known = list(composition.DISTILL)
    yield cls.learns_from_run, 'it brings its own teacher. Name that by "teacher": "run:..."'
    yield cls.teacher_logits is not None, (
        "it brings its own teacher. Choose a base that has none, such as ERM or CORAL")
    yield cls.no_teachers, cls.no_teachers
    if hparams.get("task") == SEGMENTATION.name:
        yield words != ["logit"], (
            f'where each pixel has a label, distill takes "logit" alone, not {words}')
        yield cls.rearranges_images, (
            "the images of its loss are not its minibatches', so that nothing tells which pixels "
            "are ignored")
    yield (not words or any(word not in known or words.count(word) > 1 for word in words),
           f"distill is {hparams.get('distill')!r}; it takes {', '.join(known)}, or a list of "
           "them, each once")
    yield mix not in composition.MIXES, (
        f"teacher_mix is {mix!r}; it takes {', '.join(composition.MIXES)}")
    yield mix != "sum" and words != ["logit"], (
        f'teacher_mix {mix!r} makes one prediction of all teachers, so distill must be "logit"')
    yield not isinstance(template, str) or "{}" not in template, (
        f"teacher_template is {template!r}; it takes a sentence with {{}} in place of the class")
    if "text" in words:
        other = next((each.shown for each in on_top if each.kind != "clip"), None)
        yield other, f"distill \"text\" copies CLIP's sentences, and {other} reads none"
        yield cls.rearranges_images, (
            'distill "text" needs labels, and the images of its loss are not its minibatches\'')


def _refuse(name: str, reason: str) -> NoReturn:
    raise ValueError(f"{name}: teachers do not go with this: {reason}.")


def _check_leaks(name: str, hparams: dict) -> None:
    """Refuses teachers that have seen, or learned from, the domains that the student is tested on.

    Those that a sweep trains are known by their hparams; of a folder, `teachers.from_run` knows.
    """
    for teacher in composition.runs(hparams):
        if teacher.swapped:
            raise ValueError(f"{name}: the teacher {teacher.shown} trains on the domains on which "
                             f'{name} is tested. Leave out "swapped".')
        if teachers.may_know_target(teacher.name, teacher.hparams_of_run(hparams)):
            raise ValueError(f"{name}: the teacher {teacher.shown} learns from a teacher that may "
                             f"have seen the domains on which {name} is tested. Name another.")


def _check_maps(name: str, asked: list[composition.Teacher]) -> None:
    """Refuses teachers that cannot predict a class for each pixel."""
    for teacher in asked:
        reason = None
        if teacher.kind == "clip":
            reason = "it compares sentences with images, not with pixels"
        elif teacher.kind == "run":
            reason = algorithms.get_algorithm_class(teacher.name).needs_image_labels
        if reason:
            raise ValueError(f"{name}: {teacher.shown} cannot teach where each pixel has a label: "
                             f"{reason}.")


@contextlib.contextmanager
def caught(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects (input, output) of the module's calls inside whose output has a gradient."""
    calls = []

    def note(_, args, output):
        if output.requires_grad:
            calls.append((args[0], output))

    hook = module.register_forward_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


def feature_distance(projected: Tensor, seen: Tensor) -> Tensor:
    """Mean cosine distance, in [0, 2], of projected features from a teacher's, both (B, D)."""
    return 1 - F.cosine_similarity(projected, seen, dim=-1).mean()


def relation_distance(features: Tensor, seen: Tensor) -> Tensor:
    """Mean squared difference between the student's and the teacher's cosines of image pairs.

    Features are (B, d) and (B, D). An image's cosine with itself is left out.
    """
    own, wanted = (F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T for x in (features, seen))
    n = len(features)
    return F.mse_loss(own, wanted, reduction="sum") / (n * (n - 1))  # the diagonals are equal


class Composed:
    """An Algorithm that also learns from frozen teachers; mixed in by `assembled`.

    Each of `teachers` turns images into features, and its entry of `heads` turns these into
    logits. Projections that a term needs have an optimiser of their own. `predict` needs none of
    this.

    Raises:
        ValueError, FileNotFoundError: as `check` does, or if a teacher cannot be built; in an
            update, if the algorithm does not take exactly one step on its classifier's logits.
    """

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not isinstance(self.part("featurizer"), nn.Module):
            _refuse(self.shown_name(), "it has no featurizer and classifier of its own")
        for warning in composition.named_twice(hparams):
            print(warning, file=sys.stderr)
        self.words = composition.words(hparams)
        self.weight = hparams.get("distill_weight", 1.0)
        self.base_weight = hparams.get("base_weight", 1.0)
        self.temperature = hparams.get("distill_temperature", 4.0)
        self.mix = hparams.get("teacher_mix", "sum")
        if "relation" in self.words and hparams["batch_size"] * num_domains < 3:
            raise ValueError(f"{self.shown_name()}: distill \"relation\" compares pairs of images "
                             "and needs a batch of 3 or more. Raise batch_size.")
        self.num_classes = num_classes
        with forked_rng():
            self._build_teachers(input_shape, num_classes, hparams)
        self.projection_optimizer = (
            self.adam(self.taught.projections) if self.taught.projections else None)
        self.needs_labels = "text" in self.words or hparams.get("task") == SEGMENTATION.name
        self._images = self._logits = self._labels = self._terms = None

    def _build_teachers(self, input_shape, num_classes, hparams):
        folders = hparams.get("teacher") or []
        folders = iter(folders if isinstance(folders, (list, tuple)) else [folders])
        needs_features = not {"feature", "feature_mse", "relation"}.isdisjoint(self.words)
        pairs = [teachers.in_two(each, hparams, num_classes, input_shape, folders, needs_features)
                 for each in composition.teachers(hparams)]
        self.teachers, self.heads = (nn.ModuleList(part) for part in zip(*pairs))
        # The state that `predict` does not need, under one name.
        self.taught = nn.Module()
        self.taught.register_buffer("shares", torch.full((len(pairs),), 1 / len(pairs)))
        self.taught.projections = nn.ModuleDict()
        width = self.featurizer.n_outputs
        for i, eye in enumerate(self.teachers):
            for word in self.words:
                if word == "text":
                    text, styled = rise.sentences(eye, rise.NEUTRAL, hparams)
                    self.register_buffer(f"text{i}", text, persistent=False)
                    self.register_buffer(f"styled{i}", styled, persistent=False)
                    self.taught.projections[f"text{i}"] = nn.Linear(width, text.shape[1])
                elif word in ("feature", "feature_mse"):
                    n_seen = eye(torch.zeros(1, *input_shape)).shape[1]
                    self.taught.projections[f"{word}{i}"] = nn.Linear(width, n_seen)

    @property
    def teacher(self) -> networks.Frozen:
        """The first teacher."""
        return self.teachers[0]

    @property
    def needs_same_view(self) -> str | None:
        """Why teachers must see the student's own images, if its loss is on other images."""
        return ("the images of its loss are not those of its minibatches" if self.rearranges_images
                else None)

    def update(self, minibatches, unlabeled=None):
        """The algorithm's update, with the teachers' terms added to the loss of its one step."""
        if not self.weight and self.base_weight == 1:
            return super().update(minibatches, unlabeled)
        if self.needs_labels:
            self._labels = torch.cat([y for _, y in minibatches])
        self._terms = None
        with caught(self.featurizer) as self._images, caught(self.classifier) as self._logits:
            values = super().update(minibatches, unlabeled)
        if self._terms is None:
            _refuse(self.shown_name(), "its update makes no step by `descend`")
        return values | {name: term.detach() for name, term in self._terms.items()}

    def descend(self, loss: Tensor, **terms: Tensor | float) -> dict[str, Tensor | float]:
        """The algorithm's step, on its loss and the teachers' terms."""
        if not self.weight and self.base_weight == 1:
            return super().descend(loss, **terms)
        if self._terms is not None:
            _refuse(self.shown_name(), "it makes more than one step in an update")
        if self.base_weight != 1:
            loss = self.base_weight * loss
        self._terms = self._distill() if self.weight else {}
        if self._terms:
            loss = loss + self.weight * sum(self._terms.values())
        if self.projection_optimizer is None:
            return super().descend(loss, **terms)
        self.projection_optimizer.zero_grad()
        values = super().descend(loss, **terms)
        self.projection_optimizer.step()
        return values

    def _distill(self) -> dict[str, Tensor]:
        """{word: term}, each the mean over the teachers, on the images that the student saw."""
        if sum(len(z) for _, z in self._logits) != sum(len(x) for x, _ in self._images):
            _refuse(self.shown_name(), "its classifier does not look at each image once")
        x = torch.cat([x for x, _ in self._images]).detach()
        features = torch.cat([features for _, features in self._images])
        logits = torch.cat([logits for _, logits in self._logits])
        seen = [eye(x) for eye in self.teachers]
        terms = {}
        for word in self.words:
            if word == "logit" and self.mix != "sum":
                terms[word] = kd_loss(logits, self._mixed(seen, self.temperature),
                                      self.temperature, self._labels)
            else:
                terms[word] = sum(self._term(word, i, features, logits, of_one)
                                  for i, of_one in enumerate(seen)) / len(seen)
        return terms

    def _term(self, word, i, features, logits, seen):
        if word == "logit":
            return kd_loss(logits, self.heads[i](seen), self.temperature, self._labels)
        if word == "relation":
            return relation_distance(features, seen)
        projected = self.taught.projections[f"{word}{i}"](features)
        if word == "feature":
            return feature_distance(projected, seen)
        if word == "feature_mse":
            return F.mse_loss(projected, seen)
        text, styled = getattr(self, f"text{i}"), getattr(self, f"styled{i}")
        return (rise.absolute_distance(projected, text, self._labels)
                + 10 * rise.relative_distance(  # 10: RISE's scale
                    projected, text, styled, self._labels, TEXT_TEMPERATURE))

    def _mixed(self, seen: list[Tensor], temperature: float) -> Tensor:
        """The logits (B, C, ...) of the teachers' mean probabilities at a temperature."""
        of_all = torch.stack([(head(of_one) / temperature).log_softmax(dim=1)
                              for head, of_one in zip(self.heads, seen)])  # (J, B, C, ...)
        shares = self.taught.shares.view(-1, *(1 for _ in of_all.shape[1:]))
        return temperature * (of_all + shares.log()).logsumexp(dim=0)

    def checkpoint(self, step, last, validate, batches) -> None:
        """As the algorithm's own. After the first update it may weigh teachers by accuracy."""
        super().checkpoint(step, last, validate, batches)
        if step == 0 and self.mix == "accuracy":
            right = [1 - validate(self._costs(i)) / ERROR for i in range(len(self.teachers))]
            if any(right):  # else the shares stay equal
                self.taught.shares.copy_(torch.tensor(right) / sum(right))

    def _costs(self, i: int):
        """A predictor whose cross-entropy is ERROR where teacher `i` is wrong and 0 elsewhere."""
        def predict(x):
            guess = self.heads[i](self.teachers[i](x)).argmax(dim=1)
            return ERROR * F.one_hot(guess, self.num_classes).movedim(-1, 1).float()

        return predict

    @torch.no_grad()
    def teacher_logits(self, x):
        """The teachers' joint logits (B, C, ...) of the student's images."""
        seen = [eye(x) for eye in self.teachers]
        return self.heads[0](seen[0]) if len(seen) == 1 else self._mixed(seen, 1.0)
