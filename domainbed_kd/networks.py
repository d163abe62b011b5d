"""Networks: from the shape of an input to features, and from features to logits.

The architectures, their tensors' names and their initial weights are DomainBed's (b93c22a), so
that a run starts from the same bits and its model.pkl opens on either side. Networks with
pretrained weights are in backbones.py, those for segmentation in segmenters.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd.backbones import DINOv2, ResNet, Staged, refuse_contradictions
from domainbed_kd.segmenters import DeepLab, UNet

__all__ = ["MLP", "MNIST_CNN", "Classifier", "ContextNet", "CosineClassifier", "CountsOnCPU",
           "DINOv2", "DeepLab", "Featurizer", "Frozen", "Normalization", "ResNet", "Staged", "UNet",
           "WideResNet", "featurizer_and_classifier", "sent"]


def Featurizer(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> nn.Module:
    """The network that turns inputs (B, *input_shape) into features (B, n_outputs).

    Vectors get an MLP. Square images get a small CNN from 16 pixels, a wide ResNet from 32, and
    from 64 the network that the hparams name: a ResNet, DINOv2, or any timm model (`backbone`, from
    32 pixels; our own "small_vit" from 16). Networks for images except DINOv2 have `stages()` and
    `pool`. All apply their attribute `activation`, the identity, last; a method may replace it.

    If hparams["task"] is "segmentation", features are maps (B, n_outputs, h, w): a U-Net's for
    images of up to 64 pixels, otherwise DeepLabV3's on the ResNet that the hparams name.

    Raises:
        NotImplementedError: if no network takes this shape.
        ValueError: if hparams contradict each other, or weights do not fit.
        OSError: if pretrained weights cannot be downloaded, or a file of weights does not exist.
    """
    if len(input_shape) == 1:
        hparams = {"mlp_width": 256, "mlp_depth": 3, "mlp_dropout": 0.0, **hparams}
        return MLP(input_shape[0], hparams["mlp_width"], hparams)
    if len(input_shape) != 3 or input_shape[1] != input_shape[2] or input_shape[1] < 16:
        raise NotImplementedError(
            f"No featurizer takes inputs of shape {tuple(input_shape)}: use vectors (n,) or "
            "square images (channels, side, side) of 16 pixels or more.")

    side = input_shape[1]
    if hparams.get("task") == "segmentation":
        is_small = side <= 64 and not hparams.get("backbone")
        return UNet(input_shape) if is_small else DeepLab(input_shape, hparams)
    if side >= 64 or hparams.get("backbone"):
        refuse_contradictions(side, hparams)
        return (DINOv2 if hparams["vit"] else ResNet)(input_shape, hparams)
    if hparams.get("weights") not in (None, "none"):
        raise ValueError(f"weights is {hparams['weights']!r}, but the network for {side}-pixel "
                         "images starts at random: drop it, or name a backbone (from 32 pixels).")
    if side >= 32:
        return WideResNet(input_shape, hparams.get("wrn_depth", 16), hparams.get("wrn_widen", 2))
    return MNIST_CNN(input_shape)


def Classifier(in_features: int, out_features: int, is_nonlinear: bool = False) -> nn.Module:
    """From features (B, in_features) to logits (B, out_features): linear, or an MLP."""
    if not is_nonlinear:
        return nn.Linear(in_features, out_features)
    return nn.Sequential(
        nn.Linear(in_features, in_features // 2),
        nn.ReLU(),
        nn.Linear(in_features // 2, in_features // 4),
        nn.ReLU(),
        nn.Linear(in_features // 4, out_features))


def featurizer_and_classifier(input_shape: Sequence[int], num_classes: int,
                              hparams: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The two parts of a student: from images to features, and from these to logits.

    Logits are (B, num_classes), or maps (B, num_classes, H, W) for "segmentation".
    """
    featurizer: Any = Featurizer(input_shape, hparams)
    if hparams.get("task") == "segmentation":
        return featurizer, featurizer.classifier(num_classes)
    return featurizer, Classifier(
        featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])


class CosineClassifier(nn.Module):
    """Logits (B, C) of features (B, D): their cosines with text (C, D), times `scale`.

    Neither learns. Text is normalized to unit length.
    """

    text: Tensor
    scale: Tensor

    def __init__(self, text: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("text", F.normalize(text, dim=-1))
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.scale * F.normalize(x, dim=-1) @ self.text.T


class Normalization(nn.Module):
    """Normalizes images (B, C, H, W) in [0, 1] by a mean and a deviation per channel.

    These are in the state dict only if they are `saved`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], saved: bool = False):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1),
                                 persistent=saved)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images, in the precision of x."""
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x * self.std.to(x.dtype) + self.mean.to(x.dtype)


class Frozen(nn.Module):
    """A teacher: `module` in eval mode, never trained, nor saved or copied with its owner.

    It is kept out of PyTorch's registry: it has no parameters() and no state_dict() entries,
    train() does not reach it, and a deepcopy of its owner shares it. It follows its owner's .to().
    Calls run without gradients; to differentiate through the input, call `.module`.
    """

    #: The share of its weights that came from a file; None for an object that was passed in.
    weights_loaded: float | None = None
    #: How the student's images are changed first, in words.
    preprocessing = "the student's"
    #: Its stored outputs for the current images, on their device, which calls then return; see
    #: canonical_view.
    recalled: Tensor | None = None
    #: Of a run: the domains that it held out, its images' `view_statistics`, and its trial seed.
    held_out: Sequence[int] = ()
    statistics: str | None = None
    trial_seed: int | None = None

    #: The network.
    module: nn.Module

    def __init__(self, module: nn.Module):
        super().__init__()
        object.__setattr__(self, "module", module.requires_grad_(False).eval())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The teacher's output for x (B, ...), without gradients, or the recalled one."""
        return self.look(x) if self.recalled is None else self.recalled

    def look(self, x: Tensor) -> Tensor:
        """The module's output."""
        return self.module(x)

    def keep(self, rows: Tensor) -> None:
        """Selects rows of `recalled`, as a method does of the batch's images."""
        if self.recalled is not None:
            self.recalled = self.recalled[rows]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: object) -> "Frozen":
        return self


