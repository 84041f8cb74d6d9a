"""What a convolution of a model can take in, seen by `torch.fx`: norms, sums and activations that alone read it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath
from torch import fx, nn

from acmize.convs import ACTIVATIONS, Geometry, Tail
from acmize.recording import AdaptiveModule

_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)  # in eval mode
_ADDS = (operator.add, operator.iadd, torch.add)
Modules = Mapping[str, Any]


class _Proxy(fx.Proxy):
    """Writing `x += y` is seen as such: by itself fx takes it for `x = x + y`, which other names of x do not see."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class Tracer(fx.Tracer):
    """Follows containers, calls everything else (adaptive modules, `leaves`), and notes the containers' classes."""

    def __init__(self, *leaves: type) -> None:
        super().__init__()
        self.leaves = leaves
        self.containers: dict[str, type] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """One that sees in-place operators."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is called as it is."""
        own = isinstance(m, (AdaptiveModule, *_NORMS, *self.leaves)) or next(m.children(), None) is None
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Note a container on the way."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self.containers[path] = type(m)
        return super().call_module(m, forward, args, kwargs)


@dataclass(frozen=True, eq=False)
class Chain:
    """A convolution, what it takes in, and the nodes of all of it, in order."""

    conv: Any
    tail: Tail
    residual: fx.Node | None
    nodes: tuple[fx.Node, ...]


def chains_of(graph: fx.Graph, modules: Modules) -> list[Chain]:
    """All chains of a graph, none of which shares a node with another; `modules` by path."""
    found: list[Chain] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            chain = _chain_from(node, modules, taken)
            if chain is not None:
                found.append(chain)
                taken.update(chain.nodes)
    return found


def _chain_from(first: fx.Node, modules: Modules, taken: set[fx.Node]) -> Chain | None:
    conv: Any = modules[str(first.target)]
    plain = type(conv) in (nn.Conv2d, Conv2dSame) and Geometry.of(conv) is not None
    (value,) = first.args
    # the convolution will run where its chain ends: nothing may write to what it reads before
    written = isinstance(value, fx.Node) and any(u is not first and _writes(u, value, modules) for u in value.users)
    if not (plain or getattr(conv, "takes_tail", False)) or written:
        return None
    nodes, norm, act, residual = [first], None, None, None
    while act is None and len(nodes[-1].users) == 1:
        (after,) = nodes[-1].users
        module = modules[str(after.target)] if after.op == "call_module" and len(after.args) == 1 else None
        if after in taken:
            break
        if _is_norm(module) and norm is None and residual is None:
            norm, act = module, getattr(module, "act", None)
            act = None if isinstance(act, nn.Identity) else act
        elif type(module) in ACTIVATIONS:
            act = module
        elif residual is None and (other := _other(after, nodes[-1])) is not None:
            residual = other
        elif type(module) not in _NOTHING:
            break
        nodes.append(after)
    return Chain(conv, Tail(norm, act), residual, tuple(nodes))


def _is_norm(module: Any) -> bool:
    """Whether a module is a BatchNorm with statistics and, behind it, an activation at most."""
    return (
        type(module) in _NORMS
        and module.running_mean is not None
        and isinstance(getattr(module, "drop", None), nn.Identity | None)
    )


def _other(node: fx.Node, mine: fx.Node) -> fx.Node | None:
    """What is added to `mine` by a node, or None if it adds nothing to it, or writes to what somebody else reads."""
    if (
        node.target not in _ADDS
        or len(node.args) != 2
        or node.kwargs
        or not all(isinstance(a, fx.Node) for a in node.args)
    ):
        return None
    a, b = node.args
    if a is b or (node.target is operator.iadd and a is not mine):
        return None
    return b if a is mine else a  # pyright: ignore[reportReturnType]


def _writes(node: fx.Node, value: fx.Node, modules: Modules) -> bool:
    """Whether a node writes to a value that it is given."""
    if not node.args or node.args[0] is not value:
        return False
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "inplace", False)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name.endswith("_") or name in ("iadd", "imul") or bool(node.kwargs.get("inplace"))
