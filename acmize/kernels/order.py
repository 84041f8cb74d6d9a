"""Tokens in the order the kernels want them, found on the device.

Shapes: M tokens, N learners.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class DeviceOrder(NamedTuple):
    """Tokens by falling choice, all int32 (M,) on the device of the choice.

    `index` into the tokens, `widths` the units of a head each sorted token runs, `choice` in the tokens' own order.
    `units` is the widest width there could be.
    """

    index: Tensor
    widths: Tensor
    choice: Tensor
    units: int


def order_on_device(choice_M: Tensor, bounds: Sequence[int]) -> DeviceOrder:
    """Sort tokens by falling choice; nothing is read back to the host, so a GPU never waits.

    Args:
        choice_M: (M,) learners each token runs, whole numbers in 0..N.
        bounds: cumulative widths (0, ..., U), N + 1 of them.

    Returns:
        The order, to be shared by every kernel that cuts by this choice.
    """
    # 16 bits: a radix sort passes over the keys twice, not eight times.
    keys, index = choice_M.to(torch.int16).sort(descending=True, stable=True)
    widths = _on_device(tuple(bounds), choice_M.device).index_select(0, keys.int())
    return DeviceOrder(index.int(), widths, choice_M.int(), bounds[-1])


def tokens_of_unit(order: DeviceOrder) -> Tensor:
    """(U,) int32: how many tokens run each unit of a head; they are the first ones of the order."""
    units = torch.arange(order.units, dtype=torch.int32, device=order.widths.device)
    return torch.searchsorted(-order.widths, -units, out_int32=True)


@lru_cache(maxsize=256)
def _on_device(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    # Made once: a copy from the host would make the device wait. Not an inference tensor: autograd may meet it later.
    with torch.inference_mode(False):
        return torch.tensor(bounds, dtype=torch.int32, device=device)
