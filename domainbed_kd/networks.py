"""Networks: from the shape of an input to features, and from features to logits.

The architectures, their tensors' names and their initial weights are DomainBed's (b93c22a), so
that a run starts from the same bits and its model.pkl opens on either side.
"""

import contextlib
import difflib
import functools
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The `backbone` that is ours: a transformer for small images, of 16 pixels or more.
SMALL_VIT = "small_vit"


def Featurizer(input_shape, hparams) -> nn.Module:
    """The network that turns inputs (B, *input_shape) into features (B, n_outputs).

    Vectors get an MLP; square images a small CNN from 16 pixels, a wide ResNet from 32, and from
    64 what the hparams name: a ResNet, DINOv2, or any timm model (`backbone`, from 32 pixels;
    our own "small_vit" from 16). Those for images have `stages()` and `pool`, DINOv2 excepted. All
    apply their attribute `activation`, the identity, last; a method may replace it.

    Where hparams["task"] is "segmentation", features are maps (B, n_outputs, h, w): a U-Net's for
    images of up to 64 pixels, else DeepLabV3's on the ResNet that the hparams name.

    Raises:
        NotImplementedError: if no network takes this shape.
        ValueError: if hparams contradict each other, or weights do not fit.
        OSError: if pretrained weights cannot be downloaded, or a file of weights is not there.
    """
    if len(input_shape) == 1:
        hparams = {"mlp_width": 256, "mlp_depth": 3, "mlp_dropout": 0.0, **hparams}
        return MLP(input_shape[0], hparams["mlp_width"], hparams)
    if len(input_shape) != 3 or input_shape[1] != input_shape[2] or input_shape[1] < 16:
        raise NotImplementedError(
            f"No featurizer takes inputs of shape {tuple(input_shape)}: give vectors (n,) or "
            "square images (channels, side, side) of 16 pixels or more.")

    side = input_shape[1]
    if hparams.get("task") == "segmentation":
        is_small = side <= 64 and not hparams.get("backbone")
        return UNet(input_shape) if is_small else DeepLab(input_shape, hparams)
    if side >= 64 or hparams.get("backbone"):
        _refuse_contradictions(side, hparams)
        return (DINOv2 if hparams["vit"] else ResNet)(input_shape, hparams)
    if hparams.get("weights") not in (None, "none"):
        raise ValueError(f"weights is {hparams['weights']!r}, but the network for {side}-pixel "
                         "images starts at random: drop it, or name a backbone (from 32 pixels).")
    if side >= 32:
        return WideResNet(input_shape, hparams.get("wrn_depth", 16), hparams.get("wrn_widen", 2))
    return MNIST_CNN(input_shape)


