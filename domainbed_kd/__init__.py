"""Knowledge distillation for domain generalization, in DomainBed's Algorithm interface.

`import domainbed_kd as dk` is quick: what `__all__` names is imported when it is first used.
"""

__version__ = "0.1.0"

__all__ = ["algorithms", "datasets", "hparams_registry", "losses", "model_selection", "networks",
           "results", "teachers", "train"]

TYPE_CHECKING = False  # true for type checkers, without importing typing
if TYPE_CHECKING:
    import os

    import pandas

    from domainbed_kd import (
        algorithms,
        datasets,
        hparams_registry,
        losses,
        model_selection,
        networks,
        results,
        teachers,
    )


def train(output_dir: "str | os.PathLike[str]", **flags: object) -> "pandas.DataFrame":
    """Trains one run, as `domainbed-kd train` does, and returns its records.

    An interrupted run continues where it was; a finished one is only read.

    Args:
        output_dir: the run's folder.
        flags: those of `domainbed-kd train --help` by name, such as algorithm="KD",
            test_envs=[3], hparams={"lr": 0.001}, diagnostics=True.

    Raises:
        SystemExit: if a flag is unknown, or does not take its value.
        ValueError, OSError, NotImplementedError: if the run fails.
    """
    import json
    import os

    from domainbed_kd import results
    from domainbed_kd.folder import args
    from domainbed_kd.scripts import train as script

    plain = {name: json.dumps(value) if isinstance(value, dict)
             else list(value) if isinstance(value, tuple) else value
             for name, value in flags.items() if value is not None}
    script.main(args.words({"output_dir": os.fspath(output_dir)} | plain))
    return results.to_frame(os.fspath(output_dir))


def __getattr__(name: str) -> object:
    if name in __all__:
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
