"""The flags of a sweep, and the launches that they, or the folder alone, stand for."""

import argparse
import glob
import itertools
import json
import math
import os
import shlex
from collections.abc import Mapping

from domainbed_kd import algorithms, console, datasets
from domainbed_kd.folder import args as runs
from domainbed_kd.folder import files, manifest
from domainbed_kd.folder.foreign import parse_json
from domainbed_kd.sweep import clusters

# DomainBed's default: all but its debug datasets.
DEFAULT_DATASETS = [name for name in datasets.DOMAINBED if datasets.facts(name).NEEDS_FILES]
# The most runs that a sweep may list. All datasets of DomainBed's and all algorithms make 361,200.
_MOST_RUNS = 10**6
# Flags that say which runs a sweep has, besides those of each run.
_OWN = ("datasets", "algorithms", "n_trials", "n_hparams_from", "n_hparams", "single_test_envs",
        "test_envs", "grid", "draws", "epochs")
_SHARED = tuple(flag.name for flag in runs.FLAGS.values()
                if flag.in_sweep and flag.name != "fork")
# Flags that define a sweep. The others say how it is run and what else is kept.
_DEFINING = {*_OWN, *(name for name in _SHARED if runs.FLAGS[name].is_identity)}
# Further flags in sweep.json; and flags whose values are paths from the working directory.
_LAUNCHER = ("command_launcher", "jobs_per_device", "threads_per_job", "retry")
_PATHS = ("data_dir", "image_cache", "teacher_cache", "slurm_logs")
_ABSENT = object()


class SweepParser(console.Parser):
    """Reads the lines of an @FILE as a shell would."""

    #: Where the flags come from, if not from the command line; errors begin with it.
    source = ""

    def error(self, message: str):
        """Prints the message and exits with 2."""
        super().error(self.source + message)

    def _read_args_from_files(self, arg_strings):
        for word in arg_strings:
            if word.startswith("@") and not os.path.isfile(word[1:]):
                there = glob.glob(os.path.join(glob.escape(os.path.dirname(word[1:])), "*.args"))
                self.error(f"{word}: No such file. After the @ comes the path of a file of flags."
                           f"{console.did_you_mean(word, [f'@{path}' for path in there])}")
        return super()._read_args_from_files(arg_strings)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The words of a line."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            self.error(f"{error} in a line of the @FILE: {arg_line}")


