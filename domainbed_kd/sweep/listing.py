"""The runs that a sweep's flags ask for, and their teachers, as arguments of `train`.

Seeds and order are DomainBed's (scripts/sweep.py at b93c22a).
"""

import argparse
import json
import random

from domainbed_kd import algorithms, datasets
from domainbed_kd.console import parse_hparams
from domainbed_kd.datasets import counts
from domainbed_kd.folder import composition
from domainbed_kd.folder.args import of_sweep
from domainbed_kd.seeds import seed_hash


def test_env_sets(n_envs: int, single: bool) -> list[list[int]]:
    """The sets of domains to hold out: [0], [0, 1], [0, 2], ..., [1], [1, 2], ...

    The pairs are for leave-one-domain-out model selection; `single` leaves them out.
    """
    return [[i, j] if j > i else [i]
            for i in range(n_envs) for j in range(i, i + 1 if single else n_envs)]


def _env_sets_of(dataset: str, data_dir: str | None, single: bool,
                 together: list[int] | None) -> list[list[int]]:
    n_envs = datasets.num_environments(dataset, data_dir)
    if together is not None:
        datasets.check_test_envs(dataset, n_envs, together)
        return [together]
    if n_envs < 2:
        raise ValueError(f"{dataset} has {n_envs} domain: with it held out, none is left to train "
                         "on. Give it two domains or more.")
    if n_envs < 3 and not single:
        raise ValueError(f"{dataset} has {n_envs} domains: with a pair held out, none is left to "
                         "train on. Pass --single_test_envs, which holds out no pairs.")
    return test_env_sets(n_envs, single)


def make_args_list(n_trials, dataset_names, algorithms, n_hparams_from, n_hparams, data_dir, task,
                   holdout_fraction, single_test_envs, test_envs=None, **more) -> list[dict]:
    """The train arguments of every job of a sweep, in DomainBed's order.

    Arguments are flags of `sweep`; `more` are flags of `train`, of which those that are None are
    left out, so that folders keep the names that DomainBed gives them.
    """
    given = {name: value for name, value in more.items() if value is not None}
    env_sets = {name: _env_sets_of(name, data_dir, single_test_envs, test_envs)
                for name in dataset_names}
    return [
        {"dataset": dataset, "algorithm": algorithm, "test_envs": envs,
         "holdout_fraction": holdout_fraction, "hparams_seed": hparams_seed, "data_dir": data_dir,
         "task": task, "trial_seed": trial_seed,
         "seed": seed_hash(dataset, algorithm, envs, hparams_seed, trial_seed), **given}
        for trial_seed in range(n_trials)
        for dataset in dataset_names
        for algorithm in algorithms
        for envs in env_sets[dataset]
        for hparams_seed in range(n_hparams_from, n_hparams)]


def hparams_of(train_args: dict) -> dict:
    """A job's --hparams, parsed."""
    text = train_args.get("hparams")
    return parse_hparams(text) if text else {}


def teachers_args(train_args: dict) -> list[dict]:
    """The train arguments of the runs that teach a student.

    They are the student's own, with hparams seed 0 and changed as its hparams `teachers` or
    `teacher` say. Without these, a method that learns from a run learns from ERM.
    """
    hparams = hparams_of(train_args)
    if asked := composition.runs(hparams):
        return [_teacher_args(train_args, each, hparams) for each in asked]
    if not algorithms.learns_from_run(train_args["algorithm"]):
        return []
    return [_teacher_args(train_args, composition.Teacher("run", "ERM"))]


def _teacher_args(train_args: dict, teacher: composition.Teacher, hparams: dict | None = None
                  ) -> dict:
    """The train arguments of one teacher.

    `hparams` are those of its student, of which it shares some; with None it has them all.
    """
    algorithms.check_name(teacher.name)
    name = algorithms.canonical_name(teacher.name)
    args = {**train_args, "algorithm": name, "hparams_seed": 0}
    if teacher.swapped:
        n_envs = datasets.num_environments(args["dataset"], args["data_dir"])
        args["test_envs"] = [i for i in range(n_envs) if i not in train_args["test_envs"]]
    args["seed"] = seed_hash(args["dataset"], name, args["test_envs"], 0, args["trial_seed"])
    if teacher.steps is not None:
        args["steps"] = teacher.steps
    if hparams is not None:
        if of_run := teacher.hparams_of_run(hparams):
            args["hparams"] = json.dumps(of_run)
        else:
            del args["hparams"]
    return args


def list_args(args: argparse.Namespace) -> list[dict]:
    """The train arguments of the jobs that a launch asks for, point by point of its grid."""
    found = []
    for point in json.loads(args.grid or "[{}]"):
        shared = of_sweep(args)
        if point:
            hparams = parse_hparams(args.hparams or "{}") | point
            left = {name: value for name, value in hparams.items() if value is not None}
            shared["hparams"] = json.dumps(left) if left else None
        found += make_args_list(
            n_trials=args.n_trials, dataset_names=args.datasets, algorithms=args.algorithms,
            n_hparams_from=args.n_hparams_from, n_hparams=args.n_hparams,
            single_test_envs=args.single_test_envs, test_envs=args.test_envs, **shared)
    for train_args in found:
        _draw(train_args, parse_hparams(args.draws or "{}"))
        if args.epochs:
            count_epochs(train_args, args.epochs)
    return found


def _draw(train_args: dict, draws: dict) -> None:
    """Draws a job's hparams from lists, seeded as the method's own draws are."""
    if not draws or train_args["hparams_seed"] == 0:
        return
    seed = seed_hash(train_args["hparams_seed"], train_args["trial_seed"])
    drawn = {name: random.Random(seed_hash(seed, name)).choice(values)
             for name, values in draws.items()}
    train_args["hparams"] = json.dumps(hparams_of(train_args) | drawn)


def count_epochs(train_args: dict, epochs: float) -> None:
    """Sets how many steps a job makes and how often it evaluates, from a number of epochs."""
    found = counts.sizes(train_args["dataset"], train_args["data_dir"])
    batch_size = hparams_of(train_args).get("batch_size")
    if not found or not batch_size:
        raise ValueError(f"--epochs needs the hparam batch_size and a dataset whose numbers of "
                         f"images are known; {train_args['dataset']} is trained by --steps.")
    sizes = [n for i, n in enumerate(found) if i not in train_args["test_envs"]]
    kept = sum(n - int(n * train_args["holdout_fraction"]) for n in sizes)
    steps = max(1, kept // (batch_size * len(sizes)))  # an incomplete batch is dropped
    train_args["steps"] = max(1, round(epochs * steps))
    train_args.setdefault("checkpoint_freq", steps)
