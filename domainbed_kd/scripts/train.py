"""Trains one algorithm on one dataset, holding out the test domains."""

import argparse
import sys
from pathlib import Path

from domainbed_kd.console import Parser, one_line, parse_hparams, run_main
from domainbed_kd.folder import args as flags
from domainbed_kd.folder import claims, composition, output


def build_parser() -> argparse.ArgumentParser:
    """DomainBed's flags, then ours."""
    parser = Parser(prog="python -m domainbed_kd.scripts.train", description=__doc__)
    flags.add_flags(parser, flags.DOMAINBEDS)
    flags.add_flags(parser.add_argument_group("beyond DomainBed"), flags.OURS)
    return parser


def check_names(args: argparse.Namespace) -> None:
    """Loads plug-ins and refuses unknown names; needs torch only for plug-ins."""
    from domainbed_kd import algorithms, datasets, extensions

    extensions.load(args.plugin, [args.algorithm, args.dataset])
    algorithms.check_name(args.algorithm)
    name = algorithms.canonical_name(args.algorithm)
    if args.teacher is not None and name in algorithms.SHIPPED:
        n_runs = sum(each.kind == "run" for each in composition.teachers(
            parse_hparams(args.hparams or "{}"))) or int(algorithms.learns_from_run(name))
        if n_runs == 0:
            taught = ", ".join(filter(algorithms.learns_from_run, algorithms.ALGORITHMS))
            raise ValueError(
                f"--teacher {args.teacher[0]}: {args.algorithm} does not learn from a run. Leave "
                f"the flag out, or choose one of {taught}, or name runs in the hparam teachers.")
        if n_runs != len(args.teacher):
            raise ValueError(f"--teacher names {len(args.teacher)} folders, and {args.algorithm} "
                             f"learns from {n_runs} runs here. Name one folder for each, in their "
                             "order.")
    if args.auto_lr:
        algorithms.check_auto_lr([args.algorithm])
    cls = datasets.get_dataset_class(args.dataset, args.data_dir)
    folders = cls.domain_folders(args.data_dir)
    if names := cls.ENVIRONMENTS or folders:
        datasets.check_test_envs(args.dataset, len(names), args.test_envs)


def run(args: argparse.Namespace) -> int:
    """Trains in a folder that this process holds."""
    check_names(args)
    from domainbed_kd.run import training

    with output.hparams_blamed(args.algorithm, args.hparams):
        return training.train(
            flags.on_record(args), args.resume, args.loader_processes, args.log_test_domains,
            args.wandb, args.image_cache, args.teacher_cache,
            training.GPU_IMAGE_GB if args.gpu_image_gb is None else args.gpu_image_gb)


def main(argv: list[str] | None = None) -> int:
    """Parses, keeps what is printed in out.txt and err.txt, and trains."""
    args = build_parser().parse_args(argv)
    flags.check_run(args)
    folder = Path(args.output_dir)
    if not folder.exists():
        check_names(args)  # a mistyped name must not leave a folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with claims.held(folder, args.wait), output.kept_in(folder):
            return run(args)
    except claims.Busy as error:
        print(one_line(error), file=sys.stderr)
        return claims.BUSY


if __name__ == "__main__":
    run_main(main)