class CountsOnCPU(nn.Module):
    """A module whose counters stay on the CPU, so that reading one never waits for a GPU.

    Counters are its own buffers of one integer or boolean, such as the number of updates.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        counters = {name: buffer for name, buffer in self._buffers.items()
                    if buffer is not None and buffer.numel() == 1
                    and not buffer.is_floating_point()}
        super()._apply(fn, recurse)
        self._buffers.update(counters)
        return self


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a GPU copies it from pinned memory while the CPU continues."""
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)  # pins only what is not yet pinned
    return x.to(device)


class MLP(nn.Module):
    """mlp_depth linear layers (2 or more), mlp_width wide: (B, n_inputs) -> (B, n_outputs)."""

    def __init__(self, n_inputs: int, n_outputs: int, hparams: Mapping[str, Any]):
        super().__init__()
        width = hparams["mlp_width"]
        self.input = nn.Linear(n_inputs, width)
        self.dropout = nn.Dropout(hparams["mlp_dropout"])
        self.hiddens = nn.ModuleList(
            nn.Linear(width, width) for _ in range(hparams["mlp_depth"] - 2))
        self.output = nn.Linear(width, n_outputs)
        self.n_outputs = n_outputs
        self.activation = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_outputs) of x (B, n_inputs)."""
        for layer in (self.input, *self.hiddens):
            x = F.relu(self.dropout(layer(x)))
        return self.activation(self.output(x))


class ContextNet(nn.Module):
    """ARM's context (B, 1, H, W) of images (B, C, H, W), of which the method takes the mean.

    Zhang et al., "Adaptive Risk Minimization", NeurIPS 2021, https://arxiv.org/abs/2007.02931.
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.context_net = nn.Sequential(
            nn.Conv2d(input_shape[0], 64, kernel_size=5, padding=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=5, padding=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 1, kernel_size=5, padding=2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) of x (B, C, H, W)."""
        return self.context_net(x)


class MNIST_CNN(Staged):
    """Four 3x3 convolutions with group normalization, for small images. Stages: one each."""

    n_outputs = 128

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(128, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn0 = nn.GroupNorm(8, 64)
        self.bn1 = nn.GroupNorm(8, 128)
        self.bn2 = nn.GroupNorm(8, 128)
        self.bn3 = nn.GroupNorm(8, 128)
        self.activation = nn.Identity()

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """Each convolution with its ReLU and normalization; the second halves the side."""
        return [nn.Sequential(conv, nn.ReLU(), norm) for conv, norm in (
            (self.conv1, self.bn0), (self.conv2, self.bn1),
            (self.conv3, self.bn2), (self.conv4, self.bn3))]

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the pixels, (B, 128)."""
        return self.activation(F.adaptive_avg_pool2d(x, 1).flatten(1))


class _WideBlock(nn.Module):
    """Two pre-activated 3x3 convolutions beside a shortcut; the second may have a stride."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut.append(nn.Conv2d(n_in, n_out, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + self.shortcut(x)


class WideResNet(Staged):
    """For images of about 32 pixels: three stages of (depth - 4) / 6 residual blocks each.

    Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146.
    """

    def __init__(self, input_shape: Sequence[int], depth: int = 16, widen: int = 2):
        super().__init__()
        if depth < 10 or depth % 6 != 4 or widen < 1:
            raise ValueError(f"wrn_depth is {depth} and wrn_widen {widen}: the depth must be 10, "
                             "16, 22, ... (6 n + 4), the width factor at least 1.")
        widths = [16, 16 * widen, 32 * widen, 64 * widen]

        def stage(n_in: int, n_out: int, stride: int) -> nn.Module:
            first = _WideBlock(n_in, n_out, stride)
            return nn.Sequential(first, *(
                _WideBlock(n_out, n_out, 1) for _ in range((depth - 4) // 6 - 1)))

        self.conv1 = nn.Conv2d(input_shape[0], widths[0], 3, padding=1)
        self.layer1 = stage(widths[0], widths[1], stride=1)
        self.layer2 = stage(widths[1], widths[2], stride=2)
        self.layer3 = stage(widths[2], widths[3], stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3], momentum=0.9)
        self.n_outputs = widths[3]
        self.activation = nn.Identity()

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """The three stages, at the image's side, its half and its quarter."""
        return [nn.Sequential(self.conv1, self.layer1), self.layer2,
                nn.Sequential(self.layer3, self.bn1, nn.ReLU())]

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the pixels, (B, n_outputs)."""
        return self.activation(F.avg_pool2d(x, x.shape[2:]).flatten(1))
