"""ERM++'s learning rates, chosen on held-out images, as DomainBed's train_autolr does.

A run then has two stages. The first divides the learning rate by 10 whenever two evaluations in a
row bring no lower validation loss, and ends the third time. The second retrains on all images,
including those held out, at the rates that the first had at the same steps; its accuracies are
called fd_env0_in_acc. Both visit all images of a domain before repeating one.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from domainbed_kd.run import build, splits
from domainbed_kd.run.build import Run

# The first stage ends at the third division by 10, despite rounding.
_LEAST_SHARE = 0.005
# Stands among the rates for the evaluation at which a stage ends.
_END = 0.0


class Search:
    """The first stage, which finds the rates."""

    is_last = False
    updates_before = 0

    def __init__(self, run: Run):
        self.run = run
        self.rates: list[float] = []
        self.n_updates = 0  # so far
        self._plateau = ReduceLROnPlateau(run.algorithm.optimizer, "min", patience=1)

    def ends(self, step: int) -> bool:
        """Whether the stage ends here; call it after a step, before its evaluation."""
        self.n_updates = step + 1
        if self.run.algorithm.in_warm_up:
            return False
        self._plateau.step(self._validation_loss())
        is_end = self.recorded_lr < _LEAST_SHARE * self.run.hparams["lr"]
        self.rates.append(_END if is_end else self.recorded_lr)
        return is_end

    @property
    def recorded_lr(self) -> float:
        """The rate of the next updates."""
        return self.run.algorithm.optimizer.param_groups[0]["lr"]

    @torch.no_grad()
    def _validation_loss(self) -> torch.Tensor:
        # A domain's batches have equal weight, including a shorter last one, as in DomainBed.
        run, domains = self.run, []
        run.algorithm.eval()
        for loader in run.loaders.validation:
            with run.autocast():
                losses = [F.cross_entropy(run.algorithm.predict(x), y)
                          for x, y in map(run.to_device, loader)]
            domains.append(sum(losses) / len(losses))
        run.algorithm.train()
        return sum(domains) / len(domains)

    def state_dict(self) -> dict:
        """The state on which later rates depend."""
        return {"rates": self.rates, "plateau": self._plateau.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state`."""
        self.rates = state["rates"]
        self._plateau.load_state_dict(state["plateau"])


class Replay:
    """The second stage, which uses the first's rates, one for each evaluation after warm-up."""

    is_last = True

    def __init__(self, run: Run, rates: list[float], updates_before: int):
        self.run, self.rates, self.updates_before = run, rates, updates_before

    def ends(self, step: int) -> bool:
        """Whether the stage ends here; call it after a step, before its evaluation."""
        groups = self.run.algorithm.optimizer.param_groups
        self.recorded_lr = float(groups[0]["lr"])  # of the last updates, as in DomainBed
        if not self.run.algorithm.in_warm_up:
            lr = self.rates.pop(0)
            for group in groups:
                group["lr"] = torch.tensor(lr)  # in float32, as in DomainBed
        return self.rates[:1] == [_END]

    def state_dict(self) -> dict:
        """The remaining rates, and the number of updates in the first stage."""
        return {"rates": self.rates, "updates_before": self.updates_before}

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state`."""
        self.rates = state["rates"]


def staged(run: Run, state: dict | None) -> Run:
    """The run in the stage whose `state_dict` is `state`; in the first stage for None."""
    if state and "updates_before" in state:
        return _second_stage(run, state["rates"], state["updates_before"])
    run.stage = Search(run)
    return run


def next_stage(run: Run) -> Run | None:
    """The run of the next stage; None if there is none."""
    if run.is_last_stage:
        return None
    return _second_stage(run, run.stage.rates, run.stage.n_updates)


def _second_stage(run: Run, rates: list[float], updates_before: int) -> Run:
    # Nothing is seeded here: random streams continue from the first stage, as in DomainBed.
    parts = splits.make_splits(
        run.dataset, run.args["test_envs"], run.args["trial_seed"], run.args["holdout_fraction"],
        run.args["uda_holdout_fraction"], holds_out=False)
    loaders = build.make_loaders(run.dataset, parts, run.args, run.hparams, run.readers)
    algorithm = build.make_algorithm(run.args, run.hparams, run.dataset, run.device)
    second = dataclasses.replace(run, splits=parts, loaders=loaders, algorithm=algorithm)
    second.stage = Replay(second, rates, updates_before)
    return second
