"""A run's teachers, from its hparams `teachers` and `teacher`, and the name of its table row.

`teachers` adds teachers to any algorithm, see `algorithms.composed`; `teacher` replaces the sweep's
ERM run as the teacher of a method such as KD.
"""

import functools
import json
from typing import NamedTuple

from domainbed_kd.console import parse_hparams

#: What to distil: {value of the hparam `distill`: its name in table rows}.
DISTILL = {"logit": "KD", "feature": "Feature", "feature_mse": "FeatureMSE",
           "relation": "Relation", "text": "Text"}
#: Ways to combine several teachers.
MIXES = ("sum", "mean", "accuracy")
#: Prefixes of state that teachers and schedules add, which predictions do not need.
STATE = ("taught.", "schedule.")
#: Hparams that need added teachers.
OF_TEACHERS = ("distill", "distill_weight", "distill_temperature", "teacher_mix",
               "teacher_template", "base_weight")
#: Hparams of the student that its teachers do not share.
OWN = ("teacher", "teachers", *OF_TEACHERS, "averaging", "sma_start", "beta_average", "beta_start")
# Hparams that choose the network or its weights.
_NETWORK = ("backbone", "weights", "resnet18", "resnet50_augmix", "vit", "dinov2")
_FORMS = ('a teacher is "run:ALGORITHM", {"run": ALGORITHM, "hparams": {...}, "steps": N, '
          '"swapped": true}, '
          '"timm:NETWORK", "folder:PATH", "clip" or what clip_backbone takes')


class Teacher(NamedTuple):
    """One teacher."""

    #: "run" that the sweep trains, "folder" of a finished run, or "clip".
    kind: str
    #: The name of the algorithm, folder or CLIP; None for the CLIP that fits the dataset.
    name: str | None
    #: For a run: hparams that override those shared with its student.
    hparams: dict = {}
    #: For a run: its steps; None for its student's.
    steps: int | None = None
    #: For a run: whether it trains on the student's test domains and holds out the others.
    swapped: bool = False
    #: Its name in table rows.
    shown: str = ""

    def hparams_of_run(self, student: dict) -> dict:
        """The run's --hparams, given its student's."""
        without = OWN + (_NETWORK if "backbone" in self.hparams else ())
        return {name: value for name, value in student.items() if name not in without
                } | self.hparams


def teachers(hparams: dict) -> list[Teacher]:
    """The teachers that hparams ask for, in order.

    Raises:
        ValueError: if one is malformed.
    """
    asked = hparams.get("teachers") or []
    if not isinstance(asked, list):
        raise ValueError(f"teachers is {asked!r}; it takes a list.")
    return [_teacher(each) for each in asked]


def named_twice(hparams: dict) -> list[str]:
    """A warning for each added teacher that is listed more than once."""
    asked = teachers(hparams)
    return [f"teachers: {shown} is listed more than once, and each time adds to its weight."
            for shown in dict.fromkeys(each.shown for each in asked if asked.count(each) > 1)]


def teacher_of_method(hparams: dict) -> Teacher | None:
    """The run that teaches a method such as KD; None for the sweep's ERM run."""
    asked = hparams.get("teacher")
    if isinstance(asked, dict) or isinstance(asked, str) and asked.startswith(("run:", "timm:")):
        return _teacher(asked)
    return None  # a folder or, in Python, a module


def runs(hparams: dict) -> list[Teacher]:
    """The teachers that a sweep trains first, in order, without a method's ERM run."""
    if asked := teacher_of_method(hparams):
        return [asked]
    return [each for each in teachers(hparams) if each.kind == "run"]


def _teacher(asked) -> Teacher:
    if isinstance(asked, dict):
        run, hparams = asked.get("run"), asked.get("hparams", {})
        steps, swapped = asked.get("steps"), asked.get("swapped", False)
        if (isinstance(run, str) and isinstance(hparams, dict) and isinstance(swapped, bool)
                and isinstance(steps, (int, type(None)))
                and asked.keys() <= {"run", "hparams", "steps", "swapped"}):
            if steps is not None and steps < 0:
                raise ValueError(f"teachers: steps of {run} is {steps}; it takes a number of "
                                 "updates, or 0 for the dataset's own.")
            changes = {name: value for name, value in hparams.items() if name not in OWN}
            changes |= {} if steps is None else {"steps": steps}
            shown = [_row(run, hparams), *(f"{name} {value}" for name, value in changes.items()),
                     *["swapped"] * swapped]
            return Teacher("run", run, hparams, steps, swapped, ", ".join(shown))
    if not isinstance(asked, str):
        raise ValueError(f"teachers: {asked!r} is not a teacher; {_FORMS}.")
    kind, colon, name = asked.partition(":")
    if colon and not name:
        raise ValueError(f"teachers: {asked!r} names nothing after the colon; {_FORMS}.")
    if colon and kind == "run":
        return Teacher("run", name, shown=name)
    if colon and kind == "timm":
        return Teacher("run", "LinearProbe", {"backbone": name}, shown=name)
    if colon and kind == "folder":
        return Teacher("folder", name, shown=name.rstrip("/").rpartition("/")[2])
    if asked == "clip":
        return Teacher("clip", None, shown="CLIP")
    return Teacher("clip", asked, shown=f"CLIP {asked}")


@functools.lru_cache(maxsize=10000)
def without_own(text: str) -> str | None:
    """Hparams as JSON without those in OWN, which the row's name shows; None if nothing is left."""
    left = {name: value for name, value in parse_hparams(text).items() if name not in OWN}
    return json.dumps(left) if left else None


def search_space(hparams: dict) -> dict:
    """{name: (default, draw)} of the hparams that added teachers need; empty without teachers."""
    if not hparams.get("teachers"):
        return {}
    return {
        "distill_weight": (1.0, lambda r: 10 ** r.uniform(-1, 1)),
        "distill_temperature": (4.0, lambda r: r.choice([1.0, 2.0, 4.0, 8.0])),
    }


def words(hparams: dict) -> list[str]:
    """The hparam `distill`, as a list."""
    asked = hparams.get("distill", "logit")
    return asked if isinstance(asked, list) else [asked]


def others(hparams: dict) -> list[str]:
    """The names of added teachers that a sweep does not train; empty if they are malformed."""
    try:
        return [each.shown for each in teachers(hparams) if each.kind != "run"]
    except ValueError:
        return []


def row(algorithm: str, hparams: dict) -> str:
    """The table row of an algorithm with these hparams, such as "CORAL + KD(SWAD) + SMA".

    Malformed teachers are left out, as records may come from an untrusted file.
    """
    try:
        return _row(algorithm, hparams)
    except (ValueError, TypeError, AttributeError):
        return algorithm


def _row(algorithm: str, hparams: dict) -> str:
    if teacher := teacher_of_method(hparams):
        algorithm += f"({teacher.shown})"
    if found := teachers(hparams):
        mix = hparams.get("teacher_mix", "sum")
        how = "" if mix == "sum" else f"{mix} of "
        algorithm += (f" + {'+'.join(DISTILL.get(word, str(word)) for word in words(hparams))}"
                      f"({how}{', '.join(each.shown for each in found)})")
    if averaging := hparams.get("averaging"):
        algorithm += f" + {averaging.upper() if averaging != 'beta' else 'Beta'}"
    return algorithm
