"""One batch for any model: a tensor, or keyword inputs such as those of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Inputs:
    """Keyword inputs of a batch; stands wherever a plain tensor of inputs does.

    Attributes:
        tensors: argument -> tensor, samples on the first axis.
        counts: (B, L) bool, True where an output of the model counts (a token, a frame); None: everywhere.
    """

    tensors: dict[str, Tensor]
    counts: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: slice) -> Inputs:
        return self._each(lambda tensor: tensor[index])

    @property
    def device(self) -> Any:
        """Where the batch is."""
        return next(iter(self.tensors.values())).device

    def to(self, device: Any) -> Inputs:
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def without(self, *names: str) -> Inputs:
        """The batch without some of its arguments, such as those of a decoder."""
        return Inputs({k: v for k, v in self.tensors.items() if k not in names})

    def _each(self, change: Any) -> Inputs:
        counts = None if self.counts is None else change(self.counts)
        return Inputs({k: change(v) for k, v in self.tensors.items()}, counts)


Batch = Tensor | Inputs


def forward(model: nn.Module, *inputs: Any) -> Any:
    """Run a model on a batch, or on positional inputs."""
    if len(inputs) == 1 and isinstance(inputs[0], Inputs):
        return model(**inputs[0].tensors)
    return model(*inputs)


def logits_of(output: object) -> Tensor:
    """Logits of a model's output: a tensor, or an object with `logits`."""
    return output if isinstance(output, Tensor) else output.logits  # pyright: ignore[reportAttributeAccessIssue]


def counted(logits: Tensor, batch: Batch) -> Tensor:
    """The outputs that count as rows: (B, C) as it is, (B, L, C) -> (rows, C)."""
    if logits.dim() == 2:
        return logits
    counts = batch.counts if isinstance(batch, Inputs) else None
    return logits.flatten(0, 1) if counts is None else logits[counts]
