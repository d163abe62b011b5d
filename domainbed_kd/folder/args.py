"""Every flag of a run, declared once: for `train`, for `sweep`, and for records."""

import argparse
import functools
import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from domainbed_kd.console import parse_hparams

# Whether records keep a flag's value in their args: always, as for DomainBed's flags; only if it
# is given, as DomainBed's records lack it; or never.
ALWAYS, IF_GIVEN, NEVER = "always", "if given", "never"


class Flag(NamedTuple):
    """A flag of a run."""

    name: str
    help: str
    #: Converts its value; bool for a switch.
    type: Callable = str
    #: The value if it is not given, or if a record lacks it.
    default: object = None
    #: ALWAYS, IF_GIVEN or NEVER.
    on_record: str = ALWAYS
    #: Whether runs with different values are different runs, which cannot continue each other.
    is_identity: bool = False
    #: Whether the runs in a table's cell must agree in it to be comparable.
    is_setting: bool = False
    #: Whether sweeps pass it to their runs. Recorded flags are then part of folder names: ALWAYS,
    #: or IF_GIVEN.
    in_sweep: str | None = None
    #: Further arguments of `add_argument`.
    options: Mapping = {}


def _fork(folder: str) -> str:
    if not os.path.isdir(os.path.join(folder, "domainbed")):
        raise argparse.ArgumentTypeError(
            f"{folder} is not a folder that holds a package domainbed.")
    return folder


