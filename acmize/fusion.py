"""`fuse_`: a CNN's convolutions take in what follows them at inference on a CPU; nothing else about it changes.

`torch.fx` sees how the modules of a model call each other: which norm and activation read a convolution's output and
nothing else does, where a shortcut is added. Such a chain becomes one call of oneDNN (`convs.py`). A model whose
`forward` cannot be traced is left as it is and its children are tried; adaptive modules, which decide from data, are
called as they are, and what stands inside them is traced by itself.

It is a way to run, like a backend of `ops`: modules, parameters, paths and state dictionary are as before. The plain
`forward` runs wherever a fused one could be wrong: with gradients, in training mode, under autocast, compiled or
exported, on other devices and dtypes, with hooks on what would be passed over, after a module was replaced, and inside
`use_backend("masked")`. Parameters may change: what was made of them is made again.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath
from torch import Tensor, fx, nn

from acmize.convs import ACTIVATIONS, FusedConv, Geometry, Tail, folded, scale_and_shift, usable
from acmize.cost import evaluating
from acmize.gates import AdaptiveModule
from acmize.kept import Kept
from acmize.samples import ROWS, joined, samples_in_cache

_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)  # in eval mode
_ADDS = (operator.add, operator.iadd, torch.add)
_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
Modules = Mapping[str, Any]


class Fused:
    """Mixed into the class of a module that has a fused way to run, kept in `_fused`."""

    _fused: _Fusion


def fuse_(model: nn.Module) -> nn.Module:
    """Let a model's convolutions take in norms, sums and activations behind them, in place; see the module's docstring.

    Returns:
        The same model, still an instance of its class.
    """
    if isinstance(model, Fused) or not any(isinstance(m, _NORMS) for m in model.modules()):
        return model
    fusion = None if isinstance(model, AdaptiveModule) else _Fusion.of(model)
    if fusion is None:
        for child in model.children():
            fuse_(child)
        return model
    for module in list(model.modules()):
        if isinstance(module, AdaptiveModule):
            for child in module.children():
                fuse_(child)
    cls, owner = type(model), cast(Any, model)
    owner.__class__ = type(cls.__name__, (Fused, cls), {"__module__": cls.__module__, "forward": _forward(cls)})
    owner._fused = fusion
    return model


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    @wraps(cls.forward)  # with its signature, which exporters read
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and usable(args[0]):
            program = self._fused.program(self)
            if program is not None:
                return self._fused.run(program, args[0])
        return cls.forward(self, *args, **kwargs)

    return forward


# --- finding what can be fused --------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Writing `x += y` is seen as such: by itself fx takes it for `x = x + y`, which other names of x do not see."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class _Tracer(fx.Tracer):
    """Follows containers, calls everything else, and notes the containers' classes."""

    def __init__(self) -> None:
        super().__init__()
        self.containers: dict[str, type] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (AdaptiveModule, Fused, *_NORMS)) or next(m.children(), None) is None
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self.containers[path] = type(m)
        return super().call_module(m, forward, args, kwargs)


@dataclass(frozen=True, eq=False)
class _Chain:
    """A convolution and what it takes in: the first and last node, and those that are passed over."""

    conv: Any
    tail: Tail
    residual: fx.Node | None
    nodes: tuple[fx.Node, ...]


def _chains(graph: fx.Graph, modules: Modules) -> list[_Chain]:
    found: list[_Chain] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            chain = _chain_from(node, modules, taken)
            if chain is not None:
                found.append(chain)
                taken.update(chain.nodes)
    return found


def _chain_from(first: fx.Node, modules: Modules, taken: set[fx.Node]) -> _Chain | None:
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
    return _Chain(conv, Tail(norm, act), residual, tuple(nodes))


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


# --- running it -----------------------------------------------------------------------------------------------


