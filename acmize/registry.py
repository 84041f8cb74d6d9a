"""From the class of a config to the method that reads it: one decorator, no method known by name elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import nn


class Method(Protocol):
    """What a file in `methods/` registers.

    `plan` says what it would do with one site (or raises `Refused`); `build` makes the adaptive module for planned
    entries, with parameters that still have to be initialised.
    """

    name: str

    def plan(self, site: Any, modules: dict[str, nn.Module], config: Any, keep: Any) -> list[dict[str, Any]]:
        """Entries (keyword arguments of `PlanEntry`) for a site, or raise `Refused`; `keep(fqn, target)` asks."""
        ...

    def build(
        self, modules: dict[str, nn.Module], entries: list[Any], config: Any, macs_total: int
    ) -> dict[str, nn.Module]:
        """Adaptive modules for entries that share a gate, by the path of what they replace."""
        ...


class Refused(Exception):
    """A site that a method cannot convert soundly; the message is the reason shown in the plan."""


_METHODS: dict[type, Method] = {}
_T = TypeVar("_T", bound=type)


def register(config_class: type):
    """Class decorator: instances of `config_class` are handled by one instance of the decorated method."""

    def decorate(method_class: _T) -> _T:
        _METHODS[config_class] = method_class()
        return method_class

    return decorate


def method_for(config: Any) -> Method:
    """The method registered for this config's class."""
    try:
        return _METHODS[type(config)]
    except KeyError:
        known = ", ".join(sorted(c.__name__ for c in _METHODS))
        raise ValueError(f"config: found {type(config).__name__}, expected one of: {known}") from None


def config_class(name: str) -> type:
    """The config class of the method called `name` (as stored in plan.json)."""
    for cls, method in _METHODS.items():
        if method.name == name:
            return cls
    raise ValueError(f"method: found {name!r}, expected one of: {', '.join(sorted(m.name for m in _METHODS.values()))}")
