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

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from acmize.convs import FusedConv, Geometry, folded, scale_and_shift, usable
from acmize.cost import evaluating
from acmize.kept import Kept
from acmize.recording import AdaptiveModule
from acmize.samples import ROWS, joined, samples_in_cache
from acmize.traced import Chain, Modules, Tracer, chains_of

_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


class Fused:
    """Mixed into the class of a module that has a fused way to run, kept in `_fused`."""

    _fused: _Fusion


def fuse_(model: nn.Module) -> nn.Module:
    """Let a model's convolutions take in norms, sums and activations behind them, in place; see the module's docstring.

    Returns:
        The same model, still an instance of its class.
    """
    if isinstance(model, Fused) or not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
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


# --- running it -----------------------------------------------------------------------------------------------


class _Fusion:
    """How the modules inside one call each other, and the fused program made of it.

    Copies share the former, which holds paths and no modules, and make a program of their own.
    """

    def __init__(self, graph: fx.Graph, containers: dict[str, type]) -> None:
        self.graph, self.containers = graph, containers
        self.places: list[tuple[dict[str, Any], str, Any]] | None = None  # every module it was made of
        self.modules: Modules = {}
        self.passed_over: list[nn.Module] = []
        self.hooks: list[Any] = []
        self.chains: list[Chain] = []
        self.adaptive: list[AdaptiveModule] = []
        self.convs: list[FusedConv] = []
        self.sizes: dict[Any, int] = {}  # samples at once, by the shape of one
        self.kept: Kept[Any] = Kept()

    @staticmethod
    def of(model: nn.Module) -> _Fusion | None:
        """That of a model; None if it cannot be traced or has no convolution that can take in anything."""
        tracer = Tracer(Fused)
        try:
            with evaluating(model):
                graph = tracer.trace(model)
        except Exception:  # any kind: it runs the model's own code on proxies
            return None
        kinds = [node.op for node in graph.nodes]
        if kinds.count("placeholder") != 1 or "get_attr" in kinds:
            return None
        tied = any(len(c.nodes) > 1 for c in chains_of(graph, dict(model.named_modules())))
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
        self.chains = chains_of(self.graph, self.modules) if alike and leaves <= self.modules.keys() else []
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

    def _call(self, chain: Chain) -> Callable[..., Any]:
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
