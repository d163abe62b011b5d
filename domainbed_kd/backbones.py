"""Networks with pretrained weights: torchvision's ResNets, timm's models and DINOv2."""

import contextlib
import difflib
import functools
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from torch import Tensor, nn

#: The `backbone` that is ours: a transformer for small images, of 16 pixels or more.
SMALL_VIT = "small_vit"


class Staged(nn.Module):
    """A featurizer for images: convolution stages, then pooling."""

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """Functions from (B, c, h, w) to (B, c', h', w'), to be applied in turn."""
        raise NotImplementedError(f"{type(self).__name__} does not implement stages().")

    def pool(self, x: Tensor) -> Tensor:
        """Features (B, n_outputs) of what the last stage returns."""
        raise NotImplementedError(f"{type(self).__name__} does not implement pool().")

    def maps(self, x: Tensor) -> list[Tensor]:
        """What each stage returns for images (B, C, H, W)."""
        found = []
        for stage in self.stages():
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, n_outputs) of images (B, C, H, W)."""
        for stage in self.stages():
            x = stage(x)
        return self.pool(x)


class ResNet(Staged):
    """An ImageNet network without its classifier: torchvision's ResNets, or a timm model.

    For inputs with other than three channels, a new first convolution is built whose channel i
    starts as the pretrained channel i mod 3. With `freeze_bn`, BatchNorm keeps its statistics in
    train mode; its scale and shift still learn.
    """

    network: Any

    def __init__(self, input_shape: Sequence[int], hparams: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.n_outputs, first_conv = _imagenet_network(input_shape[1], hparams)
        if input_shape[0] != 3:
            _replace_first_conv(self.network, first_conv, input_shape[0])
        self.dropout = nn.Dropout(hparams["resnet_dropout"])
        self.activation = nn.Identity()
        self.freeze_bn = hparams["freeze_bn"]
        self.train()

    def train(self, mode: bool = True) -> "ResNet":
        """As nn.Module's, except that `freeze_bn` keeps BatchNorm in eval mode."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """A ResNet's four; an EfficientNet's groups of blocks; one stage for other models.

        A transformer's one stage returns tokens (B, n, c), not maps.
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

    def pool(self, x: Tensor) -> Tensor:
        """Pooled features (B, n_outputs), after dropout."""
        net = self.network
        x = net.forward_head(x) if hasattr(net, "forward_head") else net.avgpool(x).flatten(1)
        return self.activation(self.dropout(x))


class DINOv2(nn.Module):
    """DINOv2's ViT-B/14: its last four class tokens and its last mean patch token, (B, 3840).

    Oquab et al., "DINOv2", TMLR 2024, https://arxiv.org/abs/2304.07193. With `vit_attn_tune`
    only the attention layers learn.
    """

    n_outputs = 5 * 768
    network: Any

    def __init__(self, input_shape: Sequence[int], hparams: Mapping[str, Any]) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3840) of images (B, 3, H, W), H and W multiples of 14."""
        blocks = self.network.get_intermediate_layers(x, n=4, return_class_token=True)
        patches, _ = blocks[-1]  # (B, H / 14 * W / 14, 768)
        tokens = [token for _, token in blocks] + [patches.mean(dim=1)]
        return self.activation(self.dropout(torch.cat(tokens, dim=1)))


def refuse_contradictions(side: int, hparams: Mapping[str, Any]) -> None:
    """Raises ValueError if the hparams name two networks, or an option of one they do not name."""
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


def _imagenet_network(side: int, hparams: Mapping[str, Any]) -> tuple[nn.Module, int, str]:
    """The network that hparams name, without its classifier; its width; its first convolution."""
    weights, backbone = hparams.get("weights"), hparams.get("backbone")
    if not backbone:
        name = "resnet18" if hparams["resnet18"] else "resnet50"
        if not hparams["resnet50_augmix"]:
            return _torchvision_network(name, weights)
        # DomainBed builds this one too and discards it, which advances the random stream.
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
        network: Any = models.get_model(
            name, weights=None if random else weights or "IMAGENET1K_V1")
    width, network.fc = network.fc.in_features, nn.Identity()
    if _is_file(weights):
        _load_file(network, weights, "fc.")
    return network, width, "conv1"


def check_name(name: str) -> None:
    """Refuses a name of the hparam `backbone` that timm does not know; raises ValueError."""
    import timm

    if name != SMALL_VIT and (
            not timm.is_model(name) or "." in name and not timm.models.is_model_pretrained(name)):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained())
        raise ValueError(f"backbone: timm has no {name!r}. Near it: {', '.join(near) or 'none'}.")


def _timm_network(name: str, side: int, weights: str | None) -> tuple[nn.Module, int, str]:
    import timm
    from timm.models import VisionTransformer, is_model_pretrained

    if name == SMALL_VIT:
        if side % 4 or weights not in (None, "none"):
            raise ValueError("backbone 'small_vit' takes a side that 4 divides, and starts at "
                             f"random; found {side} pixels and weights {weights!r}.")
        width = 64
        return VisionTransformer(
            img_size=side, patch_size=4, num_classes=0, embed_dim=width, depth=6, num_heads=4
        ), width, "patch_embed.proj"
    check_name(name)
    if weights not in (None, "none") and not _is_file(weights):
        raise ValueError(
            f"weights is {weights!r}, but the network is timm's {name}, which takes a file or "
            'none. For torchvision\'s ResNet-50 pass "resnet50_augmix": false.')
    if weights is None and not is_model_pretrained(name):
        raise ValueError(f"timm has no weights for {name}: pass a file or 'none' as weights.")
    fixed_side = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    options: dict[str, Any] = {"img_size": side} if fixed_side else {}
    with _downloading(f"The weights of {name}"):
        network: Any = timm.create_model(name, pretrained=weights is None, **options)
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
    kind: Any = type(old)
    new = kind(channels, old.out_channels, old.kernel_size, old.stride, old.padding,
               bias=old.bias is not None)
    new.load_state_dict(old.state_dict() | {
        "weight": old.weight[:, [i % 3 for i in range(channels)]]})
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, new)


@contextlib.contextmanager
def _downloading(what: str) -> Iterator[None]:
    """Turns errors of a failed download into one line that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{what} could not be downloaded ({reason}). Pass a file, "
                      '--hparams \'{"weights": "path.pth"}\', or "none" to start at random.'
                      ) from error


def _is_file(weights: str | None) -> TypeGuard[str]:
    """Whether weights look like a file's name: with a suffix or a folder."""
    return isinstance(weights, str) and ("." in weights or "/" in weights)


def _load_file(network: nn.Module, path: str, classifier: str | tuple[str, ...] = ()) -> None:
    """Loads a whole network from a file, which may also hold a classifier.

    If all names differ, tensors of the same shapes in the same order are loaded with a warning.
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
          and len(found) - len(wanted) <= 2):  # the classifier's two tensors
        _warn_once(f"{path} names its tensors differently; all {len(wanted)} have the shapes of "
                   f"{type(network).__name__}'s in the same order, in which they were loaded.")
        network.load_state_dict(by_order)
    else:
        raise ValueError(
            f"{path} does not fit {type(network).__name__}: of its {len(found)} tensors "
            f"{len(by_name)} match by name and shape and {in_order} by order and shape, but "
            f"{len(wanted)} are expected.")


def _read_tensors(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: there is no file {path}.")
    try:
        content: Any
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
