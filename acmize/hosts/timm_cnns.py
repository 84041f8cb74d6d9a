"""Residual blocks, chains of convolutions and partial convolutions of timm's CNNs, by exact class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from acmize.hosts._registry import Found, handles, plain
from acmize.plan import Refusal, Site

_CUTTABLE = (nn.Conv2d, nn.Linear)  # layers of a chain whose channels can be cut

# --- residual blocks of CNNs ----------------------------------------------------------------------------------


@handles("timm.models.resnet.BasicBlock", kinds=("block",))
def _basic_block(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path", "se", "bn2"), "act2", module.downsample)


@handles("timm.models.resnet.Bottleneck", kinds=("block",))
def _bottleneck(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path", "se", "bn3"), "act3", module.downsample)


@handles("timm.models.regnet.Bottleneck", kinds=("block",))
def _regnet_block(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path",), "act3", module.downsample)


@handles("timm.models.regnet.PreBottleneck", kinds=("block",))
def _regnet_preactivation_block(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path",), "norm1", module.downsample)  # its shortcut begins behind norm1


@handles("timm.models.convnext.ConvNeXtBlock", kinds=("block",))
def _convnext_block(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path",), None, module.shortcut)


def _block(fqn: str, module: Any, ends: tuple[str, ...], rest: str | None, shortcut: Any) -> Found:
    """A residual block: F(x) is the output of the last of `ends` that it has; a skipped input passes through `rest`."""
    if not plain(shortcut):
        return [Refusal(fqn=fqn, reason="its shortcut changes the shape, so it cannot be skipped")]
    branch = next(name for name in ends if getattr(module, name, None) is not None)
    return [Site.block(fqn, branch=f"{fqn}.{branch}", rest=None if rest is None else f"{fqn}.{rest}")]


# --- chains of convolutions -----------------------------------------------------------------------------------


@handles("timm.models.resnet.BasicBlock", kinds=("channels",))
def _basic_channels(fqn: str, module: Any) -> Found:
    return _chain(fqn, module, ("conv1", "bn1", "drop_block", "act1", "aa", "conv2"))


@handles("timm.models.resnet.Bottleneck", kinds=("channels",))
def _bottleneck_channels(fqn: str, module: Any) -> Found:
    names = ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3")
    return _chain(fqn, module, names)


@handles("timm.models._efficientnet_blocks.InvertedResidual", kinds=("channels",))
def _inverted_channels(fqn: str, module: Any) -> Found:
    names = ("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl")
    return _chain(fqn, module, names, residual=module.has_skip)


@handles("timm.models._efficientnet_blocks.EdgeResidual", kinds=("channels",))
def _edge_channels(fqn: str, module: Any) -> Found:
    return _chain(fqn, module, ("conv_exp", "bn1", "aa", "se", "conv_pwl"), residual=module.has_skip)


@handles("timm.layers.Mlp", "timm.layers.ConvMlp", kinds=("channels",))
def _mlp_channels(fqn: str, module: Any) -> Found:
    names = ("fc1", "norm", "act", "drop", "fc2") if hasattr(module, "drop") else ("fc1", "act", "drop1", "norm", "fc2")
    return _chain(fqn, module, names)


@handles("timm.models.fasternet.MLPBlock", kinds=("channels",))
def _fasternet_channels(fqn: str, module: Any) -> Found:
    return _chain(f"{fqn}.mlp", module.mlp, ("0", "1", "2", "3"))


@handles("timm.models.vgg.VGG", "acmize.cifar_models.CifarVgg", kinds=("channels",))
def _vgg_channels(fqn: str, module: Any) -> Found:
    """One chain a stage; a stage of one convolution is joined to the next."""
    chains: list[list[str]] = [[]]
    for name, part in module.features.named_children():
        chains[-1].append(name)
        convs = sum(isinstance(getattr(module.features, n), nn.Conv2d) for n in chains[-1])
        if isinstance(part, nn.MaxPool2d) and convs > 1:
            chains.append([])
    prefix = f"{fqn}.features" if fqn else "features"
    found: Found = []
    for names in chains:
        convs = [i for i, n in enumerate(names) if isinstance(getattr(module.features, n), nn.Conv2d)]
        if convs:
            inner = names[: convs[-1] + 1]
            found += _chain(prefix, module.features, inner, residual=False, name=f"{prefix}.{names[0]}")
    return found


def _chain(fqn: str, module: Any, names: Sequence[str], *, residual: bool = True, name: str | None = None) -> Found:
    """A chain of the children of a module, in the order in which they are called; those it lacks are passed over.

    Args:
        fqn: of the module.
        module: that has the children.
        names: of the children.
        residual: whether the output is added to something.
        name: of the site, where it is not the module's.
    """
    layers: list[str] = []
    between: list[list[str]] = [[]]
    for child in names:
        part: Any = getattr(module, child, None)
        if plain(part):
            continue
        if isinstance(part, _CUTTABLE):
            layers.append(f"{fqn}.{child}")
            between.append([])
        else:
            between[-1].append(f"{fqn}.{child}")
    return [Site.channels(name or fqn, layers, between[1:-1], residual=residual)]


# --- partial convolutions -------------------------------------------------------------------------------------


@handles("timm.models.fasternet.Partial_conv3", kinds=("partial",))
def _partial(fqn: str, module: Any) -> Found:
    return [Site.partial(fqn, f"{fqn}.partial_conv3", module.dim_conv3 + module.dim_untouched)]
