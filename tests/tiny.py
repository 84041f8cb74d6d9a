"""Tiny models and a one-call conversion, shared by the tests of the core."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, LayerNorm, SwiGLU
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from acmize import AcmConfig, Plan
from acmize.gates import Gate
from acmize.hosts import make_plan
from acmize.init import collect_moments, init_
from acmize.insert import convert_

CONFIG = AcmConfig(num_learners=4, gate_hidden=2)
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def noisy(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Every parameter random, biases and scales included, so that nothing is exact only because it is zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, std)
    return model.eval()


def vit(**kwargs: Any) -> nn.Module:
    return noisy(VisionTransformer(**{**SIZES, **kwargs}))


def eva(**kwargs: Any) -> nn.Module:
    return noisy(Eva(**{**SIZES, **kwargs}))


def eva02(**kwargs: Any) -> nn.Module:
    """EVA02: unfused q, k, v, rotary positions, SwiGLU with a norm inside."""
    return eva(qkv_fused=False, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, **kwargs)


HOSTS: dict[str, Any] = {
    "vit": vit,
    "vit without biases": partial(vit, qkv_bias=False, proj_bias=False),
    "deit distilled": lambda: noisy(VisionTransformerDistilled(**SIZES)),
    "deit3": partial(vit, no_embed_class=True, init_values=0.5),
    "dinov2 with registers": partial(vit, reg_tokens=4, no_embed_class=True, init_values=0.5),
    "qk-norm": partial(vit, qk_norm=True),
    "swiglu": partial(vit, mlp_layer=SwiGLU, act_layer=nn.SiLU),
    "swiglu packed": partial(
        vit, mlp_layer=partial(GluMlp, gate_last=False), act_layer=nn.SiLU, reg_tokens=2, no_embed_class=True
    ),
    "glu": partial(vit, mlp_layer=GluMlp, act_layer=nn.Sigmoid),
    "eva fused": partial(eva, qkv_bias=False, use_rot_pos_emb=True),
    "eva fused with bias": partial(eva, use_rot_pos_emb=True),
    "eva unfused": partial(eva, qkv_fused=False, use_rot_pos_emb=True),
    "eva rope attention": partial(eva, attn_type="rope", use_rot_pos_emb=True, swiglu_mlp=True),
    "eva02": eva02,
    "beit": lambda: noisy(Beit(**SIZES, use_rel_pos_bias=True, init_values=0.1)),
    "swin": lambda: noisy(
        SwinTransformer(
            img_size=16, patch_size=2, embed_dim=16, depths=(1, 2), num_heads=(2, 2), window_size=4, num_classes=5
        )
    ),
    "convnext": lambda: noisy(ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 16, 24, 24), num_classes=5, ls_init_value=0.5)),
    "convnext conv_mlp": lambda: noisy(
        ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 16, 24, 24), num_classes=5, conv_mlp=True, ls_init_value=0.5)
    ),
}


class SelfAttention(nn.Module):
    """A user's own attention with separate projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A user's own post-norm block; its MLP is no module of its own."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.fc2(nn.functional.gelu(self.fc1(x))))


class Mine(nn.Module):
    """A transformer that no library knows; its input is (B, T, 8)."""

    def __init__(self, dim: int = 32, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, dim), nn.Linear(dim, 5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def images(count: int = 4, seed: int = 0, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def inputs_for(model: nn.Module, count: int = 4, seed: int = 0) -> Tensor:
    if isinstance(model, Mine):
        return torch.randn(count, 10, 8, generator=torch.Generator().manual_seed(seed))
    return images(count, seed, 64 if isinstance(model, ConvNeXt) else 16)


def plan_of(model: nn.Module, config: AcmConfig = CONFIG, **kwargs: Any) -> Plan:
    return make_plan(model, config, example=(inputs_for(model, 1),), **kwargs)


def adapted(dense: nn.Module, config: AcmConfig = CONFIG, **kwargs: Any) -> tuple[nn.Module, Plan]:
    """A converted copy with learners from the dense weights, and its plan."""
    plan = plan_of(dense, config, **kwargs)
    model = convert_(copy.deepcopy(dense), plan)
    init_(model, dense, plan, collect_moments(dense, plan, [inputs_for(dense, 16, seed=1)]))
    return model, plan


def half_width(gate: Gate, x: Tensor) -> Tensor:
    """A `Choose`: every token runs half of the learners."""
    return torch.full((*x.shape[:-1], gate.groups), gate.num_learners // 2)


class Random:
    """A `Choose`: random choices from a seed, the same in the same order of calls."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, gate: Gate, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], gate.groups)
        return torch.randint(gate.min_choice, gate.num_learners + 1, shape, generator=self.generator)