DOMAINBEDS = (
    Flag("data_dir", "folder that holds the datasets", in_sweep=ALWAYS),
    Flag("dataset", "a dataset by name, or Folder:NAME for images of your own in "
                    "DATA_DIR/NAME/DOMAIN/CLASS/", default="RotatedMNIST", is_identity=True),
    Flag("algorithm", "an algorithm by name", default="ERM", is_identity=True),
    Flag("steps", "updates in a run; absent or, as in DomainBed, 0: the dataset's own number",
         int, is_identity=True, is_setting=True, in_sweep=IF_GIVEN, options={"metavar": "N"}),
    Flag("hparams", "JSON object merged over the chosen hparams", is_identity=True,
         is_setting=True, in_sweep=IF_GIVEN, options={"metavar": "JSON"}),
    Flag("task", "domain_adaptation also gives unlabeled test-domain images to update",
         default="domain_generalization", is_identity=True, is_setting=True, in_sweep=ALWAYS,
         options={"choices": ["domain_generalization", "domain_adaptation"]}),
    Flag("hparams_seed", "seed of the random hparams; 0 takes the defaults", int, 0,
         is_identity=True),
    Flag("trial_seed", "seed of the splits and, with hparams_seed, of the random hparams", int, 0,
         is_identity=True),
    Flag("seed", "seed of everything else", int, 0, is_identity=True),
    Flag("checkpoint_freq", "steps between evaluations; absent or 0: the dataset's own", int,
         is_identity=True, in_sweep=IF_GIVEN, options={"metavar": "N"}),
    Flag("test_envs", "numbers of the domains to hold out", int, [0], is_identity=True,
         options={"nargs": "+"}),
    Flag("output_dir", "folder of this run", default="train_output"),
    Flag("holdout_fraction", "share of each domain kept for validation", float, 0.2,
         is_identity=True, in_sweep=ALWAYS, options={"metavar": "SHARE"}),
    Flag("uda_holdout_fraction", "share of the test domains given to update without labels",
         float, 0, is_identity=True, in_sweep=IF_GIVEN, options={"metavar": "SHARE"}),
    Flag("skip_model_save", "write no model.pkl", bool, False, is_identity=True,
         in_sweep=IF_GIVEN),
    Flag("save_model_every_checkpoint", "write model_stepN.pkl at each evaluation", bool, False),
)
OURS = (
    Flag("teacher", "folder of a finished run that teaches, for methods that learn from one; with "
                    "the hparam teachers, one folder for each run among them",
         on_record=IF_GIVEN, is_identity=True, options={"metavar": "FOLDER", "nargs": "+"}),
    Flag("recipe", "published experiment that these flags repeat: tables mark its rows \"authors' "
                   "protocol\" and keep them separate; see docs/recipes.md",
         on_record=IF_GIVEN, is_identity=True, in_sweep=IF_GIVEN, options={"metavar": "NAME"}),
    Flag("resume", "auto continues an unfinished run; never restarts it and appends",
         default="auto", on_record=NEVER, options={"choices": ["auto", "never"]}),
    Flag("wait", "how long to wait for another process that trains in the folder", float, 2,
         on_record=NEVER, options={"metavar": "SECONDS"}),
    Flag("allow_bad_teacher", "accept a teacher that is near chance or has other classes",
         bool, False, IF_GIVEN, in_sweep=IF_GIVEN),
    Flag("diagnostics", "record weight distance, mutual information, calibration and agreement "
                        "with the teacher at each evaluation; see docs/analysis.md",
         bool, False, IF_GIVEN, in_sweep=IF_GIVEN),
    Flag("save_logits", "at each evaluation, save the predictions that model selection uses in "
                        "logits/stepN.npz (float16); see docs/analysis.md",
         bool, False, IF_GIVEN, in_sweep=IF_GIVEN),
    Flag("seal", "write accuracies on test domains to sealed.jsonl only: they are not printed, "
                 "logged or tabulated; `collect_results --unseal` reads them and records that it "
                 "did; see docs/protocol.md", bool, False, IF_GIVEN, in_sweep=IF_GIVEN),
    Flag("log_test_domains", "show accuracies on the test domains in TensorBoard too",
         bool, False, NEVER, in_sweep=IF_GIVEN),
    Flag("wandb", "log to Weights & Biases too, offline unless WANDB_MODE=online",
         bool, False, NEVER, in_sweep=IF_GIVEN),
    Flag("fast", "train in bfloat16, channels last, with augmentation as tensor operations, and "
                 "evaluate only what model selection reads; see docs/speed.md",
         bool, False, IF_GIVEN, is_identity=True, is_setting=True, in_sweep=IF_GIVEN),
    Flag("auto_lr", "choose ERMPlusPlus's learning rates on held-out images, then retrain on all "
                    "images, as DomainBed's train_autolr does; see docs/methods/ermplusplus.md",
         bool, False, IF_GIVEN, is_identity=True, is_setting=True, in_sweep=IF_GIVEN),
    Flag("compile", "with --fast: compile each run's featurizer, which takes a minute or two and "
                    "a C++ compiler", bool, False, IF_GIVEN, is_identity=True, in_sweep=IF_GIVEN),
    Flag("image_cache", "folder for decoded images, shared by all runs, 3 bytes a pixel; results "
                        "do not depend on it; see docs/speed.md",
         on_record=NEVER, in_sweep=IF_GIVEN, options={"metavar": "DIR"}),
    Flag("teacher_cache", "folder for frozen teachers' outputs on images without augmentation, "
                          "shared by all runs; needs the hparam canonical_view; see docs/speed.md",
         on_record=NEVER, in_sweep=IF_GIVEN, options={"metavar": "DIR"}),
    Flag("loader_processes", "processes that read a run's images, at most one per core; default: "
                             "0, but on a GPU one for each thread of the run, up to 8 for each "
                             "training domain; results do not depend on it",
         int, on_record=NEVER, in_sweep=IF_GIVEN, options={"metavar": "N"}),
    Flag("gpu_image_gb", "GPU memory for images, in GB, so that they are read once; each job on a "
                         "GPU may take as much; 0 keeps none there; default: 8; see docs/speed.md",
         float, on_record=NEVER, in_sweep=IF_GIVEN, options={"metavar": "GB"}),
    Flag("format", "also write model.safetensors: tensors by name, and the rest of model.pkl as "
                   "JSON in the file's metadata",
         on_record=IF_GIVEN, in_sweep=IF_GIVEN, options={"choices": ["safetensors"]}),
    Flag("plugin", "module or .py file with your own algorithms, datasets or, for sweeps, "
                   "launchers; may be repeated",
         default=[], on_record=NEVER, in_sweep=IF_GIVEN,
         options={"action": "append", "metavar": "MODULE"}),
    Flag("fork", "folder of a DomainBed fork, with its package domainbed, whose algorithms are "
                 "then available too; our algorithms keep their names",
         _fork, [], NEVER, in_sweep=IF_GIVEN,
         options={"action": "append", "metavar": "FOLDER", "dest": "plugin"}),
)
FLAGS = {flag.name: flag for flag in (*DOMAINBEDS, *OURS)}

