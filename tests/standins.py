"""Small DomainBed forks, one for each dialect, written from a table of their signatures.

Each is a package `domainbed` of its own: algorithms, networks, datasets, hparams_registry and
scripts in that dialect, on random images that a network of a few channels trains on. They have
every trait that made live forks fail under the plug-in (tools/live_forks.py).
"""

from pathlib import Path

NETWORKS = '''
import torch.nn as nn
import torch.nn.functional as F


class MNIST_CNN(nn.Module):
    """Called as DomainBed's, and narrower."""

    def __init__(self, input_shape):
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 8, 3, 1, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, 1, padding=1)
        self.conv4 = nn.Conv2d(16, 16, 3, 1, padding=1)
        self.bn0, self.bn1 = nn.GroupNorm(8, 8), nn.GroupNorm(8, 16)
        self.bn2, self.bn3 = nn.GroupNorm(8, 16), nn.GroupNorm(8, 16)
        {activation}
        self.n_outputs = 16

    def forward(self, x):
        x = self.bn0(F.relu(self.conv1(x)))
        x = self.bn1(F.relu(self.conv2(x)))
        x = self.bn2(F.relu(self.conv3(x)))
        return self.bn3(F.relu(self.conv4(x))).mean(dim=(2, 3))

    def train(self, mode=True):
        """Returns None, as the ResNet of DomainBed does."""
        super().train(mode)


def Featurizer(input_shape, hparams):
    {network_reads}
    return MNIST_CNN(input_shape)


def Classifier(n_in, n_out, is_nonlinear=False):
    return nn.Linear(n_in, n_out)
'''
DATASETS = '''
import torch
from torch.utils.data import TensorDataset

DATASETS = ["DigitsDG"]


class MultipleDomainDataset:
    N_STEPS = 4
    CHECKPOINT_FREQ = 2
    INPUT_SHAPE = (3, 32, 32)

    def __getitem__(self, index):
        return self.datasets[index]

    def __len__(self):
        return len(self.datasets)


class DigitsDG(MultipleDomainDataset):
    ENVIRONMENTS = ["bright", "dark", "torn", "sketched"]

    def __init__(self, root{dataset_arguments}):
        {dataset_writes}
        generator = torch.Generator().manual_seed(0)
        self.datasets = [
            TensorDataset(torch.rand(8, 3, 32, 32, generator=generator), torch.arange(8))
            for _ in self.ENVIRONMENTS]
        self.input_shape, self.num_classes = self.INPUT_SHAPE, 10


class Debug28(DigitsDG):
    def __init__(self, *args):
        super().__init__(*args)
        self.num_classes = 2
        self.datasets = [TensorDataset(images, labels % 2)
                         for images, labels in (env.tensors for env in self.datasets)]


def get_dataset_class(name):
    return globals()[name]
'''
ALGORITHMS = '''
import copy
from collections import OrderedDict, defaultdict  # their update has no signature
import torch
import torch.nn.functional as F
from domainbed import networks

ALGORITHMS = ["ERM", "Own"]


def get_algorithm_class(algorithm_name):
    if algorithm_name not in globals():
        raise NotImplementedError("Algorithm not found: " + algorithm_name)
    return globals()[algorithm_name]


class Algorithm(torch.nn.Module):
    def __init__(self, input_shape, num_classes, num_domains, hparams{more_arguments}):
        super().__init__()
        self.hparams = hparams

    def update(self, {update_arguments}):
        raise NotImplementedError

    def predict(self, x):
        raise NotImplementedError


class ERM(Algorithm):
    def __init__(self, input_shape, num_classes, num_domains, hparams{erm_arguments}):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        {erm_reads}
        self.featurizer = networks.Featurizer(input_shape, hparams)
        self.classifier = networks.Classifier(self.featurizer.n_outputs, num_classes)
        self.network = torch.nn.Sequential(self.featurizer, self.classifier)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr={lr})
        self.seen = 0

    def update(self, {update_arguments}):
        {unpack}
        self.seen += 1
        loss = F.cross_entropy(self.network(all_x), all_y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {{"loss": loss.item()}}

    def predict(self, x):
        return {returned}


class Own(ERM):
    """A method of the fork's own."""

    def update(self, {own_arguments}):
        return super().update({pass_on})
'''
HPARAMS = '''
import hashlib
import numpy as np


def seed_hash(*args):
    return int(hashlib.md5(str(args).encode("utf-8")).hexdigest(), 16) % (2**31)


def _hparams(algorithm, dataset, random_seed):
    hparams = {{}}

    def _hparam(name, default, draw):
        random_state = np.random.RandomState(seed_hash(random_seed, name))
        hparams[name] = (default, draw(random_state))

    _hparam("lr", 1e-3, lambda r: 10**r.uniform(-4.5, -2.5))
    _hparam("batch_size", 4, lambda r: int(2**r.uniform(1, 3)))
    _hparam("weight_decay", 0.0, lambda r: 0.0)
    _hparam("fork_only", True, lambda r: bool(r.choice([True, False])))
    return hparams


def default_hparams(algorithm, dataset):
    return {{a: b for a, (b, c) in _hparams(algorithm, dataset, 0).items()}}


def random_hparams(algorithm, dataset, seed):
    return {{a: c for a, (b, c) in _hparams(algorithm, dataset, seed).items()}}
'''
MISC = '''
import numpy as np
from torch.utils.data import Subset


def split_dataset(dataset, n, seed=0):
    keys = np.random.RandomState(seed).permutation(len(dataset))
    return Subset(dataset, keys[:n]), Subset(dataset, keys[n:])
'''
RUN = '''
import json, os, random
import numpy as np
import torch
from domainbed import algorithms, datasets, hparams_registry
from domainbed.lib import misc


class Config:
    """Hparams as attributes and as items, without being a dict."""

    def __init__(self, values):
        self._values = values

    def __getattr__(self, name):
        if name == "_values" or name not in self._values:
            raise AttributeError(name)
        return self._values[name]

    def __getitem__(self, name):
        return self._values[name]

    def __setitem__(self, name, value):
        self._values[name] = value

    def get(self, name, default=None):
        return self._values.get(name, default)

    def items(self):
        return self._values.items()


def train(args, test_envs, output_dir):
    os.makedirs(output_dir, exist_ok=True)
    if args.hparams_seed:
        hparams = hparams_registry.random_hparams(
            args.algorithm, args.dataset, hparams_registry.seed_hash(args.hparams_seed, 0))
    else:
        hparams = hparams_registry.default_hparams(args.algorithm, args.dataset)
    if os.path.exists("config.yaml"):  # it wins over the registry, as in SWAD
        hparams.update(json.load(open("config.yaml")))
    hparams.update(json.loads(args.hparams or "{{}}"))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    passed = {passed_hparams}
    dataset = {make_dataset}
    {split}
    minibatches = [next(iter(torch.utils.data.DataLoader(env, hparams["batch_size"])))
                   for i, env in enumerate(dataset) if i not in test_envs]
    build = lambda: algorithms.get_algorithm_class(args.algorithm)(
        dataset.input_shape, dataset.num_classes, len(dataset) - len(test_envs), passed
        {constructor_arguments})
    algorithm = build()
    x = dataset[0].tensors[0]
    {around}
    for step in range(args.steps or dataset.N_STEPS):
        minibatches = [(x, y) for x, y in minibatches]
        {call}
        algorithm.eval()
        logits = algorithm.predict(x)
        logits = logits[""] if isinstance(logits, dict) else logits
        accuracy = (logits.argmax(1) == dataset[0].tensors[1]).float().mean().item()
        algorithm.train()
        for key in values:  # SCMD reads each such key as "env{{i}}_..."
            assert "acc" not in key or int(key.split("_")[0][3:]) >= 0
            assert type(values[key]) in (int, float)
        with open(os.path.join(output_dir, "results.jsonl"), "a") as f:
            f.write(json.dumps({{"step": step, "env0_in_acc": accuracy, "args": vars(args),
                                "hparams": hparams, **values}}, sort_keys=True) + "\\n")
    {after}
    torch.save({{"model_dict": algorithm.state_dict(), "model_hparams": hparams,
                "model_input_shape": dataset.input_shape, "model_num_domains": len(minibatches),
                "model_num_classes": dataset.num_classes}},
               os.path.join(output_dir, "model.pkl"))
    again = build()
    again.load_state_dict(torch.load(os.path.join(output_dir, "model.pkl"))["model_dict"])
    for one in (algorithm.eval(), again.eval()):
        one.predictions = one.predict(x)
        if isinstance(one.predictions, dict):
            one.predictions = one.predictions[""]
    assert torch.equal(algorithm.predictions, again.predictions), "a reloaded model differs"
    torch.save(algorithm.predictions, os.path.join(output_dir, "predictions.pt"))
    with open(os.path.join(output_dir, "done"), "w") as f:
        f.write("done")
'''
TRAIN = '''
import argparse
from domainbed.scripts.run import train

parser = argparse.ArgumentParser()
parser.add_argument("--algorithm", default="ERM")
parser.add_argument("--dataset", default="DigitsDG")
parser.add_argument("--hparams")
parser.add_argument("--hparams_seed", type=int, default=0)
parser.add_argument("--steps", type=int)
parser.add_argument("--data_dir")
parser.add_argument("--test_envs", type=int, nargs="+", default=[0])
parser.add_argument("--output_dir", default="train_output")
args = parser.parse_args()
train(args, args.test_envs, args.output_dir)
'''
TRAIN_ALL = '''
import argparse, os
from domainbed.scripts.run import train

parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--algorithm", default="ERM")
parser.add_argument("--dataset", default="DigitsDG")
parser.add_argument("--hparams")
parser.add_argument("--hparams_seed", type=int, default=0)
parser.add_argument("--steps", type=int)
args = parser.parse_args()
for test_env in range(2):
    train(args, [test_env], os.path.join("train_output", args.name, str(test_env)))
'''
SWEEP = '''
import argparse, subprocess

parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["launch"])
parser.add_argument("--algorithms", nargs="+", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--hparams", default="{}")
args = parser.parse_args()
from domainbed import algorithms
for name in args.algorithms:
    algorithms.get_algorithm_class(name)
    subprocess.call(f"python -m domainbed.scripts.train --algorithm {name} --steps 2 "
                    f"--output_dir {args.output_dir}/{name} --hparams '{args.hparams}'", shell=True)
'''

