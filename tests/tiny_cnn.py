"""Small convolutional networks of the real timm classes, norms random so that no term is right only for being 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import efficientnet
from timm.models.convnext import ConvNeXt
from timm.models.fasternet import FasterNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG
from torch import Tensor, nn

SIZE = 32


def noisy(model: nn.Module) -> Any:
    """Random norms; weights large enough that every block counts."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, mean in ((module.weight, 1.0), (module.bias, 0.2), (module.running_mean, 0.1)):
                tensor.data = mean + 0.3 * torch.randn(tensor.shape, generator=generator)  # pyright: ignore
            module.running_var.data = 0.5 + torch.rand(len(module.weight), generator=generator)  # pyright: ignore
    return model.eval()


def resnet(block: Any, **kwargs: Any) -> Any:
    channels = {"channels": (8, 16, 16, 16), "stem_width": 8, "num_classes": 5}
    return noisy(ResNet(block, (1, 1, 1, 2), **{**channels, **kwargs}))


def lite(**kwargs: Any) -> Any:
    """EfficientNet-Lite as TensorFlow has it: ReLU6, no squeeze-and-excitation, asymmetric padding."""
    made = efficientnet._gen_efficientnet_lite(
        "tf_efficientnet_lite0", channel_multiplier=0.25, depth_multiplier=0.3, num_classes=5, pad_type="same", **kwargs
    )
    return noisy(made)


def vgg(norm: Any = nn.BatchNorm2d) -> Any:
    return noisy(VGG([8, "M", 8, "M", 16, 16, "M", 16, 16], num_classes=5, norm_layer=norm, mlp_ratio=0.01))


def fasternet(**kwargs: Any) -> Any:
    made = FasterNet(embed_dim=16, depths=(1, 1, 1, 1), num_classes=5, feature_dim=32, **kwargs)
    for name, module in made.named_modules():
        if isinstance(module, nn.Conv2d) and "stages" in name:
            module.weight.data.mul_(10)  # timm starts so small that no block would matter
    return noisy(made)


CHAINS: dict[str, Callable[[], Any]] = {
    "resnet basic": partial(resnet, BasicBlock),
    "resnet bottleneck": partial(resnet, Bottleneck),
    "efficientnet lite": lite,
    "vgg": vgg,
    "vgg without norms": partial(vgg, None),
    "convnext": lambda: noisy(ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 16, 24, 24), num_classes=5, ls_init_value=0.5)),
    "convnext conv_mlp": lambda: noisy(
        ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 16, 24, 24), num_classes=5, conv_mlp=True, ls_init_value=0.5)
    ),
    "fasternet": fasternet,
}
PARTIAL: dict[str, Callable[[], Any]] = {
    "fasternet": fasternet,
    "fasternet, slicing": partial(fasternet, pconv_fw_type="slicing"),
}


def images(count: int = 4, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