#: Args in which the runs in a table's cell must agree to be comparable.
SETTINGS = tuple(flag.name for flag in FLAGS.values() if flag.is_setting)
# Recorded args whose values are neither lists nor objects.
_ONE_VALUE = tuple(flag.name for flag in FLAGS.values()
                   if flag.on_record != NEVER and "nargs" not in flag.options)
#: The most domains that a dataset may have; readers count up to the largest number.
MOST_ENVS = 1000
# A bound on recorded steps and seeds.
_MOST = 2 ** 63


def add_flags(group, flags: Iterable[Flag], for_sweep: bool = False) -> None:
    """Adds flags to a parser or to one of its groups.

    With `for_sweep`, only those that a sweep passes on; flags not given are then None.
    """
    for flag in flags:
        if for_sweep and not flag.in_sweep:
            continue
        default = flag.default
        if for_sweep and flag.in_sweep == IF_GIVEN and "action" not in flag.options:
            default = None
        shown = flag.default is not False and flag.default not in (None, [])
        text = f"{flag.help}; default: {flag.default}" if shown else flag.help
        if flag.type is bool:
            group.add_argument(f"--{flag.name}", action="store_const", const=True,
                               default=default, help=text)
        else:
            group.add_argument(f"--{flag.name}", type=flag.type, default=default, help=text,
                               **flag.options)


def check(args: argparse.Namespace) -> None:
    """Refuses values that no run can use, of the flags that `train` and `sweep` share."""
    if not args.output_dir:
        raise ValueError("--output_dir is empty; it takes a folder.")
    for name in ("steps", "checkpoint_freq", "loader_processes", "gpu_image_gb"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name} is {value}; it takes a number from 0 up.")
    if not 0 < args.holdout_fraction < 1:
        raise ValueError(f"--holdout_fraction is {args.holdout_fraction}; it takes a share "
                         "between 0 and 1, both excluded, as validation needs images too.")
    if not 0 <= (args.uda_holdout_fraction or 0) < 1:
        raise ValueError(f"--uda_holdout_fraction is {args.uda_holdout_fraction}; it takes a "
                         "share from 0 up to, but not including, 1.")
    hparams = {} if args.hparams is None else parse_hparams(args.hparams)
    if args.seal and args.log_test_domains:
        raise ValueError("--seal hides what --log_test_domains shows. Leave one out.")
    if args.seal and args.auto_lr:
        raise ValueError("--seal keeps accuracies by step, and --auto_lr counts steps twice. Leave "
                         "one out.")
    if args.compile and not args.fast:
        raise ValueError("--compile needs --fast, as compiled networks round differently from "
                         "exact mode. Pass both, or neither.")
    if args.teacher_cache is not None and not hparams.get("canonical_view"):
        raise ValueError(
            "--teacher_cache keeps teachers' outputs on images without augmentation, which "
            "changes results. Ask for that too: --hparams '{\"canonical_view\": true}'.")


def check_run(args: argparse.Namespace) -> None:
    """As `check`, and for the flags that only `train` takes."""
    check(args)
    if not 0 <= args.wait < math.inf:
        raise ValueError(f"--wait is {args.wait}; it takes a number of seconds from 0 up.")
    if len(set(args.test_envs)) < len(args.test_envs):
        raise ValueError(f"--test_envs names an environment twice: {args.test_envs}.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed is {args.seed}; it takes a number from 0 to {2**32 - 1}.")