_PLAIN = {
    "network_reads": "", "dataset_arguments": ", test_envs, hparams", "more_arguments": "",
    "erm_arguments": "", "lr": 'self.hparams["lr"]', "returned": "self.network(x)",
    "update_arguments": "minibatches, unlabeled=None",
    "unpack": "all_x, all_y = (torch.cat(part) for part in zip(*minibatches))",
    "own_arguments": "minibatches, unlabeled=None", "pass_on": "minibatches",
    "passed_hparams": "hparams", "around": "", "after": "",
    "split": "splits = [misc.split_dataset(env, 3, i) for i, env in enumerate(dataset)]",
    "activation": "pass", "dataset_writes": "", "erm_reads": "",
    "make_dataset": "datasets.get_dataset_class(args.dataset)(None, test_envs, hparams)",
    "constructor_arguments": "", "call": "values = algorithm.update(minibatches, None)"}
_XY = _PLAIN | {
    "network_reads": "assert hparams.fork_only in (True, False) and hparams.from_config == 3",
    "dataset_arguments": "", "update_arguments": "x, y, **kwargs",
    "unpack": "all_x, all_y = torch.cat(x), torch.cat(y)",
    "own_arguments": "x, y, **kwargs", "pass_on": "x, y",
    "passed_hparams": "Config(hparams)", "split": "pass",
    "make_dataset": "datasets.get_dataset(test_envs, args, passed)",
    "call": ('values = algorithm.update(x=[x for x, _ in minibatches], '
             'y=[y for _, y in minibatches], step=step)'),
    "around": ('from torch.optim.swa_utils import AveragedModel\n'
               '    assert algorithm.new_optimizer(algorithm.network.parameters()) if '
               'hasattr(algorithm, "core") else True'),
    "after": ('if algorithm.__class__.__name__ not in ("ERM", "Own"):\n'
              '        average = AveragedModel(algorithm)\n'
              '        average.update_parameters(algorithm)\n'
              '        clone = algorithm.clone()\n'
              '        assert torch.equal(average.eval()(x), clone.eval().predict(x))\n'
              '        assert torch.equal(average(x), algorithm.eval().get_forward_model()(x))')}
