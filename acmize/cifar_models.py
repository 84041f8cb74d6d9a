"""The models for 32x32 images that timm lacks: importing this module registers them with timm.

    acmize_resnet20_cifar, ..32, ..44, ..56   ResNet of three stages, option-A shortcuts (arXiv 1512.03385, sect. 4.2)
    acmize_resnet18_cifar                     ResNet-18 with a 3x3 stem of stride 1 and no pooling before the stages
    acmize_vgg11_cifar                        VGG-11 with BatchNorm and one linear classifier
    acmize_fasternet_tiny_cifar               the TinyModel of Ada-PConv: FasterNet blocks at widths 64, 128, 256

They are built of timm's own blocks, so what converts those converts these. No weights come with the package:
`pretrained_cfg_overlay={"file": ...}`, or `--weights` on the command line.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.fasternet import MLPBlock
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _cfg(first_conv: str, classifier: str) -> PretrainedCfg:
    return PretrainedCfg(
        input_size=(3, 32, 32), fixed_input_size=False, crop_pct=1.0, interpolation="bilinear", mean=MEAN, std=STD,
        num_classes=10, pool_size=(8, 8), first_conv=first_conv, classifier=classifier,
    )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        **{f"acmize_resnet{depth}_cifar": _cfg("conv1", "linear") for depth in (20, 32, 44, 56)},
        "acmize_resnet18_cifar": _cfg("conv1", "fc"),
        "acmize_vgg11_cifar": _cfg("features.0", "head"),
        "acmize_fasternet_tiny_cifar": _cfg("stem.0", "head"),
    }
)


class PadShortcut(nn.Module):
    """Option A: every second row and column, and zero channels on both sides up to the new width."""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.pad = (out_chs - in_chs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, H, W) -> (B, C + 2 pad, H / 2, W / 2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class _Classifier(nn.Module):
    """What timm expects of a model: features, head, and a classifier that can be replaced."""

    num_classes: int
    num_features: int
    classifier_name: str

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """A new last layer for `num_classes`."""
        if global_pool != "avg":
            raise ValueError(f"global_pool: found {global_pool!r}, expected 'avg'")
        self.num_classes = num_classes
        setattr(self, self.classifier_name, nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity())

    def forward_features(self, x: Tensor) -> Tensor:
        """X (B, 3, H, W) -> (B, C, h, w)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """X (B, C, h, w) -> logits (B, classes), or pooled features."""
        x = x.mean((2, 3))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, 3, H, W) -> logits (B, classes)."""
        return self.forward_head(self.forward_features(x))


class CifarResNet(_Classifier):
    """ResNet for 32x32: widths 16, 32, 64; `blocks` in each stage, depth 6 x blocks + 2."""

    classifier_name = "linear"

    def __init__(self, blocks: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_chs: int, out_chs: int, blocks: int) -> nn.Sequential:
        down = PadShortcut(in_chs, out_chs) if in_chs != out_chs else None
        first = BasicBlock(in_chs, out_chs, stride=1 if down is None else 2, downsample=down)
        return nn.Sequential(first, *(BasicBlock(out_chs, out_chs) for _ in range(blocks - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """X (B, 3, H, W) -> (B, 64, H / 4, W / 4)."""
        return self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))


class CifarVgg(_Classifier):
    """VGG-11 with BatchNorm for 32x32; `features` is a sequence of convolution, norm, activation and pooling."""

    classifier_name = "head"
    widths = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in self.widths:
            if isinstance(width, int):
                layers += [nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
                in_chans = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.num_classes, self.num_features = num_classes, in_chans
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(in_chans, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """X (B, 3, H, W) -> (B, 512, H / 32, W / 32)."""
        return self.features(x)


class CifarFasterNet(_Classifier):
    """TinyModel: 3x3 stem to 64, three stages of two FasterNet blocks at 64, 128, 256, 3x3 convolutions between them.

    154.3 M MACs at 32x32, as published. What is published leaves open, and is chosen here: ReLU, MLP ratio 2.
    """

    classifier_name = "head"

    def __init__(self, num_classes: int = 10, in_chans: int = 3, n_div: int = 4) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 256
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        stages: list[nn.Module] = []
        for width in (64, 128, 256):
            if width > 64:
                down = nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False)
                stages.append(nn.Sequential(down, nn.BatchNorm2d(width)))
            block: dict[str, Any] = {"n_div": n_div, "mlp_ratio": 2.0, "drop_path": 0.0, "layer_scale_init_value": 0}
            stages += [MLPBlock(width, **block, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d) for _ in range(2)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(256, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """X (B, 3, H, W) -> (B, 256, H / 4, W / 4)."""
        return self.stages(self.stem(x))


class CifarResNet18(ResNet):
    """ResNet-18 for 32x32: a 3x3 stem of stride 1, no pooling before the stages."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        block: Any = BasicBlock
        super().__init__(block, (2, 2, 2, 2), num_classes=num_classes, in_chans=in_chans)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()


def _resnet(depth: int, pretrained: bool, kwargs: dict[str, Any]) -> CifarResNet:
    name = f"acmize_resnet{depth}_cifar"
    return build_model_with_cfg(CifarResNet, name, pretrained, blocks=(depth - 2) // 6, **kwargs)


@register_model
def acmize_resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20: 0.27 M parameters, 40.6 M MACs."""
    return _resnet(20, pretrained, kwargs)


@register_model
def acmize_resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32."""
    return _resnet(32, pretrained, kwargs)


@register_model
def acmize_resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44."""
    return _resnet(44, pretrained, kwargs)


@register_model
def acmize_resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56."""
    return _resnet(56, pretrained, kwargs)


@register_model
def acmize_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet18:
    """ResNet-18 for 32x32: 11.2 M parameters, 555 M MACs."""
    return build_model_with_cfg(CifarResNet18, "acmize_resnet18_cifar", pretrained, **kwargs)


@register_model
def acmize_vgg11_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-11 with BatchNorm for 32x32: 9.2 M parameters, 153 M MACs."""
    return build_model_with_cfg(CifarVgg, "acmize_vgg11_cifar", pretrained, **kwargs)


@register_model
def acmize_fasternet_tiny_cifar(pretrained: bool = False, **kwargs: Any) -> CifarFasterNet:
    """TinyModel of Ada-PConv with static quarters: 154.3 M MACs."""
    return build_model_with_cfg(CifarFasterNet, "acmize_fasternet_tiny_cifar", pretrained, **kwargs)
