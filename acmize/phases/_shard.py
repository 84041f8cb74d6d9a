"""Weights, gradients and optimizer states of a training divided among processes: FSDP2 (`fully_shard`).

accelerate's own FSDP is for accelerators alone (on CPUs `AcceleratorState` passes over it without a word) and keeps the
model wrapped for good. torch's function is used here, on the device that the model is on, and undone afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from acmize import parallel
from acmize.recording import AdaptiveModule

PARTS = ("forward_features", "forward_head")  # a model may be run by these, in place of its forward


@contextmanager
def sharded(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, a twin of the model whose parameters are divided; then the model has the twin's.

    Meanwhile the model itself holds no weights. An error inside leaves it so: other processes may be gone, and what
    they hold with them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    mesh = init_device_mesh(next(model.parameters()).device.type, (parallel.processes(),))
    dense: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, p in module._parameters.items():
            if p is not None and not p.is_contiguous():  # FSDP2 takes no others
                made = nn.Parameter(p.detach().contiguous(), requires_grad=p.requires_grad)
                module._parameters[name] = dense.setdefault(id(p), made)
    for block in _blocks(twin):
        fully_shard(block, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    for part in PARTS:
        if hasattr(twin, part):
            register_fsdp_forward_method(twin, part)
    layouts = {name: (p.size(), p.stride()) for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.new_empty(0)
    yield twin
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in twin.named_parameters():
            whole: Any = p
            own[name].data = torch.empty_strided(*layouts[name], dtype=p.dtype, device=p.device)
            own[name].copy_(whole.full_tensor())


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Members of the innermost lists of layers that have adaptive modules inside."""

    def members(module: nn.Module) -> list[nn.Module]:
        return [c for c in module.children() if any(isinstance(m, AdaptiveModule) for m in c.modules())]

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and members(m)]
    inner = [m for m in lists if not any(other is not m and other in lists for other in m.modules())]
    return [member for each in inner for member in members(each)]
