"""What is made of a module's tensors and kept until one of them changes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from torch import nn

T = TypeVar("T")
_WRITES = operator.attrgetter("_version")


class Kept(Generic[T]):
    """Something made of the tensors of modules, made again when they change; copies of a module begin without it.

    Seen: tensors that were replaced, written to, or moved with the rest of their module. Not seen: what goes through
    `.data`, and writes to tensors made in inference mode, which PyTorch does not count.
    """

    def __init__(self) -> None:
        self._state: _State | None = None
        self._value: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept[T]:
        return memo.setdefault(id(self), Kept())

    def get(self, modules: Callable[[], Iterable[nn.Module]], make: Callable[[], T]) -> T:
        """What `make` made last, or makes now; `modules` are those whose own tensors it is made of."""
        if self._state is None or not self._state.holds():
            self._value, self._state = make(), _State(modules())
        return self._value


class _State:
    """Which tensors modules have, and what was written to them; to look takes a tenth of a microsecond a tensor."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        tables = [t for m in modules for t in (m._parameters, m._buffers)]
        places = [(t, n, v) for t in tables for n, v in t.items() if v is not None and n != "num_batches_tracked"]
        self.tables, self.names, self.tensors = [list(column) for column in zip(*places, strict=True)] or ([], [], [])
        self.counted = [t for t in self.tensors if not t.is_inference()]
        self.writes = list(map(_WRITES, self.counted))
        first = {id(table): tensor for table, _, tensor in reversed(places)}
        self.first = list(first.values())  # moved, all of a table are
        self.addresses = [t.data_ptr() for t in self.first]

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return (
            all(map(operator.is_, map(dict.get, self.tables, self.names), self.tensors))
            and list(map(_WRITES, self.counted)) == self.writes
            and [t.data_ptr() for t in self.first] == self.addresses
        )