DIALECTS = {
    "DomainBed": _PLAIN | {"activation": "self.activation = nn.Identity()"},
    "older DomainBed": _PLAIN | {
        "update_arguments": "minibatches", "own_arguments": "minibatches",
        "call": "values = algorithm.update(minibatches)"},
    "SCMD": _PLAIN | {
        "dataset_writes": "hparams['domain_names'] = self.ENVIRONMENTS",
        "own_arguments": "minibatches, unlabeled=None, step=None",
        "call": ('values = (algorithm.update(minibatches, None, step) if args.algorithm in '
                 '("Own", "SCMD") else algorithm.update(minibatches, None))')},
    "domainbedv2": _PLAIN | {
        "erm_arguments": ", what_is_trainable=False, path_for_init=None",
        "erm_reads": "assert not what_is_trainable.startswith('frozen_')",
        "constructor_arguments": ", what_is_trainable='0', path_for_init=''",
        "returned": '{"": self.network(x)}'},
    "SWAD": _XY,
    "MIRO": _XY | {"more_arguments": ", **kwargs", "erm_arguments": ", **kwargs"},
}
GET_DATASET = '''
from domainbed.datasets import datasets


def get_dataset(test_envs, args, hparams, algorithm_class=None):
    return vars(datasets)[args.dataset](None)
'''
MIRO = '''

class MIRO(ERM):
    pass
'''


