"""Networks for segmentation: from images to feature maps, and from these to logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd.backbones import ResNet, refuse_contradictions


class UNet(nn.Module):
    """Maps (B, 32, H / 2, W / 2) of small images whose sides are multiples of 8.

    Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI
    2015, https://arxiv.org/abs/1505.04597, much narrower, and with a pixel shuffle in place of its
    top level. With ten classes and a background it has 293,564 parameters.
    """

    n_outputs = 32

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__()
        channels, *sides = input_shape
        if any(side % 8 for side in sides):
            raise ValueError("The U-Net for small images takes sides that 8 divides; found "
                             f"{sides}.")

        def block(n_in: int, n_out: int) -> nn.Module:
            return nn.Sequential(*(layer for n in (n_in, n_out) for layer in (
                nn.Conv2d(n, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())))

        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 4, stride=2, padding=1), nn.ReLU())
        self.down = nn.ModuleList([block(16, 32), block(32, 64), block(64, 64)])
        self.up = nn.ModuleList([block(64 + 64, 64), block(64 + 32, 32)])
        self.activation = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, 32, H / 2, W / 2) of images (B, C, H, W)."""
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
    https://arxiv.org/abs/1706.05587. The ResNet's last stage is dilated, not strided. A batch of
    one image cannot train it, as the BatchNorm of its pooled branch would see a single value.
    """

    n_outputs = 256

    def __init__(self, input_shape: Sequence[int], hparams: Mapping[str, Any]) -> None:
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead

        refuse_contradictions(input_shape[1], hparams)
        backbone = None if hparams["vit"] else ResNet(input_shape, hparams)
        if backbone is None or not hasattr(backbone.network, "layer4"):
            raise ValueError("Segmentation takes a ResNet, torchvision's or timm's: leave out vit, "
                             "and name as backbone one that has a layer4, or none.")
        self.backbone = backbone
        for module in backbone.network.layer4.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)
            if hasattr(module, "stride"):
                module.stride = (1, 1)
        head = DeepLabHead(backbone.n_outputs, 1, atrous_rates=(6, 12, 18))  # at stride 16
        self.head = nn.Sequential(*list(head)[:-1])
        self.activation = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, 256, H / 16, W / 16), rounded up, of images (B, C, H, W)."""
        for stage in self.backbone.stages():
            x = stage(x)
        return self.activation(self.head(x))

    def classifier(self, num_classes: int) -> nn.Module:
        """From features to logits (B, num_classes, H, W), sides rounded up to multiples of 16."""
        return nn.Sequential(nn.Conv2d(self.n_outputs, num_classes, 1),
                             nn.Upsample(scale_factor=16.0, mode="bilinear"))