def build_parser(description: str = "", epilog: str = "") -> SweepParser:
    """DomainBed's flags, then ours."""
    parser = SweepParser(
        prog="python -m domainbed_kd.scripts.sweep", description=description, epilog=epilog,
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["launch", "delete_incomplete", "status", "plan"],
        help="run or continue what is not done; delete the folders of jobs that are neither done "
             "nor running; count jobs by state; estimate what the sweep will cost")
    add("dir", nargs="?", metavar="DIR",
        help="folder of the sweep, right after the command. A sweep that was launched there needs "
             "nothing else; flags that say which runs it has replace those that it was launched "
             "with")
    add("--output_dir", metavar="DIR", help="the same, as in DomainBed")
    add("--datasets", nargs="+", default=DEFAULT_DATASETS, metavar="NAME",
        help="default: all of DomainBed's but the Debug ones")
    add("--algorithms", nargs="+", default=list(algorithms.ALGORITHMS), metavar="NAME",
        help="default: all that ship")
    add("--n_hparams_from", type=int, default=0, metavar="SEED",
        help="first hparams seed, 0 being the defaults; default: 0")
    add("--n_hparams", type=int, default=20, metavar="SEED",
        help="hparams seed after the last; default: 20")
    add("--n_trials", type=int, default=3, metavar="N",
        help="trials, each with its own splits and random hparams; default: 3")
    add("--single_test_envs", action="store_true",
        help="hold out single domains only; leave-one-out model selection needs the pairs too")
    add("--test_envs", type=int, nargs="+", metavar="N",
        help="hold out these domains together in every run: one, or three or more. Tables have a "
             "column for each; runs are selected by the domains that they train on")
    add("--grid", metavar="FILE",
        help="JSON, or a file of it: lists of values, such as {\"lr\": [0.1, 0.01], ...}, for all "
             "combinations of these hparams, or a list of objects. Every run is made with each of "
             "them, merged over --hparams; null leaves an hparam out")
    add("--draws", metavar="JSON",
        help="lists of values, such as {\"lr\": [3e-5, 5e-5]}, from which every hparams seed but 0 "
             "draws these hparams, instead of the method's own range")
    add("--epochs", type=float, metavar="N",
        help="length of a run in passes over its training images, computed from the dataset's "
             "published numbers of images and the hparam batch_size; a run evaluates after each")
    add("--command_launcher", default="local", metavar="NAME", help="default: local")
    add("--seed", type=int, default=0, help="has no effect, as in DomainBed")
    add("--skip_confirmation", action="store_true", help="ask nothing")
    runs.add_flags(parser.add_argument_group("of each run, as `train` takes them"),
                   runs.FLAGS.values(), for_sweep=True)
    add = parser.add_argument_group("beyond DomainBed").add_argument
    add("--retry", type=int, default=0, metavar="N",
        help="launch: start jobs that fail again, up to N times; default: 0")
    add("--watch", type=float, nargs="?", const=5.0, metavar="SECONDS",
        help="status: repeat it after so many seconds, by default 5, until all jobs are done")
    add("--hours_per_run", type=float, metavar="HOURS",
        help="plan: how long a run takes, where no run in the folder has measured it")
    add("--measure", action="store_true",
        help="plan: time 20 updates and an evaluation on this machine, of each algorithm and "
             "dataset that no run in the folder has measured, and how several jobs slow each other "
             "down")
    add("--budget", type=float, metavar="HOURS",
        help="plan: print the most trials and seeds of hparams that the launcher can finish in "
             "this time")
    add("--jobs_per_device", type=int, metavar="N",
        help="jobs at a time, on each GPU if there are several; default: 1")
    add("--threads_per_job", type=int, metavar="N",
        help="CPU threads of a job; default: the cores shared out evenly")
    clusters.add_flags(parser)
    return parser


def parse(parser: SweepParser, argv: list[str] | None
          ) -> tuple[argparse.Namespace, list[argparse.Namespace]]:
    """The flags, with the folder as `output_dir`, and the launches that make up the sweep.

    If the flags say which runs the sweep has, that is one launch. Otherwise they are the launches
    in its sweep.json, with the given flags in place of theirs; the last one says how it is run.
    """
    given = _given(parser, argv)
    folder = given.pop("dir", None)
    if folder is None and "output_dir" not in given:
        parser.error("the following arguments are required: DIR or --output_dir.")
    if folder is not None and given.setdefault("output_dir", folder) != folder:
        raise ValueError(f"Two folders are given: {folder} and --output_dir "
                         f"{given['output_dir']}. Leave one out.")
    defaults = {action.dest: action.default for action in parser._actions}
    known = []
    if given.keys().isdisjoint(_DEFINING):
        known = _of_manifest(parser, given["output_dir"])
        if not trains(argparse.Namespace(**defaults | given)):
            known = [each | {"plugin": []} for each in known]
        if folder is not None and not known:
            raise ValueError(
                (f"{folder} has no {manifest.NAME}, as it was not launched, or by DomainBed or "
                 "an older version" if os.path.isdir(folder) else
                 f"{folder}: there is no such folder")
                + ". Give the flags that say which runs the sweep has, such as --datasets and "
                "--algorithms.")
    elif folder is not None and given.keys().isdisjoint(("datasets", "algorithms")):
        asked = next(name for name in given if name in _DEFINING)
        raise ValueError(f"{folder} says which runs its sweep has, and --{asked} asks for others. "
                         "Leave it out, or pass --datasets and --algorithms too.")
    launches = [argparse.Namespace(**defaults | each | given) for each in known or [{}]]
    for launch in launches:
        check(launch)
    return launches[-1], launches