def Classifier(in_features: int, out_features: int, is_nonlinear: bool = False) -> nn.Module:
    """From features (B, in_features) to logits (B, out_features): linear, or two hidden layers."""
    if not is_nonlinear:
        return nn.Linear(in_features, out_features)
    return nn.Sequential(
        nn.Linear(in_features, in_features // 2),
        nn.ReLU(),
        nn.Linear(in_features // 2, in_features // 4),
        nn.ReLU(),
        nn.Linear(in_features // 4, out_features))


def featurizer_and_classifier(input_shape, num_classes: int, hparams
                              ) -> tuple[nn.Module, nn.Module]:
    """The two halves of a student: from images to features, and from these to logits.

    Logits are (B, num_classes), or maps (B, num_classes, H, W) for "segmentation".

    Raises:
        NotImplementedError, ValueError, OSError: as `Featurizer`.
    """
    featurizer = Featurizer(input_shape, hparams)
    if hparams.get("task") == "segmentation":
        return featurizer, featurizer.classifier(num_classes)
    return featurizer, Classifier(
        featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])


class CosineClassifier(nn.Module):
    """Logits (B, C) of features (B, D): their cosines with text (C, D), times `scale`.

    Neither learns. Text is kept at unit length.
    """

    def __init__(self, text: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("text", F.normalize(text, dim=-1))
        self.register_buffer("scale", scale.clone())

    def forward(self, x):
        """Logits (B, C)."""
        return self.scale * F.normalize(x, dim=-1) @ self.text.T


class Frozen(nn.Module):
    """A teacher: `module`, in eval mode, that nothing trains, saves or copies along.

    It is kept out of PyTorch's registry, so it has no parameters() and no state_dict() entries,
    train() does not reach it, and a deepcopy of its owner shares it; it follows its owner's
    .to(). Calls run without gradients; to differentiate through the input, call `.module`.
    """

    #: The share of its weights that came from a file; None for an object that was passed in.
    weights_loaded: float | None = None
    #: What is done to the student's images first, in words.
    preprocessing = "the student's"
    #: What it gave before for the images at hand, which calls return then; see canonical_view.
    recalled: Tensor | None = None

    def __init__(self, module: nn.Module):
        super().__init__()
        object.__setattr__(self, "module", module.requires_grad_(False).eval())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What the teacher makes of x (B, ...), without gradients, or what is recalled of it."""
        return self.look(x) if self.recalled is None else self.recalled.to(x.device)

    def look(self, x: Tensor) -> Tensor:
        """What the module returns."""
        return self.module(x)

    def keep(self, rows: Tensor) -> None:
        """Narrows what is recalled to these rows of the batch, as its images are narrowed."""
        if self.recalled is not None:
            self.recalled = self.recalled[rows.to(self.recalled.device)]

    def _apply(self, fn, recurse=True):
        self.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo):
        return self


class CountsOnCPU(nn.Module):
    """A module whose counters stay on the CPU, so that reading one never waits for a GPU.

    Counters are its own buffers of one integer or truth value, such as the number of updates.
    """

    def _apply(self, fn, recurse=True):
        counters = {name: buffer for name, buffer in self._buffers.items()
                    if buffer is not None and buffer.numel() == 1
                    and not buffer.is_floating_point()}
        super()._apply(fn, recurse)
        self._buffers.update(counters)
        return self


class MLP(nn.Module):
    """mlp_depth linear layers (2 or more), mlp_width wide: (B, n_inputs) -> (B, n_outputs)."""

    def __init__(self, n_inputs: int, n_outputs: int, hparams):
        super().__init__()
        width = hparams["mlp_width"]
        self.input = nn.Linear(n_inputs, width)
        self.dropout = nn.Dropout(hparams["mlp_dropout"])
        self.hiddens = nn.ModuleList(
            nn.Linear(width, width) for _ in range(hparams["mlp_depth"] - 2))
        self.output = nn.Linear(width, n_outputs)
        self.n_outputs = n_outputs
        self.activation = nn.Identity()

    def forward(self, x):
        """(B, n_outputs) of x (B, n_inputs)."""
        for layer in (self.input, *self.hiddens):
            x = F.relu(self.dropout(layer(x)))
        return self.activation(self.output(x))


class ContextNet(nn.Module):
    """ARM's context (B, 1, H, W) of images (B, C, H, W), of which the method takes the mean.

    Zhang et al., "Adaptive Risk Minimization", NeurIPS 2021, https://arxiv.org/abs/2007.02931.
    """

    def __init__(self, input_shape):
        super().__init__()
        self.context_net = nn.Sequential(
            nn.Conv2d(input_shape[0], 64, kernel_size=5, padding=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=5, padding=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 1, kernel_size=5, padding=2))

    def forward(self, x):
        """(B, 1, H, W) of x (B, C, H, W)."""
        return self.context_net(x)


class _Staged(nn.Module):
    """A featurizer for images: convolution stages, then pooling."""

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """Functions from (B, c, h, w) to (B, c', h', w'), to be applied in turn."""
        raise NotImplementedError(f"{type(self).__name__} does not implement stages().")

    def pool(self, x: Tensor) -> Tensor:
        """Features (B, n_outputs) of what the last stage returns."""
        raise NotImplementedError(f"{type(self).__name__} does not implement pool().")

    def forward(self, x):
        """Features (B, n_outputs) of images (B, C, H, W)."""
        for stage in self.stages():
            x = stage(x)
        return self.pool(x)


class MNIST_CNN(_Staged):
    """Four 3x3 convolutions with group normalization, for small images. Stages: one each."""

    n_outputs = 128

    def __init__(self, input_shape):
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

    def stages(self):
        """Each convolution with its ReLU and normalization; the second halves the side."""
        return [nn.Sequential(conv, nn.ReLU(), norm) for conv, norm in (
            (self.conv1, self.bn0), (self.conv2, self.bn1),
            (self.conv3, self.bn2), (self.conv4, self.bn3))]

    def pool(self, x):
        """Mean over the pixels, (B, 128)."""
        return self.activation(F.adaptive_avg_pool2d(x, 1).flatten(1))


class _WideBlock(nn.Module):
    """Two pre-activated 3x3 convolutions beside a shortcut; the second may stride."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut.append(nn.Conv2d(n_in, n_out, 1, stride=stride))

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + self.shortcut(x)


class WideResNet(_Staged):
    """For images of about 32 pixels: three stages of (depth - 4) / 6 residual blocks each.

    Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146.
    """

    def __init__(self, input_shape, depth: int = 16, widen: int = 2):
        super().__init__()
        if depth < 10 or depth % 6 != 4 or widen < 1:
            raise ValueError(f"wrn_depth is {depth} and wrn_widen {widen}: the depth must be 10, "
                             "16, 22, ... (6 n + 4), the width factor at least 1.")
        widths = [16, 16 * widen, 32 * widen, 64 * widen]

        def stage(n_in, n_out, stride):
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

    def stages(self):
        """The three stages, at the image's side, its half and its quarter."""
        return [nn.Sequential(self.conv1, self.layer1), self.layer2,
                nn.Sequential(self.layer3, self.bn1, nn.ReLU())]

    def pool(self, x):
        """Mean over the pixels, (B, n_outputs)."""
        return self.activation(F.avg_pool2d(x, x.shape[2:]).flatten(1))


class ResNet(_Staged):
    """An ImageNet network without its classifier: torchvision's ResNets, or a timm model.

    Inputs of other than three channels go to a new first convolution, whose channel i starts as
    the pretrained channel i mod 3. With `freeze_bn`, BatchNorm keeps its statistics in train
    mode; its scale and shift still learn.
    """

    def __init__(self, input_shape, hparams):
        super().__init__()
        self.network, self.n_outputs, first_conv = _imagenet_network(input_shape[1], hparams)
        if input_shape[0] != 3:
            _replace_first_conv(self.network, first_conv, input_shape[0])
        self.dropout = nn.Dropout(hparams["resnet_dropout"])
        self.activation = nn.Identity()
        self.freeze_bn = hparams["freeze_bn"]
        self.train()

    def train(self, mode=True):
        """As nn.Module's, except that `freeze_bn` keeps BatchNorm in eval mode."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def stages(self):
        """A ResNet's four; an EfficientNet's groups of blocks; of other models all in one.

        What a transformer's one stage returns are tokens (B, n, c), not an image.
        """
        net = self.network
        if hasattr(net, "layer4") and hasattr(net, "maxpool"):
            act = net.act1 if hasattr(net, "act1") else net.relu  # timm's name, torchvision's
            stem = nn.Sequential(net.conv1, net.bn1, act, net.maxpool)
            return [nn.Sequential(stem, net.layer1), net.layer2, net.layer3, net.layer4]
        if type(net).__name__ == "EfficientNet":
            first, *middle, last = net.blocks
            return [nn.Sequential(net.conv_stem, net.bn1, first), *middle,
                    nn.Sequential(last, net.conv_head, net.bn2)]
        return [net.forward_features]

    def pool(self, x):
        """Pooled features (B, n_outputs), after dropout."""
        net = self.network
        x = net.forward_head(x) if hasattr(net, "forward_head") else net.avgpool(x).flatten(1)
        return self.activation(self.dropout(x))


class DINOv2(nn.Module):
    """DINOv2's ViT-B/14: the last four class tokens and the last mean patch token, (B, 3840).

    Oquab et al., "DINOv2", TMLR 2024, https://arxiv.org/abs/2304.07193. With `vit_attn_tune`
    only the attention layers learn.
    """

    n_outputs = 5 * 768

    def __init__(self, input_shape, hparams):
        super().__init__()
        channels, side = input_shape[:2]
        if channels != 3 or side % 14:
            raise ValueError("DINOv2 takes 3 channels and a side that 14 divides, such as 224; "
                             f"found {channels} and {side}.")
        weights = hparams.get("weights")
        if weights not in (None, "none") and not _is_file(weights):
            raise ValueError(f"weights is {weights!r}; DINOv2 takes a file, or 'none'.")
        with _downloading("DINOv2's weights, or its code, which torch.hub needs in any case,"):
            self.network = torch.hub.load(
                "facebookresearch/dinov2", "dinov2_vitb14", pretrained=weights is None)
        if _is_file(weights):
            _load_file(self.network, weights)
        if hparams["vit_attn_tune"]:
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_("attn" in name)
        self.dropout = nn.Dropout(hparams["vit_dropout"])
        self.activation = nn.Identity()

    def forward(self, x):
        """(B, 3840) of images (B, 3, H, W), H and W multiples of 14."""
        blocks = self.network.get_intermediate_layers(x, n=4, return_class_token=True)
        patches, _ = blocks[-1]  # (B, H / 14 * W / 14, 768)
        tokens = [token for _, token in blocks] + [patches.mean(dim=1)]
        return self.activation(self.dropout(torch.cat(tokens, dim=1)))


class UNet(nn.Module):
    """Maps (B, 32, H / 2, W / 2) of small images whose sides 8 divides.

    Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI
    2015, https://arxiv.org/abs/1505.04597; at a sixtieth of its width and without its top level,
    whose work a pixel shuffle does. With ten classes and a background it has 293,564 parameters.
    """

    n_outputs = 32

    def __init__(self, input_shape):
        super().__init__()
        channels, *sides = input_shape
        if any(side % 8 for side in sides):
            raise ValueError("The U-Net for small images takes sides that 8 divides; found "
                             f"{sides}.")

        def block(n_in, n_out):
            return nn.Sequential(*(layer for n in (n_in, n_out) for layer in (
                nn.Conv2d(n, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())))

        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 4, stride=2, padding=1), nn.ReLU())
        self.down = nn.ModuleList([block(16, 32), block(32, 64), block(64, 64)])
        self.up = nn.ModuleList([block(64 + 64, 64), block(64 + 32, 32)])
        self.activation = nn.Identity()

    def forward(self, x):
        """(B, 32, H / 2, W / 2) of images (B, C, H, W)."""
        first = self.down[0](self.stem(x))
        second = self.down[1](F.max_pool2d(first, 2))
        x = self.down[2](F.max_pool2d(second, 2))
        for block, skipped in zip(self.up, (second, first)):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skipped], dim=1))
        return self.activation(x)

    def classifier(self, num_classes: int) -> nn.Module:
        """From features to logits (B, num_classes, H, W)."""
        return nn.Sequential(nn.Conv2d(self.n_outputs, 4 * num_classes, 1), nn.PixelShuffle(2))


class DeepLab(nn.Module):
    """DeepLabV3's maps (B, 256, H / 16, W / 16): torchvision's head on a ResNet.

    Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017,
    https://arxiv.org/abs/1706.05587. The network's last stage is dilated, not strided. A batch of
    one image cannot train it: its pooled branch has a BatchNorm on single values.

    Raises:
        ValueError: if the hparams name another network than a ResNet.
    """

    n_outputs = 256

    def __init__(self, input_shape, hparams):
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead

        _refuse_contradictions(input_shape[1], hparams)
        self.backbone = None if hparams["vit"] else ResNet(input_shape, hparams)
        if not hasattr(getattr(self.backbone, "network", None), "layer4"):
            raise ValueError("Segmentation takes a ResNet, torchvision's or timm's: leave out vit, "
                             "and name as backbone one that has a layer4, or none.")
        for module in self.backbone.network.layer4.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)
            if hasattr(module, "stride"):
                module.stride = (1, 1)
        head = DeepLabHead(self.backbone.n_outputs, 1, atrous_rates=(6, 12, 18))  # at stride 16
        self.head = nn.Sequential(*list(head)[:-1])
        self.activation = nn.Identity()

    def forward(self, x):
        """(B, 256, H / 16, W / 16), rounded up, of images (B, C, H, W)."""
        for stage in self.backbone.stages():
            x = stage(x)
        return self.activation(self.head(x))

    def classifier(self, num_classes: int) -> nn.Module:
        """From features to logits (B, num_classes, H, W), sides rounded up to multiples of 16."""
        return nn.Sequential(nn.Conv2d(self.n_outputs, num_classes, 1),
                             nn.Upsample(scale_factor=16.0, mode="bilinear"))


def _refuse_contradictions(side: int, hparams) -> None:
    """Raises ValueError if the hparams name two networks, or an option of one not named."""
    backbone, vit = hparams.get("backbone"), hparams["vit"]
    for contradiction, advice in (
        (backbone not in (None, SMALL_VIT) and side < 32,
         f"backbone takes images of 32 pixels or more, and these have {side}"),
        (backbone and (hparams["resnet18"] or vit or hparams["dinov2"]),
         f"backbone {backbone!r} leaves no room for resnet18, vit or dinov2: drop one"),
        (vit and hparams["resnet18"], "vit and resnet18 name two networks: drop one"),
        (vit and not hparams["dinov2"],
         "vit takes dinov2 too; for another vision transformer name a timm model as backbone"),
        (hparams["dinov2"] and not vit, "dinov2 takes vit too"),
        (hparams["vit_attn_tune"] and not vit, "vit_attn_tune takes vit and dinov2 too"),
    ):
        if contradiction:
            raise ValueError(f"Contradictory hparams: {advice}.")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _imagenet_network(side: int, hparams) -> tuple[nn.Module, int, str]:
    """The network that hparams name, without its classifier; its width; its first convolution."""
    weights, backbone = hparams.get("weights"), hparams.get("backbone")
    if not backbone:
        name = "resnet18" if hparams["resnet18"] else "resnet50"
        if not hparams["resnet50_augmix"]:
            return _torchvision_network(name, weights)
        # DomainBed builds that one too, and then discards it; the random stream remembers.
        _torchvision_network(name, "none")
        backbone = "resnet50.ram_in1k"
        if hparams["resnet18"]:
            _warn_once("resnet18 has no effect while resnet50_augmix is true, its default: as in "
                       "DomainBed, this trains the AugMix ResNet-50. For a ResNet-18 pass "
                       '"resnet50_augmix": false as well.')
    return _timm_network(backbone, side, weights)


def _torchvision_network(name: str, weights: str | None) -> tuple[nn.Module, int, str]:
    from torchvision import models

    tags = models.get_model_weights(name).__members__
    random = weights == "none" or _is_file(weights)
    if not random and weights is not None and weights not in tags:
        raise ValueError(f"weights is {weights!r}; {name} takes {', '.join(tags)}, 'none', or a "
                         "file that ends in .pth or .safetensors.")
    with _downloading(f"The weights of {name}"):
        network = models.get_model(name, weights=None if random else weights or "IMAGENET1K_V1")
    width, network.fc = network.fc.in_features, nn.Identity()
    if _is_file(weights):
        _load_file(network, weights, "fc.")
    return network, width, "conv1"


def _timm_network(name: str, side: int, weights: str | None) -> tuple[nn.Module, int, str]:
    import timm
    from timm.models import VisionTransformer, is_model_pretrained

    if name == SMALL_VIT:
        if side % 4 or weights not in (None, "none"):
            raise ValueError("backbone 'small_vit' takes a side that 4 divides, and starts at "
                             f"random; found {side} pixels and weights {weights!r}.")
        width = 64
        network = VisionTransformer(
            img_size=side, patch_size=4, num_classes=0, embed_dim=width, depth=6, num_heads=4)
        return network, width, "patch_embed.proj"
    if not timm.is_model(name) or "." in name and not is_model_pretrained(name):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained())
        raise ValueError(f"backbone: timm has no {name!r}. Near it: {', '.join(near) or 'none'}.")
    if weights not in (None, "none") and not _is_file(weights):
        raise ValueError(
            f"weights is {weights!r}, but the network is timm's {name}, which takes a file or "
            'none. For torchvision\'s ResNet-50 pass "resnet50_augmix": false.')
    if weights is None and not is_model_pretrained(name):
        raise ValueError(f"timm has no weights for {name}: pass a file or 'none' as weights.")
    fixed_side = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    with _downloading(f"The weights of {name}"):
        network = timm.create_model(
            name, pretrained=weights is None, **({"img_size": side} if fixed_side else {}))
    network.reset_classifier(0)
    if _is_file(weights):
        _load_file(network, weights, network.default_cfg["classifier"])
    width = getattr(network, "head_hidden_size", None) or network.num_features
    return network, width, network.default_cfg["first_conv"]


def _replace_first_conv(network: nn.Module, name: str, channels: int) -> None:
    """A first convolution for any number of channels: channel i copies channel i mod 3."""
    old = network.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(old, nn.Conv2d):
        raise ValueError(
            f"{type(network).__name__} takes images of 3 channels, and these have {channels}.")
    new = type(old)(channels, old.out_channels, old.kernel_size, old.stride, old.padding,
                    bias=old.bias is not None)
    new.load_state_dict(old.state_dict() | {
        "weight": old.weight[:, [i % 3 for i in range(channels)]]})
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, new)


@contextlib.contextmanager
def _downloading(what: str) -> Iterator[None]:
    """Turns what the libraries raise without a connection into one line that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{what} could not be downloaded ({reason}). Pass a file, "
                      '--hparams \'{"weights": "path.pth"}\', or "none" to start at random.'
                      ) from error


def _is_file(weights: str | None) -> bool:
    """Whether it looks like one: a suffix or a folder, which no torchvision name has."""
    return isinstance(weights, str) and ("." in weights or "/" in weights)


def _load_file(network: nn.Module, path: str, classifier: str | tuple[str, ...] = ()) -> None:
    """Loads all of a network from a file, in which a classifier may follow.

    Where all names differ, equal shapes in equal order will do, with a warning.
    """
    wanted, found = network.state_dict(), _read_tensors(path)
    by_name = {name: tensor for name, tensor in found.items()
               if name in wanted and tensor.shape == wanted[name].shape}
    unknown = {name for name in found if not name.startswith(classifier)} - by_name.keys()
    # Files from before PyTorch 0.4.1 lack BatchNorm's counter, which nothing here reads.
    lacking = {name for name in wanted.keys() - by_name.keys()
               if not name.endswith("num_batches_tracked")}
    by_order = dict(zip(wanted, found.values()))
    in_order = sum(by_order[name].shape == wanted[name].shape for name in by_order)
    if not unknown and not lacking:
        network.load_state_dict(wanted | by_name)
    elif (in_order == len(wanted) and wanted.keys().isdisjoint(found)
          and len(found) - len(wanted) <= 2):  # a classifier's two
        _warn_once(f"{path} names its tensors otherwise; all {len(wanted)} have the shapes of "
                   f"{type(network).__name__}'s in the same order and were loaded so.")
        network.load_state_dict(by_order)
    else:
        raise ValueError(
            f"{path} does not fit {type(network).__name__}: of its {len(found)} tensors "
            f"{len(by_name)} match by name and shape, {in_order} by order and shape, where "
            f"{len(wanted)} are expected.")


def _read_tensors(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: there is no file {path}.")
    try:
        if path.endswith(".safetensors"):
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError,
            LookupError, struct.error) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"weights: {path} cannot be read ({reason}).") from error
    if not isinstance(content, dict):
        content = {}
    content = content.get("state_dict", content.get("model", content))
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