def make_fork(folder: Path, dialect: str) -> Path:
    """Writes the stand-in of a dialect into a folder; returns the folder."""
    words = DIALECTS[dialect]
    package = folder / "domainbed"
    in_packages = dialect in ("SWAD", "MIRO")
    files = {
        "__init__.py": "", "scripts/__init__.py": "", "lib/__init__.py": "", "lib/misc.py": MISC,
        "networks.py": NETWORKS, "hparams_registry.py": HPARAMS, "scripts/run.py": RUN,
        "algorithms.py": ALGORITHMS + (MIRO if dialect == "MIRO" else ""),
        "datasets.py": DATASETS}
    if in_packages:
        files["algorithms/__init__.py"] = "from .algorithms import *\n"
        files["algorithms/algorithms.py"] = files.pop("algorithms.py")
        files["datasets/__init__.py"] = GET_DATASET
        files["datasets/datasets.py"] = files.pop("datasets.py")
        files["../config.yaml"] = '{"from_config": 3, "swad": true}\n'
    for name, text in files.items():
        if "{" in text and name.endswith(".py"):
            text = text.format(**words)
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    if in_packages:
        (folder / "train_all.py").write_text(TRAIN_ALL, encoding="utf-8")
    (package / "scripts" / "train.py").write_text(TRAIN, encoding="utf-8")
    (package / "scripts" / "sweep.py").write_text(SWEEP, encoding="utf-8")
    return folder