def on_record(args: argparse.Namespace) -> dict:
    """The args that a run's records keep."""
    values = {name: getattr(args, name) for name, flag in FLAGS.items() if flag.on_record != NEVER}
    if args.teacher and len(args.teacher) == 1:
        values["teacher"] = args.teacher[0]
    return {name: value for name, value in values.items()
            if FLAGS[name].on_record == ALWAYS or value}


def of_sweep(args: argparse.Namespace) -> dict:
    """The args that a sweep's flags add to each run's records and folder name."""
    return {name: value for name, flag in FLAGS.items() if flag.in_sweep and flag.on_record != NEVER
            and ((value := getattr(args, name)) is not None or flag.in_sweep == ALWAYS)}


def off_record(args: argparse.Namespace) -> list[str]:
    """The words of a train command for a sweep's flags that are not recorded."""
    return words({name: getattr(args, name) for name, flag in FLAGS.items()
                  if flag.in_sweep and flag.on_record == NEVER and name != "fork"})


def words(args: Mapping) -> list[str]:
    """The words of a command line with these args; None and False are left out."""
    found = []
    for name, value in args.items():
        if isinstance(value, bool):
            found += [f"--{name}"] if value else []
        elif "action" in getattr(FLAGS.get(name), "options", {}):
            several = [value] if isinstance(value, str) else value
            found += [word for each in several for word in _words(name, each)]
        elif isinstance(value, list):
            found += [f"--{name}", *map(str, value)]
        elif value is not None:
            found += _words(name, value)
    return found


def _words(name: str, value) -> list[str]:
    # A word that starts with a dash would be a flag, and one with @, in a sweep, a file.
    return ([f"--{name}={value}"] if str(value).startswith(("-", "@"))
            else [f"--{name}", str(value)])


def are_args(args) -> bool:
    """Whether args from an untrusted file say what a run trains, in valid values."""
    try:
        envs = args["test_envs"]
        if not all(isinstance(i, int) and 0 <= i < MOST_ENVS for i in envs):
            return False
        if not {list, dict}.isdisjoint(map(type, map(args.get, _ONE_VALUE))):
            return False
        numbers = (args["trial_seed"], args["hparams_seed"], args.get("steps") or 0)
        return (isinstance(args["dataset"], str) and isinstance(args["algorithm"], str)
                and all(isinstance(n, int) and abs(n) < _MOST for n in numbers)
                and len(set(envs)) == len(envs) > 0)
    except (AttributeError, TypeError, KeyError):
        return False


def of_words(train: Iterable[str]) -> dict:
    """The args of a train command, given its words after the module's name."""
    return vars(_parser().parse_known_args(list(train))[0])


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add_flags(parser, FLAGS.values())
    return parser


def identity(args: Mapping) -> dict[str, Hashable]:
    """The recorded args that two runs must share to be the same run.

    Folders of data and results are not among them, nor are flags that only save more files. A
    teacher is identified by its folder's name.
    """
    found = {}
    for name, flag in FLAGS.items():
        if flag.is_identity:
            value = args.get(name)
            is_absent = value is None or (value == 0 and flag.default is None)
            found[name] = flag.default if is_absent else value
    if found["teacher"] is not None:
        found["teacher"] = " ".join(Path(folder).name for folder in teachers(args))
    return {name: str(value) if isinstance(value, (list, dict)) else value
            for name, value in found.items()}


def teachers(args: Mapping) -> list[str]:
    """The teachers' folders in a run's recorded args, where a single one is a string."""
    found = args.get("teacher") or []
    return [str(folder) for folder in (found if isinstance(found, list) else [found])]


def label(args: Mapping) -> str:
    """A run's algorithm, dataset, test envs and seeds, in words."""
    args = {name: FLAGS[name].default for name in (
        "algorithm", "dataset", "test_envs", "trial_seed", "hparams_seed")} | dict(args)
    return (f"{args['algorithm']} {args['dataset']} test env "
            f"{' '.join(map(str, args['test_envs']))}, trial {args['trial_seed']}, hparams "
            f"{args['hparams_seed']}")
