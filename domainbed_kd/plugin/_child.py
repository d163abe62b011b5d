"""What a trial runs inside a fork: the fork's own scripts, one after another in one process.

`python _child.py FILE` reads {"runs": {label: argv}, "reloads": {label: folder}, "visits":
{label: argv}, "without_gpu": bool} from a JSON file, and writes {label: "" or what went wrong}
beside it. When the fork saves a model, its predictions are saved too; the model, reloaded in
another process, must predict the same. A visit trains a fork's algorithm by our loop, twice: the
second run is stopped and resumed, and must end in the same weights.
"""

import gc
import importlib
import json
import random
import runpy
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

_save = torch.save


class OnTheCPU(TorchFunctionMode):
    """Replaces "cuda" by the CPU, for forks that insist on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Calls the function with the CPU for each CUDA device."""
        def cpu(value):
            is_cuda = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
            return "cpu" if is_cuda else value

        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(cpu, args), **kwargs)


def load_without_workers() -> None:
    """Has loaders read images in this process: for so few, starting workers takes longer."""
    init = torch.utils.data.DataLoader.__init__

    def alone(self, *args, **kwargs):
        for name in ("num_workers", "prefetch_factor", "persistent_workers"):
            kwargs.pop(name, None)
        init(self, *args[:5], **kwargs)

    torch.utils.data.DataLoader.__init__ = alone


def images(shape) -> torch.Tensor:
    """Two fixed images (2, C, H, W)."""
    return torch.linspace(-1, 1, 2 * torch.Size(shape).numel()).view(2, *shape)


@torch.no_grad()
def predictions(algorithm: torch.nn.Module, shape) -> torch.Tensor:
    """Logits (2, classes) in eval mode; the mode is restored."""
    training = algorithm.training
    algorithm.eval()  # on a line of its own, as it returns None in some forks
    logits = algorithm.predict(images(shape))
    algorithm.train(training)
    return logits[""] if isinstance(logits, dict) else logits


def save(content, path, *args, **kwargs) -> None:
    """As torch.save; for an algorithm, also saves what it predicts and how it was built."""
    _save(content, path, *args, **kwargs)
    state = content.get("model_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(path, (str, Path)):
        return
    base = importlib.import_module("domainbed.algorithms").Algorithm
    pointers = {tensor.data_ptr() for tensor in state.values() if hasattr(tensor, "data_ptr")}
    algorithm = max(  # a zero-shot CLIP saves no tensor: only its name identifies it
        (each for each in gc.get_objects() if isinstance(each, base)), key=lambda each: (
            len(pointers & {p.data_ptr() for p in each.parameters()}),
            type(each).__name__ in str(content.get("args"))))
    shape, classes, domains = (
        content.get(f"model_{name}", getattr(algorithm, name, None))
        for name in ("input_shape", "num_classes", "num_domains"))
    _save({"name": type(algorithm).__name__, "arguments": (tuple(shape), classes, domains),
           "logits": predictions(algorithm, shape)}, f"{path}.predictions")


def reload(folder: str) -> None:
    """Builds each model of a folder from its hparams and loads it.

    Raises:
        AssertionError: if one predicts something else than before, or there is none.
    """
    from domainbed_kd.plugin.visitors import Hparams

    found = sorted(Path(folder).rglob("*.predictions"))
    assert found, f"no model was saved in {folder}"
    get = importlib.import_module("domainbed.algorithms").get_algorithm_class
    for path in found:
        before = torch.load(path, weights_only=True)
        saved = torch.load(path.with_suffix(""), weights_only=False, map_location="cpu")
        algorithm = get(before["name"])(*before["arguments"], Hparams(saved["model_hparams"]))
        algorithm.load_state_dict(saved["model_dict"])
        after = predictions(algorithm, before["arguments"][0])
        assert torch.equal(before["logits"].cpu(), after), f"{path} predicts something else"


def run(argv: list[str]) -> None:
    """Runs a script, given by its path or module name, as `python` would."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    sys.argv = list(argv)
    if argv[0].endswith(".py"):
        runpy.run_path(argv[0], run_name="__main__")
        return
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:  # our own scripts always end in one
        if error.code:
            raise


def visit(argv: list[str]) -> None:
    """Trains a fork's algorithm by our `train`, once without and once with an interruption.

    Raises:
        AssertionError: if the two end in different weights.
    """
    from domainbed_kd.plugin import visitors

    update = visitors.Visitor.update

    def stopping(self, *args):
        values = update(self, *args)
        if int(self.update_count) == 2:
            signal.raise_signal(signal.SIGTERM)
        return values

    folder = Path(argv[argv.index("--output_dir") + 1])
    run(argv)
    again = [word.replace(str(folder), f"{folder}_again") for word in argv]
    visitors.Visitor.update = stopping
    try:
        run(again)
    except SystemExit as error:
        assert error.code, "it was not stopped"
    finally:
        visitors.Visitor.update = update
    run(again)
    whole, resumed = (torch.load(path / "model.pkl", weights_only=True)["model_dict"]
                      for path in (folder, Path(f"{folder}_again")))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole
               if isinstance(whole[name], torch.Tensor)), "resumed, it ends in other weights"


def outcome_of(function, argument) -> str:
    """Empty if the call succeeds; else its error and where it was raised."""
    streams = sys.stdout, sys.stderr
    try:
        function(argument)
    except SystemExit as error:
        return f"exit status {error.code}" if error.code else ""
    except Exception as error:
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split())[:160]
        return f"{type(error).__name__}: {words} ({Path(frame.filename).name}:{frame.lineno})"
    finally:
        sys.stdout, sys.stderr = streams
    return ""


def main(path: str) -> None:
    """Does what the file asks for."""
    sys.path[0] = "."
    jobs = json.loads(Path(path).read_text())
    if jobs.get("without_gpu") and not torch.cuda.is_available():
        OnTheCPU().__enter__()
        torch.cuda.is_available = lambda: sys._getframe(1).f_globals["__name__"].startswith(
            ("__main__", "domainbed."))  # only the fork is to believe it
    load_without_workers()
    torch.save = save
    results = {}
    for function, kind in ((run, "runs"), (reload, "reloads"), (visit, "visits")):
        for label, argument in jobs.get(kind, {}).items():
            results[label] = outcome_of(function, argument)
            Path(path).with_suffix(".results").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