def trains(args: argparse.Namespace) -> bool:
    """Whether the command trains: only then are plug-ins run that sweep.json alone names.

    Anybody may have made the folder, so other commands run only those of --plugin and --fork.
    """
    return args.command == "launch" or (args.command == "plan" and args.measure)


def _given(parser: SweepParser, argv: list[str] | None) -> dict:
    """The values on a command line, without defaults."""
    # argparse sets no default where there is a value already, and appends to none.
    absent = {action.dest: _ABSENT for action in parser._actions} | {"plugin": None}
    found = parser.parse_args(argv, argparse.Namespace(**absent))
    return {name: value for name, value in vars(found).items()
            if value is not _ABSENT and not (name in ("plugin", "dir") and value is None)}


def _of_manifest(parser: SweepParser, folder: str) -> list[dict]:
    """The flags of the launches in a folder's sweep.json; of equal lists of runs, the last."""
    found = {}
    for entry in manifest.launches(folder):
        parser.source = f"{os.path.join(folder, manifest.NAME)}: "
        flags = _given(parser, ["launch", *entry["flags"]])
        parser.source = ""
        if os.path.abspath(entry["cwd"]) != os.getcwd():
            flags |= {name: os.path.join(entry["cwd"], flags[name])
                      for name in _PATHS if flags.get(name)}
        flags["of_plugins"] = entry.get("of_plugins", {})
        key = repr([flags.get(name) for name in (*_OWN, *_SHARED)])
        found.pop(key, None)  # the place and the launcher of the last one count
        found[key] = flags
    return list(found.values())


def for_manifest(args: argparse.Namespace) -> list[str]:
    """The words of a launch's flags, for sweep.json."""
    def whole(plugin):
        is_path = plugin.endswith(".py") or os.path.isdir(os.path.join(plugin, "domainbed"))
        return os.path.abspath(plugin) if is_path else plugin

    names = [*_OWN, *_SHARED, *_LAUNCHER, *(
        name for name in vars(args) if name.startswith(("slurm_", "ray_")))]
    return runs.words({name: getattr(args, name) for name in names}
                      | {"plugin": [whole(plugin) for plugin in args.plugin]})


def of_plugins(args: argparse.Namespace) -> dict[str, dict]:
    """What sweep.json keeps of methods and datasets of plug-ins; see `stand_in`."""
    own = {name: datasets.get_dataset_class(name) for name in args.datasets}
    return {
        "algorithms": {name: {"learns_from_run": algorithms.learns_from_run(name)}
                       for name in args.algorithms if name not in algorithms.SHIPPED},
        "datasets": {name: {"N_STEPS": cls.N_STEPS, "CHECKPOINT_FREQ": cls.CHECKPOINT_FREQ,
                            "n_envs": datasets.num_environments(name, args.data_dir)}
                     for name, cls in own.items()
                     if not cls.__module__.startswith("domainbed_kd.")}}


def stand_in(found: Mapping[str, Mapping[str, Mapping]]) -> None:
    """Registers stand-ins, made of what sweep.json keeps, for names not defined here."""
    for name, facts in found.get("algorithms", {}).items():
        if name not in algorithms.ALGORITHMS:
            algorithms.register(type(name, (), {
                "display_name": None, "taught_by_target": {}, **facts}))
    for name, facts in found.get("datasets", {}).items():
        if name not in datasets.DATASETS:
            labels = [str(i) for i in range(facts["n_envs"])]
            datasets.register(type(name, (datasets.MultipleDomainDataset,),
                                   {"ENVIRONMENTS": labels, **facts}))


