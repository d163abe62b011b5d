"""Teachers on top of any algorithm: `--hparams '{"teachers": ["run:SWAD"], "distill": "logit"}'`.

The algorithm keeps its loss, its batches and its optimiser; terms are added to the one loss that it
descends, on what its own forward pass computed:

    base_weight L + distill_weight / J  sum over J teachers and the words of `distill` of a term

logit: Hinton et al., 2014, `losses.kd_loss`; on maps the one term that there is, over the pixels
that are not ignored. feature: cosine distance of projected features, after
Romero et al., "FitNets", ICLR 2015. relation: Park et al., "Relational Knowledge Distillation",
CVPR 2019, on cosines. text: RISE's distances, with its constants; see rise.py. With base_weight
1 - alpha and distill_weight alpha, ERM and one teacher are KD.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import algorithms, averaging, networks, teachers
from domainbed_kd.algorithms import rise, scheduled
from domainbed_kd.algorithms.base import above, at_least, forked_rng, one_of
from domainbed_kd.folder import composition
from domainbed_kd.losses import kd_loss
from domainbed_kd.tasks import SEGMENTATION

# Where the relative distance pulls as hard as the absolute one; see rise.py.
TEXT_TEMPERATURE = 0.1
# What a wrong prediction costs, in nats, where the cross-entropy shall count them.
ERROR = 1000.0


def assembled(algorithm_class: type, hparams: dict) -> type:
    """The algorithm with the teachers, schedule and average that hparams put on top of it."""
    check(algorithm_class, hparams)
    if hparams.get("teachers"):
        algorithm_class = type(algorithm_class.__name__, (Composed, algorithm_class), {})
    if hparams.get("schedule", "none") != "none":
        algorithm_class = type(
            algorithm_class.__name__, (scheduled.Scheduled, algorithm_class), {})
    return averaging.averaged(algorithm_class, hparams.get("averaging"))


def check(algorithm_class: type, hparams: dict) -> None:
    """Refuses hparams of teachers that have no meaning on an algorithm, before anything is built.

    Raises:
        ValueError: saying why.
    """
    name = algorithm_class.display_name or algorithm_class.__name__
    of_method = composition.teacher_of_method(hparams)
    if of_method and not algorithm_class.learns_from_run:
        raise ValueError(f"{name} does not learn from a run: leave out the hparam teacher, or put "
                         'the run on top of it: "teachers": [...].')
    asked = composition.teachers(hparams)
    words, mix = composition.words(hparams), hparams.get("teacher_mix", "sum")
    of_maps = hparams.get("task") == SEGMENTATION.name
    for teacher in (*asked, of_method) if of_maps else ():
        if reason := teacher and _why_no_maps(teacher):
            raise ValueError(f"{name}: {teacher.shown} cannot teach where each pixel has a label: "
                             f"{reason}.")
    if not asked:
        if idle := [key for key in ("distill", "distill_weight", "teacher_mix") if key in hparams]:
            raise ValueError(f"{name}: {idle[0]} needs teachers. Name one, for example "
                             '"teachers": ["run:ERM"].')
        return
    if algorithm_class.learns_from_run:
        reason = 'it brings its own teacher. Name that by "teacher": "run:..."'
    elif algorithm_class.teacher_logits is not None:
        reason = "it brings its own teacher. Choose a base that has none, such as ERM or CORAL"
    elif algorithm_class.no_teachers:
        reason = algorithm_class.no_teachers
    elif of_maps and words != ["logit"]:
        reason = f'where each pixel has a label, distill takes "logit" alone, not {words}'
    elif of_maps and algorithm_class.rearranges_images:
        reason = ("the images of its loss are not its minibatches', so that nothing tells which "
                  "pixels are ignored")
    elif unknown := [word for word in words if word not in list(composition.DISTILL)]:
        reason = f"distill is {unknown[0]!r}; it takes {', '.join(composition.DISTILL)}, or a list"
    elif not words or len(set(words)) < len(words):
        reason = f"distill is {words}; it takes each of {', '.join(composition.DISTILL)} once"
    elif mix not in composition.MIXES:
        reason = f"teacher_mix is {mix!r}; it takes {', '.join(composition.MIXES)}"
    elif mix != "sum" and words != ["logit"]:
        reason = (f"teacher_mix {mix!r} is one prediction of all teachers, so it goes with distill "
                  '"logit" alone')
    elif "text" in words and (others := [each.shown for each in asked if each.kind != "clip"]):
        reason = f"distill \"text\" copies CLIP's sentences, and {others[0]} reads none"
    elif "text" in words and algorithm_class.rearranges_images:
        reason = 'distill "text" needs labels, and the images of its loss are not its minibatches\''
    else:
        return
    raise ValueError(f"{name}: teachers do not go with this: {reason}.")


def _why_no_maps(teacher: composition.Teacher) -> str | None:
    if teacher.kind == "clip":
        return "it compares sentences with images, not with pixels"
    return (algorithms.get_algorithm_class(teacher.name).needs_image_labels
            if teacher.kind == "run" else None)


@contextlib.contextmanager
def caught(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, the list gathers (input, output) of the module's calls that have a gradient."""
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
    """Mean squared difference of the cosines between images, as student and teacher have them.

    Features are (B, d) and (B, D); an image's cosine with itself is left out.
    """
    own, wanted = (F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T for x in (features, seen))
    n = len(features)
    return F.mse_loss(own, wanted, reduction="sum") / (n * (n - 1))  # the diagonals are equal


