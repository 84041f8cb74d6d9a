"""Small convolutional networks of the real timm classes, norms random so that no term is right only for being 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.models import efficientnet
from timm.models.convnext import ConvNeXt
from timm.models.fasternet import FasterNet
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG
from torch import Tensor, nn

import acmize.cifar_models  # noqa: F401 - registers the models

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


def resnet(block: Any, layers: Any = (1, 1, 1, 2), **kwargs: Any) -> Any:
    channels = {"channels": (8, 16, 16, 16), "stem_width": 8, "num_classes": 5}
    return noisy(ResNet(block, layers, **{**channels, **kwargs}))


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


def convnext(**kwargs: Any) -> Any:
    return noisy(ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 16, 24, 24), num_classes=5, ls_init_value=0.5, **kwargs))


def regnet(**kwargs: Any) -> Any:
    cfg = RegNetCfg(depth=6, w0=16, wa=16.0, wm=2.0, group_size=8, stem_width=8, se_ratio=0.25, **kwargs)
    return noisy(RegNet(cfg, num_classes=5))


CHAINS: dict[str, Callable[[], Any]] = {
    "resnet basic": partial(resnet, BasicBlock),
    "resnet bottleneck": partial(resnet, Bottleneck),
    "efficientnet lite": lite,
    "vgg": vgg,
    "vgg without norms": partial(vgg, None),
    "convnext": convnext,
    "convnext conv_mlp": partial(convnext, conv_mlp=True),
    "fasternet": fasternet,
}
DEEP: dict[str, Any] = {"layers": (2, 2, 1, 2), "channels": (8, 8, 16, 16)}
BLOCKS: dict[str, Callable[[], Any]] = {
    "cifar resnet": lambda: noisy(timm.create_model("acmize_resnet20_cifar")),
    "resnet basic": partial(resnet, BasicBlock, **DEEP),
    "resnet bottleneck": partial(resnet, Bottleneck, **DEEP),
    "resnet se": partial(resnet, BasicBlock, **DEEP, block_args={"attn_layer": "se"}),
    "regnet": regnet,
    "regnet preactivation": partial(regnet, preact=True),
    "regnet silu": partial(regnet, act_layer="silu"),
    "convnext": convnext,
    "convnext conv_mlp": partial(convnext, conv_mlp=True),
}
PARTIAL: dict[str, Callable[[], Any]] = {
    "fasternet": fasternet,
    "fasternet, slicing": partial(fasternet, pconv_fw_type="slicing"),
    "tiny model": lambda: noisy(timm.create_model("acmize_fasternet_tiny_cifar")),
}


def images(count: int = 4, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