def check(args: argparse.Namespace) -> None:
    """Refuses values that no sweep can use."""
    runs.check(args)
    _check_numbers(args)
    if args.task == "domain_adaptation" and not args.uda_holdout_fraction:
        raise ValueError("--task domain_adaptation needs unlabeled images of the test domains. "
                         "Pass --uda_holdout_fraction, for example 0.5.")
    if args.test_envs:
        _check_test_envs(args)
    args.grid = args.grid and grid_text(args.grid)
    if args.draws and not all(isinstance(values, list) and values
                              for values in runs.parse_hparams(args.draws).values()):
        raise ValueError(f"--draws takes an object whose values are lists; found {args.draws}")
    clusters.parse_extra(args.slurm_extra)
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise NotADirectoryError(f"--output_dir {args.output_dir} is a file; it takes a folder.")


def _check_numbers(args: argparse.Namespace) -> None:
    lowest = {"n_trials": 1, "n_hparams_from": 0, "jobs_per_device": 1, "threads_per_job": 1,
              "retry": 0, "slurm_gpus": 0, "slurm_cpus": 1, "slurm_time": 1, "slurm_parallel": 1,
              "ray_gpus": 0, "ray_cpus": 0}
    for name, low in lowest.items():
        if (value := getattr(args, name)) is not None and not low <= value < math.inf:
            raise ValueError(f"--{name} is {value}; it takes a number from {low} up.")
    for name, unit in (("hours_per_run", "hours"), ("budget", "hours"), ("watch", "seconds")):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; it takes a number of {unit} above 0.")
    if args.n_hparams <= args.n_hparams_from:
        raise ValueError(
            f"--n_hparams is {args.n_hparams} and --n_hparams_from {args.n_hparams_from}: no seed "
            "is left. --n_hparams is the hparams seed after the last, not a count.")
    if (n := args.n_trials * (args.n_hparams - args.n_hparams_from)) > _MOST_RUNS:
        raise ValueError(f"--n_trials {args.n_trials} and --n_hparams {args.n_hparams} make {n} "
                         f"runs of each algorithm; a sweep takes at most {_MOST_RUNS}.")
    if args.epochs is not None and (args.steps or not 0 < args.epochs < math.inf):
        raise ValueError(f"--epochs is {args.epochs}; it takes a number above 0, without --steps.")


def _check_test_envs(args: argparse.Namespace) -> None:
    envs, asked = args.test_envs, f"--test_envs {' '.join(map(str, args.test_envs))}"
    if len(set(envs)) < len(envs):
        raise ValueError(f"{asked} names an environment twice.")
    if len(envs) == 2:
        raise ValueError(f"{asked}: runs that hold out two domains are for leave-one-out model "
                         "selection, and have no columns. Name one, or three or more.")
    if args.single_test_envs:
        raise ValueError(f"{asked} and --single_test_envs ask for different runs. Leave one out.")


def grid_text(grid: str) -> str:
    """A grid as a JSON list of objects; it is given as JSON or as the path of a file of it."""
    if not grid.lstrip().startswith(("{", "[")):
        if not os.path.isfile(grid):
            raise FileNotFoundError(f"--grid {grid}: there is no such file, and it is not JSON.")
        grid = files.read_bytes(grid).decode(errors="replace")
    try:
        found = parse_json(grid)
    except ValueError as error:
        raise ValueError(f"--grid is not JSON ({error}): {grid[:200]}") from None
    if isinstance(found, dict):
        if not all(isinstance(values, list) for values in found.values()):
            raise ValueError("--grid takes an object whose values are lists, or a list of objects.")
        found = [dict(zip(found, point)) for point in itertools.product(*found.values())]
    if not isinstance(found, list) or not found or not all(
            isinstance(point, dict) for point in found):
        raise ValueError(f"--grid lists no combination of hparams: {grid[:200]}")
    return json.dumps(found)


def resolve_names(args: argparse.Namespace) -> None:
    """Replaces names by those that are registered, each once; plug-ins must be loaded."""
    args.algorithms = list(dict.fromkeys(
        name if name in algorithms.ALGORITHMS else algorithms.get_algorithm_class(name).__name__
        for name in args.algorithms))
    args.datasets = list(dict.fromkeys(
        datasets.get_dataset_class(name, args.data_dir).__name__ for name in args.datasets))
