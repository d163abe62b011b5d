"""Tries a fork out: its own scripts with our methods, and its methods here, on few images.

All runs happen in a copy of the checkout, which itself does not change. They take two or four steps
of two images, with a ResNet-18 of random weights, as only the bridge is tried. Where a fork insists
on a GPU and there is none, "cuda" means the CPU.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from domainbed_kd.plugin import guests
from domainbed_kd.seeds import forked_rng

OWN_SCRIPT = "domainbed.scripts.train"
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
#: Hparams of our methods with which two steps are enough and nothing is downloaded.
SMALL = {"resnet18": True, "resnet50_augmix": False, "batch_size": 2, "clip_backbone": "tiny",
         "mosaic_kd_steps": 1, "mosaic_width": 4, "mosaic_batch": 2}
AVERAGED = {"averaging": "sma", "sma_start": 1, "teacher_steps": 0}
#: Seconds after which a fork's process is stopped.
PATIENCE = 1800


class Trial:
    """One fork's trial, in a folder of its own.

    Attributes:
        results: {(kind, name): "" or what went wrong}, in the order in which it was tried.
        kept: names of our methods that the fork uses for its own; these are not tried.
        takes_xy: whether the fork is like SWAD's.
    """

    def __init__(self, fork: Path, folder: Path, data: Path | None = None):
        """Copies the checkout.

        Args:
            fork: the folder that holds the package domainbed.
            folder: where to work; made here.
            data: a folder that holds PACS, of which two images per class and domain are used;
                random images if None.
        """
        self.copy = folder / "fork"
        shutil.copytree(fork, self.copy, ignore=shutil.ignore_patterns(".git"), symlinks=True)
        self.sources = self._digest()
        self.takes_xy = (self.copy / "train_all.py").exists()
        self.folder = folder
        self.results: dict[tuple[str, str], str] = {}
        self.kept: list[str] = []
        write_images(folder / "data" / "PACS", data)
        write_weights(folder / "torch" / "hub" / "checkpoints")

    def _digest(self) -> dict[str, str]:
        return {str(path): hashlib.md5(path.read_bytes()).hexdigest()
                for path in sorted(self.copy.rglob("*"))
                if path.suffix in (".py", ".yaml", ".json", ".sh", ".md") and path.is_file()}

    def python(self, *words: str, plugged: bool = True) -> subprocess.CompletedProcess:
        """Runs this Python in the copy, under the plug-in or alone."""
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), root) if p)
        start = [sys.executable, *(["-m", "domainbed_kd.plugin", "--", sys.executable]
                                   if plugged else [])]
        environment = os.environ | {
            "PYTHONPATH": path, "TORCH_HOME": str(self.folder / "torch"), "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MKL_NUM_THREADS": "1", "DOMAINBED_KD_THREADS": "1"}
        try:
            process = subprocess.run(  # "y", as a fork's sweep asks for confirmation
                [*start, *words], cwd=self.copy, capture_output=True, text=True, input="y\n",
                env=environment, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process = subprocess.CompletedProcess(words, 124, "", f"not done in {PATIENCE} s")
        with (self.folder / "log").open("a") as log:
            log.write(f"$ {' '.join(words)}\n{process.stdout}{process.stderr}\n")
        return process

    def _child(self, kind: str, plugged: bool = True, **jobs) -> None:
        """Runs jobs in one process and keeps the outcome of each."""
        file = self.folder / f"{kind}.json"
        file.write_text(json.dumps({**jobs, "without_gpu": self.takes_xy}))
        process = self.python(str(Path(__file__).parent / "_child.py"), str(file), plugged=plugged)
        done = file.with_suffix(".results")
        outcomes = json.loads(done.read_text()) if done.exists() else {}
        error = (process.stderr.strip().splitlines() or ["it was killed"])[-1][:200]
        for labels in jobs.values():
            for label in labels:
                self.results[kind, label] = outcomes.get(label, error)

    def command(self, algorithm: str, dataset: str, output: str, **hparams) -> list[str]:
        """The fork's own command for a short run."""
        values = {**SMALL, **hparams}
        shared = ["--algorithm", algorithm, "--dataset", dataset,
                  "--data_dir", str(self.folder / "data"), "--steps", "2"]
        if not self.takes_xy:
            return [OWN_SCRIPT, *shared, "--hparams", json.dumps(values), "--output_dir", output]
        # Hparams that its registry lacks are taken from a file only.
        more = self.folder / f"{Path(output).name}.yaml"
        more.write_text(json.dumps(values))
        return ["train_all.py", Path(output).name, "config.yaml", str(more), *shared,
                "--checkpoint_freq", "2", "--model_save", "1"]

    def doctor(self) -> str:
        """What the doctor prints; notes which of the fork's own methods are kept."""
        process = self.python("-m", "domainbed_kd.plugin", "doctor", plugged=False)
        self.results["doctor", "doctor"] = "" if process.returncode == 0 else (
            process.stdout.strip().splitlines() or ["it printed nothing"])[-1]
        self.kept = re.findall(r"Method:   (\w+): the fork's own is kept", process.stdout)
        return process.stdout

    def train(self, dataset: str, names: list[str]) -> None:
        """Trains ERM, methods of ours, and one of them averaged, by the fork's own script."""
        runs = {name: self.command(name, dataset, f"trial/{dataset}_{name}") for name in names
                if name not in self.kept}
        if "RISE" in names:
            runs["RISE + sma"] = self.command("RISE", dataset, f"trial/{dataset}_sma", **AVERAGED)
            if not self.takes_xy:
                runs["RISE + swad"] = self.command(
                    "RISE", dataset, f"trial/{dataset}_swad", averaging="swad", swad_interval=1)
        self._child(dataset, runs=runs)

    def reload(self, dataset: str) -> None:
        """Rebuilds the trained models in a new process, and compares their predictions."""
        names = [name for kind, name in self.results
                 if kind == dataset and not self.results[kind, name] and "+" not in name]
        folders = {path.parent for path in self.copy.rglob("*.predictions")}
        self._child(f"reload {dataset}", reloads={name: str(min(
            (folder for folder in folders
             if any(part.endswith(f"{dataset}_{name}") for part in folder.parts)),
            default=f"trial/{dataset}_{name}")) for name in names})

    def compare_erm(self, dataset: str) -> None:
        """Whether ERM ends in the same weights with and without the plug-in."""
        label = "without us"
        self._child("ERM", plugged=False, runs={
            label: self.command("ERM", dataset, f"trial/{dataset}_bare")})
        if not self.results["ERM", label]:
            pairs = [sorted(path for path in self.copy.rglob("*.predictions")
                            if f"{dataset}_{name}/" in f"{path}/") for name in ("ERM", "bare")]
            same = bool(pairs[0]) and len(pairs[0]) == len(pairs[1]) and all(
                _same_weights(a.with_suffix(""), b.with_suffix("")) for a, b in zip(*pairs))
            self.results["ERM", label] = "" if same else "other weights than under the plug-in"

    def unchanged(self) -> None:
        """Whether every source file of the copy is as it was."""
        now = self._digest()
        changed = [path for path, digest in self.sources.items() if now.get(path) != digest]
        self.results["sources", "unchanged"] = ", ".join(changed)


