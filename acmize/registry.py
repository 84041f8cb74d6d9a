"""From the class of a config to the method that reads it: one decorator, no method known by name elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

Keep = Callable[[str, str], bool]


class Method:
    """What a file in `methods/` registers.

    Attributes:
        name: in plan.json, recipes and on the command line.
        kinds: kinds of `Site` it can convert.
        gates: each value of its config's `gate` -> the gate labels it can be fitted on, the usual ones first.
        defaults: options of a recipe that suit it, under what the user gives.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    gates: ClassVar[Mapping[str, tuple[str, ...]]] = {"damage": ("damage",)}
    defaults: ClassVar[Mapping[str, Any]] = {}

    def plan(self, site: Any, modules: dict[str, nn.Module], config: Any, keep: Keep, work: Any) -> list[dict]:
        """Entries (keyword arguments of `PlanEntry`) for a site, or raise `Refused`.

        `keep(fqn, target)` asks whether an entry is wanted; `work` (a `cost.Work`) has what one sample costs at every
        module. An entry without `tokens` and `macs` is one of linear layers, for which `hosts.make_plan` counts them.
        """
        raise NotImplementedError

    def build(
        self, modules: dict[str, nn.Module], entries: list[Any], config: Any, macs_total: int
    ) -> dict[str, nn.Module]:
        """Adaptive modules for entries that share a gate, by the path of what they replace.

        A module may be built around the layers that it replaces: they carry their weights with them.
        """
        raise NotImplementedError

    def moments(self, entry: Any) -> dict[str, tuple[str, int]]:
        """Layers whose second moments `fill` needs: path -> ("input" or "output", heads); see `init`."""
        return {}

    def fill(
        self, adaptive: dict[str, Any], dense: dict[str, Any], entries: list[Any], moments: dict[str, Tensor]
    ) -> None:
        """Weights of the built modules from those of the dense model; nothing where they are carried along."""

    def narrow(self, module: Any, entry: Any, choice: int) -> Any | None:
        """Remove the learners beyond `choice` from a built module for good, and return its new entry.

        None, with nothing changed, where this method removes none.
        """
        return None


class Refused(Exception):
    """A site that a method cannot convert soundly; the message is the reason shown in the plan."""


_METHODS: dict[type, Method] = {}
_T = TypeVar("_T", bound=type[Method])


def register(config_class: type):
    """Class decorator: instances of `config_class` are handled by one instance of the decorated method."""

    def decorate(method_class: _T) -> _T:
        made: Any = method_class()
        _METHODS[config_class] = made
        return method_class

    return decorate


def method_for(config: Any) -> Method:
    """The method registered for this config's class."""
    try:
        return _METHODS[type(config)]
    except KeyError:
        known = ", ".join(sorted(c.__name__ for c in _METHODS))
        raise ValueError(f"config: found {type(config).__name__}, expected one of: {known}") from None


def methods() -> dict[str, tuple[Method, type]]:
    """Name -> method and the class of its config, in the order of registration."""
    return {method.name: (method, cls) for cls, method in _METHODS.items()}


def config_class(name: str) -> type:
    """The config class of the method called `name` (as stored in plan.json)."""
    try:
        return methods()[name][1]
    except KeyError:
        raise ValueError(f"method: found {name!r}, expected one of: {', '.join(sorted(methods()))}") from None
