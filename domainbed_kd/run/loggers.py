"""A run's loggers: TensorBoard always, Weights & Biases with --wandb, with the same curves.

Results on test domains are logged only with --log_test_domains: they must not guide choices.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summary

from domainbed_kd.folder import curves


class TensorBoard:
    """Event files in the run's folder; values from `first_step` on replace earlier ones."""

    def __init__(self, folder: Path, first_step: int):
        self.writer = SummaryWriter(folder, purge_step=first_step)

    def log(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, settings: dict, metrics: dict[str, float]) -> None:
        """Adds a row to the HPARAMS page: settings and the curves' final values."""
        plain = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                 for name, value in settings.items()}
        for summary in hparams_summary(plain, metrics):
            self.writer.file_writer.add_summary(summary)

    def close(self) -> None:
        """Writes pending values."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases in `folder`/wandb: offline unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, args: dict, settings: dict):
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs the library wandb: pip install 'domainbed_kd[wandb]', "
                             "or leave the flag out.") from None
        mode = os.environ.get("WANDB_MODE", "offline")
        same = {k: v for k, v in args.items() if k not in ("data_dir", "output_dir")}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "domainbed_kd"), dir=str(folder), mode=mode,
            # The same run has the same id, so that a restart continues its curves.
            id=hashlib.md5(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16],
            resume="allow" if mode == "online" else None, config=settings,
            name=f"{args['algorithm']} {args['dataset']} {args['test_envs']} "
                 f"{args['trial_seed']} {args['hparams_seed']}",
            settings=wandb.Settings(console="off", silent=True))

    def log(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each curve."""
        self.run.log(values, step=step)

    def finish(self, settings: dict, metrics: dict[str, float]) -> None:
        """Writes the final values to the run's summary, which has the settings already."""
        self.run.summary.update(metrics)

    def close(self) -> None:
        """Writes pending values."""
        self.run.finish()


class Logger:
    """Turns records into curves of all backends, which have `log`, `finish` and `close`.

    `records` are those from before a restart; `test_domains` logs test domains too.
    """

    def __init__(self, backends: list, records: list[dict], test_domains: bool):
        self.backends, self.records, self.test_domains = backends, records, test_domains

    def log(self, record: dict, updates_before: int = 0) -> None:
        """Logs a checkpoint's record; `updates_before` is added to its step."""
        self.records.append(record)
        values = scalars(record, self.test_domains) | self._selected()
        for backend in self.backends:
            backend.log(values, updates_before + record["step"])

    def finish(self) -> None:
        """Logs the final values; call it once, at the end of the run."""
        last = self.records[-1]
        for backend in self.backends:
            backend.finish(settings(last["args"], last["hparams"]), self._selected())

    def _selected(self) -> dict[str, float]:
        """Accuracies of the checkpoint selected so far."""
        chosen = curves.selected(self.records)
        if chosen is None:  # all accuracies are NaN
            return {}
        names = ["validation", "test"] if self.test_domains else ["validation"]
        of = {"validation": curves.validation_accuracy, "test": curves.test_accuracy}
        return {f"selected/{name}": of[name](chosen) for name in names}


def scalars(record: dict, test_domains: bool) -> dict[str, float]:
    """A record's numbers by curve.

    Curves are acc/env0/in, acc/env0/out, ... and acc/validation; train/NAME for each value that
    `update` returned; time/step_s, memory/gb, epoch; diagnostics/NAME. Test domains are left out
    unless `test_domains` is true.
    """
    hidden = () if test_domains else tuple(
        f"{stage}env{i}_" for i in record["args"]["test_envs"] for stage in ("", "fd_"))
    known = {"step_time": "time/step_s", "mem_gb": "memory/gb", "epoch": "epoch"}
    values = {}
    if not math.isnan(validation := curves.validation_accuracy(record)):
        values["acc/validation"] = validation
    for name, value in record.items():
        if name.startswith(("env", "fd_env")) and name.endswith("_acc"):
            if not name.startswith(hidden):
                values["acc/" + name.removesuffix("_acc").replace("_", "/")] = value
        elif isinstance(value, float):
            values[known.get(name, f"train/{name}")] = value
    for name, value in record.get("diagnostics", {}).items():
        if isinstance(value, float) and not name.startswith(hidden):
            values[f"diagnostics/{name}"] = value
    return values


def settings(args: dict, hparams: dict) -> dict:
    """A run's hparams, data, algorithm and seeds."""
    names = ("algorithm", "dataset", "test_envs", "trial_seed", "hparams_seed", "seed", "steps")
    return {name: args[name] for name in names} | hparams


@contextlib.contextmanager
def watching(folder: Path, args: dict, hparams: dict, first_step: int, test_domains: bool = False,
             wandb: bool = False) -> Iterator[Logger]:
    """The run's logger, closed on exit.

    `first_step` is the number of earlier updates; if positive, records are read from the folder.
    """
    before = curves.read_records(folder) if first_step else []
    backends = [WandB(folder, args, settings(args, hparams))] if wandb else []
    backends.append(TensorBoard(folder, first_step))
    try:
        yield Logger(backends, before, test_domains)
    finally:
        for backend in backends:
            backend.close()
