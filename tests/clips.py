"""A CLIP of a few hundred weights, and what tests of methods with teachers build from it."""

import copy

import torch
from conftest import seed_everything
from torch import nn

from domainbed_kd import hparams_registry, networks
from domainbed_kd.algorithms import get_algorithm_class

NAMES = ["cat", "horse", "guitar"]
SMALL = {"wrn_depth": 10, "wrn_widen": 1, "resnet18": True, "resnet50_augmix": False,
         "weights": "none"}


class StubCLIP(nn.Module):
    """What hparams["clip_model"] takes. It keeps BatchNorm, which would move in train mode."""

    image_size = 12
    image_mean = (0.5, 0.4, 0.3)
    image_std = (0.2, 0.3, 0.4)

    def __init__(self, width=16, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.visual = nn.Sequential(
                nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, width))
            self.letters = nn.Embedding(128, width)
            self.places = nn.Embedding(100, width)
        self.logit_scale = nn.Parameter(torch.tensor(100.0).log())
        self.texts, self.n_text_calls, self.n_image_calls = [], 0, 0

    def tokenizer(self, texts):
        self.texts += texts
        return torch.tensor([[ord(c) for c in text.ljust(100)] for text in texts])

    def encode_text(self, tokens):
        self.n_text_calls += 1
        return (self.letters(tokens) * self.places.weight).mean(dim=1)

    def encode_image(self, x):
        self.n_image_calls += 1
        assert x.shape[1:] == (3, self.image_size, self.image_size)
        return self.visual(x)


class Teacher(nn.Module):
    """A network x -> logits with BatchNorm and dropout, both of which must stay in eval mode."""

    def __init__(self, channels=3, n_classes=3, seed=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
                nn.Dropout(0.3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, n_classes))
        self.n_calls = 0

    def forward(self, x):
        self.n_calls += 1
        return 3 * self.layers(x)


def staged_teacher(shape=(3, 32, 32), n_classes=3, seed=1, **changes):
    """A featurizer and a classifier whose BatchNorm has seen images."""
    torch.manual_seed(seed)
    hparams = hparams_registry.default_hparams("ERM", "Debug28") | SMALL | changes
    featurizer = networks.Featurizer(shape, hparams)
    net = nn.Sequential(featurizer, nn.Linear(featurizer.n_outputs, n_classes))
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(8, *shape))
    return net.eval()


def make(name, shape=(3, 28, 28), n_classes=3, seed=0, **changes):
    """An algorithm with default hparams but for `changes`, on a small student."""
    teacher = staged_teacher(shape, n_classes) if name == "FourDs" else Teacher(shape[0], n_classes)
    hparams = hparams_registry.default_hparams(name, "Debug28") | SMALL | {
        "class_names": NAMES[:n_classes], "total_steps": 10, "normalization": None,
        "teacher": teacher, "clip_model": StubCLIP()} | changes
    seed_everything(seed)
    return get_algorithm_class(name)(shape, n_classes, 3, hparams)


def minibatches(n_steps=1, shape=(3, 28, 28), size=4, n_classes=3, seed=5):
    """`n_steps` lists of three domains' (x, y)."""
    generator = torch.Generator().manual_seed(seed)
    return [[(torch.rand(size, *shape, generator=generator),
              torch.randint(n_classes, (size,), generator=generator)) for _ in range(3)]
            for _ in range(n_steps)]


def run(algorithm, batches):
    """Trains on batches; returns what each update logged, as floats."""
    return [{name: float(value) for name, value in algorithm.update(batch).items()}
            for batch in batches]


def bits(module):
    """A copy of a module's whole state."""
    return copy.deepcopy(module.state_dict())


def same_bits(one, other):
    """Whether two states are equal to the last bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)