class Composed:
    """An Algorithm that also learns from frozen teachers; mixed in by `assembled`.

    Each of `teachers` sees images, and its head makes logits of what it has seen. Projections that
    a term needs are trained beside the algorithm's own optimiser; `predict` needs none of this.

    Raises:
        ValueError, FileNotFoundError: as `check` and the teachers' own; in an update, if the
            algorithm does not make exactly one step, on the logits of its classifier.
    """

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        name = self.display_name or type(self).__name__
        for hparam, takes in {
                "distill_weight": at_least(0), "base_weight": at_least(0),
                "distill_temperature": above(0),
                "teacher_mix": one_of(*composition.MIXES)}.items():
            if hparam in hparams and not takes.fits(hparams[hparam]):
                raise ValueError(f"{name}: {hparam} is {hparams[hparam]!r}; it takes "
                                 f"{takes.words}.")
        if not isinstance(self.part("featurizer"), nn.Module):
            raise ValueError(f"{name}: teachers do not go with this: it has no featurizer and "
                             "classifier of its own.")
        self.words = composition.words(hparams)
        self.weight = hparams.get("distill_weight", 1.0)
        self.base_weight = hparams.get("base_weight", 1.0)
        self.temperature = hparams.get("distill_temperature", 4.0)
        self.mix = hparams.get("teacher_mix", "sum")
        if "relation" in self.words and hparams["batch_size"] * num_domains < 3:
            raise ValueError(f"{name}: distill \"relation\" compares pairs of images and needs a "
                             "batch of 3 or more. Raise batch_size.")
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
        needs_features = not {"feature", "relation"}.isdisjoint(self.words)
        pairs = [teachers.in_two(each, hparams, num_classes, input_shape, folders, needs_features)
                 for each in composition.teachers(hparams)]
        self.teachers, self.heads = (nn.ModuleList(part) for part in zip(*pairs))
        # All of its state that `predict` does not need, under a name of its own.
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
                elif word == "feature":
                    n_seen = eye(torch.zeros(1, *input_shape)).shape[1]
                    self.taught.projections[f"feature{i}"] = nn.Linear(width, n_seen)

    @property
    def teacher(self) -> networks.Frozen:
        """The first teacher."""
        return self.teachers[0]

    @property
    def needs_same_view(self) -> str | None:
        """Why teachers must see the student's images: it makes others of its minibatches."""
        return ("the images of its loss are not those of its minibatches" if self.rearranges_images
                else None)

    def update(self, minibatches, unlabeled=None):
        """The algorithm's update, whose one step is on the teachers' terms too."""
        if not self.weight and self.base_weight == 1:
            return super().update(minibatches, unlabeled)
        if self.needs_labels:
            self._labels = torch.cat([y for _, y in minibatches])
        self._terms = None
        with caught(self.featurizer) as self._images, caught(self.classifier) as self._logits:
            values = super().update(minibatches, unlabeled)
        if self._terms is None:
            raise ValueError(self._misfit("its update makes no step by `descend`"))
        return values | {name: term.detach() for name, term in self._terms.items()}

    def descend(self, loss: Tensor, **terms: Tensor | float) -> dict[str, Tensor | float]:
        """The step that the algorithm makes, on its loss and the teachers' terms."""
        if not self.weight and self.base_weight == 1:
            return super().descend(loss, **terms)
        if self._terms is not None:
            raise ValueError(self._misfit("it makes more than one step in an update"))
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
        """{word: its term}, means over the teachers, of the images that the student has seen."""
        if sum(len(z) for _, z in self._logits) != sum(len(x) for x, _ in self._images):
            raise ValueError(self._misfit("its classifier does not look at each image once"))
        x = torch.cat([x for x, _ in self._images]).detach()
        features = torch.cat([features for _, features in self._images])
        logits = torch.cat([logits for _, logits in self._logits])
        seen = [eye(x) for eye in self.teachers]
        terms = {}
        for word in self.words:
            if word == "logit" and self.mix != "sum":
                terms[word] = kd_loss(logits, self._mixed(seen, self.temperature),
                                      self.temperature, self._labels)
                continue
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

    def _misfit(self, reason: str) -> str:
        return (f"{self.display_name or type(self).__name__}: teachers do not go with this: "
                f"{reason}.")

    def checkpoint(self, step, last, validate, batches) -> None:
        """The algorithm's own; after the first update teachers get shares by their accuracy."""
        super().checkpoint(step, last, validate, batches)
        if step == 0 and self.mix == "accuracy":
            right = [1 - validate(self._costs(i)) / ERROR for i in range(len(self.teachers))]
            self.taught.shares.copy_(torch.tensor(right) / sum(right))

    def _costs(self, i: int):
        """A predictor whose cross-entropy is ERROR where teacher `i` is wrong, else 0."""
        def predict(x):
            guess = self.heads[i](self.teachers[i](x)).argmax(dim=1)
            return ERROR * F.one_hot(guess, self.num_classes).movedim(-1, 1).float()

        return predict

    @torch.no_grad()
    def teacher_logits(self, x):
        """What the teachers together make of images: logits (B, C, ...)."""
        seen = [eye(x) for eye in self.teachers]
        return self.heads[0](seen[0]) if len(seen) == 1 else self._mixed(seen, 1.0)