class _Fusion:
    """How the modules inside one call each other, and the fused program made of it.

    Copies share the former, which holds paths and no modules, and make a program of their own.
    """

    def __init__(self, graph: fx.Graph, containers: dict[str, type]) -> None:
        self.graph, self.containers = graph, containers
        self.places: list[tuple[dict[str, Any], str, Any]] | None = None  # every module it was made of
        self.passed_over: list[nn.Module] = []
        self.hooks: list[Any] = []
        self.chains: list[_Chain] = []
        self.adaptive: list[AdaptiveModule] = []
        self.convs: list[FusedConv] = []
        self.sizes: dict[Any, int] = {}  # samples at once, by the shape of one
        self.kept: Kept[Any] = Kept()

    @staticmethod
    def of(model: nn.Module) -> _Fusion | None:
        """That of a model; None if it cannot be traced or has no convolution that can take in anything."""
        tracer = _Tracer()
        try:
            with evaluating(model):
                graph = tracer.trace(model)
        except Exception:  # any kind: it runs the model's own code on proxies
            return None
        kinds = [node.op for node in graph.nodes]
        if kinds.count("placeholder") != 1 or "get_attr" in kinds:
            return None
        tied = any(len(c.nodes) > 1 for c in _chains(graph, dict(model.named_modules())))
        return _Fusion(graph, tracer.containers) if tied else None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Fusion:
        return memo.setdefault(id(self), _Fusion(self.graph, self.containers))

    def program(self, owner: nn.Module) -> Callable[[Any], Any] | None:
        """The fused program for the modules as they are, or None where it would not do what they do."""
        if self.places is None or any(table.get(name) is not module for table, name, module in self.places):
            self._bind(owner)
        if not self.chains or owner.training or any(self.hooks) or any(m.training for m in self.passed_over):
            return None
        return self.kept.get(lambda: self.passed_over, self._made)

    def run(self, program: Callable[[Tensor], Any], x: Tensor) -> Any:
        """The program on x (B, C, H, W), on no more samples at once than caches hold, where none is to see the rest."""
        if x.size(0) <= ROWS or any(_watched(m) for m in self.adaptive):
            return program(x)
        size = self.sizes.get(x.shape[1:]) or self._measure(program, x)
        return program(x) if len(x) <= size else joined([program(part) for part in x.split(size)])

    def _measure(self, program: Callable[[Tensor], Any], x: Tensor) -> int:
        """Samples that are run at once, by the largest tensor that one sample makes."""
        y = program(x[:1])
        single = isinstance(y, Tensor) and len(y) == 1  # else its parts could not be joined
        numbers = max(out.numel() for conv in self.convs for _, _, out in conv.ordered.values()) if self.convs else 1
        self.sizes[x.shape[1:]] = size = samples_in_cache(numbers * x.element_size()) if single else sys.maxsize
        return size

    def _bind(self, owner: nn.Module) -> None:
        """Look the modules up; without chains if a container is no longer of the class that was traced."""
        self.kept, self.adaptive = Kept(), [m for m in owner.modules() if isinstance(m, AdaptiveModule)]
        self.modules = dict(owner.named_modules(remove_duplicate=False))
        leaves = {str(n.target) for n in self.graph.nodes if n.op == "call_module"}
        paths = [*self.containers, *leaves]
        alike = all(type(self.modules.get(path)) is kind for path, kind in self.containers.items())
        self.chains = _chains(self.graph, self.modules) if alike and leaves <= self.modules.keys() else []
        self.passed_over = [self.modules[str(n.target)] for c in self.chains for n in c.nodes if n.op == "call_module"]
        self.passed_over = [m for m in self.passed_over if not isinstance(m, AdaptiveModule)]
        inside = [self.modules[path] for path in self.containers if path in self.modules]
        self.hooks = [h for m in (*self.passed_over, *inside) for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += _GLOBAL_HOOKS
        self.places = [_place(self.modules, path) for path in paths if path in self.modules]

    def _made(self) -> Callable[[Any], Any]:
        """The program: one call for each chain, the other modules and functions as they were."""
        ends = {chain.nodes[-1]: chain for chain in self.chains}
        inside = {node for chain in self.chains for node in chain.nodes[:-1]}
        made, env, self.convs, self.sizes = fx.Graph(), {}, [], {}
        for number, node in enumerate(self.graph.nodes):
            chain = ends.get(node)
            if chain is not None:
                read = [chain.nodes[0].args[0], *([] if chain.residual is None else [chain.residual])]
                env[node] = made.call_function(_named(self._call(chain), number), tuple(env[n] for n in read))
            elif node in inside:
                continue
            elif node.op == "call_module":
                module, copy = self.modules[str(node.target)], env.__getitem__
                if isinstance(module, nn.Identity):
                    env[node] = env[node.args[0]]
                    continue
                args, kwargs = fx.map_arg(node.args, copy), fx.map_arg(node.kwargs, copy)
                env[node] = made.call_function(_named(module, number), args, kwargs)
            else:
                env[node] = made.node_copy(node, env.__getitem__)
                if node.op == "placeholder":
                    env[node] = made.call_function(channels_last, (env[node],))
                elif node.target == "view":  # which may not fit the memory of channels last
                    env[node].target = "reshape"
        return fx.GraphModule(nn.Module(), made).forward

    def _call(self, chain: _Chain) -> Callable[..., Any]:
        if isinstance(chain.conv, AdaptiveModule):
            tail = replace(chain.tail)  # another one: what was made for the last is of norms as they were
            return lambda x, residual=None: chain.conv(x, residual, tail)
        weight, bias = folded(chain.conv.weight, chain.conv.bias, *scale_and_shift(chain.tail.norm))
        geometry = Geometry.of(chain.conv)
        assert geometry is not None, "chains begin with convolutions that have one"
        self.convs.append(FusedConv(weight, bias, geometry, chain.tail.act))
        return self.convs[-1].__call__


def _watched(module: AdaptiveModule) -> bool:
    """Whether somebody follows what samples of a whole batch choose, or chooses for them."""
    gate = module.gate
    return module.recorder is not None or gate.choose is not None or gate.probe


def _named(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A function under a name of its own, by which generated code finds it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    run.__name__ = run.__qualname__ = f"step_{number}"
    return run


def channels_last(x: Any) -> Any:
    """The same images, channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def _place(modules: Modules, path: str) -> tuple[dict[str, Any], str, Any]:
    parent, _, name = path.rpartition(".")
    return modules[parent]._modules, name, modules[path]
