"""One run, from its args to its last record: DomainBed's training loop, restartable.

Random numbers are drawn in DomainBed's order (seeds, dataset, splits, loaders, algorithm, steps),
so that a run has the same losses for the same seeds.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from domainbed_kd import console
from domainbed_kd.folder import files
from domainbed_kd.folder.claims import STOPPED
from domainbed_kd.run import auto_lr, canonical_view, loggers, pictures, records, state
from domainbed_kd.run.build import GPU_IMAGE_GB, Run, build
from domainbed_kd.run.evaluation import Evaluator


def train(args: dict, resume: str = "auto", loader_processes: int | None = None,
          log_test_domains: bool = False, wandb: bool = False,
          cache_folder: str | None = None, teacher_cache: str | None = None,
          gpu_image_gb: float = GPU_IMAGE_GB) -> int:
    """Trains one algorithm; writes results.jsonl, model.pkl, TensorBoard events and `done`.

    `args` are the recorded flags of scripts/train.py, by name. The other arguments are flags too
    (`cache_folder` is --image_cache): see folder/args.py. With `resume` "never" the run starts
    from scratch and appends to existing records, as in DomainBed.

    Returns:
        0 if the run is finished, `claims.STOPPED` if a signal stopped it (its state is saved).
    """
    began, folder = time.monotonic(), Path(args["output_dir"])
    if resume == "auto" and state.already_finished(folder, args):
        print(f"{folder} holds this run, finished. Delete the folder, choose another --output_dir, "
              "or pass --resume never to train again.", file=sys.stderr)
        return 0

    run = build(args, loader_processes, cache_folder, gpu_image_gb)
    saves = restores = resume == "auto"
    if args.get("auto_lr"):
        run = auto_lr.staged(run, state.of_stage(folder) if restores else None)
    while run is not None:
        if not train_stage(run, began, restores, saves, log_test_domains, wandb, teacher_cache):
            return STOPPED
        began, restores, run = time.monotonic(), False, auto_lr.next_stage(run)
    return 0


def train_stage(run: Run, began: float, restores: bool, saves: bool, log_test_domains: bool,
                wandb: bool, teacher_cache: str | None) -> bool:
    """Trains and evaluates to the end of the run or, with --auto_lr, of its current stage.

    `began` is a time of time.monotonic; `restores` and `saves` are whether to load and to save
    states. The other arguments are those of `train`.

    Returns:
        False if a signal stopped it.
    """
    evaluator, pending = Evaluator(run), records.Pending(run.args["algorithm"])
    first_step = state.restore(run, pending, evaluator.diagnostics) if restores else 0
    updates_before = run.updates_before + first_step
    began -= records.seconds_before(run.folder, updates_before)
    if updates_before == 0:
        evaluator.audit_teacher()
    views = canonical_view.of_run(run, evaluator.in_order, teacher_cache)
    recorder = Recorder(run, evaluator, pending, began)
    with state.stop_signals() as stopped, run.readers, loggers.watching(
            run.folder, run.args, run.hparams, updates_before, log_test_domains, wandb) as logger:
        if not loop(recorder, views, logger, first_step, saves, stopped):
            return False
        if run.is_last_stage:
            logger.finish()
    if run.is_last_stage:
        recorder.finish()
    return True


def loop(recorder: "Recorder", views: canonical_view.CanonicalViews | None,
         logger: loggers.Logger, first_step: int, saves: bool, stopped: Callable[[], bool]) -> bool:
    """DomainBed's loop: updates, evaluations and, with `saves`, saved states; False if stopped."""
    run, evaluator, pending = recorder.run, recorder.evaluator, recorder.pending
    for step in console.bar(
            range(first_step, run.n_steps), initial=first_step, total=run.n_steps, unit="step"):
        last = step == run.n_steps - 1
        pending.add(update(run, views), step)
        run.algorithm.checkpoint(
            step, last, evaluator.validation_loss, evaluator.extra_minibatches)
        evaluator.after_step()
        at_checkpoint = step % run.checkpoint_freq == 0 or last
        if at_checkpoint:
            if run.stage and run.stage.ends(step):
                break
            logger.log(recorder.record(step), run.updates_before)
        if last:
            continue  # not break, so that the bar counts the step
        if saves and (at_checkpoint or stopped()):
            state.save(run, pending, evaluator.diagnostics, step + 1)
        if stopped():
            print(f"Stopped after step {step}. The same command continues.", file=sys.stderr)
            return False
    return True


def update(run: Run, views: canonical_view.CanonicalViews | None) -> dict:
    """One update on the next minibatches; returns its values and `step_time`, in seconds."""
    start = time.time()
    minibatches = run.minibatches([next(loader) for loader in run.loaders.train])
    unlabeled = None
    if run.args["task"] == "domain_adaptation":
        unlabeled = [run.to_device(batch)[0] for batch in map(next, run.loaders.uda)]
    recalled = views.recalled(run.loaders.train) if views else contextlib.nullcontext()
    with run.autocast(), recalled:
        values = run.algorithm.update(minibatches, unlabeled)
    return values | {"step_time": time.time() - start}


class Recorder:
    """Evaluates a run and writes its records, cost and models.

    `began` is a time of time.monotonic, less the seconds of earlier attempts.
    """

    def __init__(self, run: Run, evaluator: Evaluator, pending: records.Pending, began: float):
        self.run, self.evaluator, self.pending, self.began = run, evaluator, pending, began
        self._header = None
        self._steps_per_epoch = min(
            len(split) / run.hparams["batch_size"] for split in run.splits.in_)

    def record(self, step: int) -> dict:
        """Evaluates, prints and writes the record of a step, and returns it."""
        run = self.run
        accuracies = self.evaluator.accuracies(step)
        record = {
            "step": step, "epoch": step / self._steps_per_epoch, **self.pending.means(),
            **accuracies, "mem_gb": records.peak_memory_gb(run.device)}
        if run.stage:
            record["lr"] = run.stage.recorded_lr
        remarks = self.evaluator.remarks()
        if run.args.get("seal"):
            sealed = records.sealed(record, remarks, run.args["test_envs"])
            files.append_record(run.folder, {"step": step, **sealed}, files.SEALED)
        with console.lifted():
            self._header = records.print_record(record, self._header)
            self.pending.tell()
        record |= {**remarks, "hparams": run.hparams, "args": run.args_on_record}
        files.append_record(run.folder, record)
        with run.autocast():  # memory.json records the TF32 settings of the updates
            records.save_cost(run.folder, run.device, time.monotonic() - self.began,
                              run.updates_before + step + 1, self.pending.diverged)
        if run.args["save_model_every_checkpoint"]:
            self._save_model(f"model_step{step}.pkl")
        return record

    def finish(self) -> None:
        """Saves the model, a segmentation run's pictures, and `done`."""
        if self.run.dataset.TASK.per_pixel:
            pictures.save(self.run)
        if not self.run.args["skip_model_save"]:
            self._save_model(files.MODEL)
        files.write_atomically(self.run.folder / files.DONE, lambda path: path.write_text("done"))
        (self.run.folder / files.STATE).unlink(missing_ok=True)

    def _save_model(self, name: str) -> None:
        run = self.run
        records.save_model(
            run.folder / name, run.args_on_record, run.hparams, run.dataset, run.algorithm)