def _same_weights(*paths: Path) -> bool:
    import torch

    one, other = (torch.load(path, weights_only=False, map_location="cpu")["model_dict"]
                  for path in paths)
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor)
        else value == other[name] for name, value in one.items())


def write_images(folder: Path, data: Path | None) -> None:
    """PACS with two images per class and domain: of `data`, or random ones."""
    import numpy as np
    from PIL import Image

    random = np.random.RandomState(0)
    for domain in DOMAINS:
        for name in CLASSES:
            here = folder / domain / name
            here.mkdir(parents=True)
            if data is not None:
                for path in sorted((data / "PACS" / domain / name).glob("*.*"))[:2]:
                    (here / path.name).symlink_to(path.resolve())
                continue
            for i in range(2):
                pixels = random.randint(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(here / f"{i}.jpg")


def write_weights(folder: Path) -> None:
    """Random weights under the names of torchvision's files, so that nothing is downloaded."""
    import torch
    from torchvision import models

    folder.mkdir(parents=True)
    for build, files in ((models.resnet18, ("resnet18-f37072fd.pth", "resnet18-5c106cde.pth")),
                         (models.resnet50, ("resnet50-0676ba61.pth", "resnet50-19c8e357.pth",
                                            "resnet50-11ad3fa6.pth"))):
        with forked_rng():
            torch.manual_seed(0)
            state = build().state_dict()
        for file in files:
            torch.save(state, folder / file)


METHODS = ["4Ds" if name == "FourDs" else name for name in guests.METHODS]
