"""KV slots as the pool's tests see them: which are live, how often handed out, NaN when freed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sglang_multipole.kv_layer import KVLayer


class SlotWatch:
    """Wraps the methods of SGLang's allocator: a slot that is freed is filled with NaN.

    Attributes:
        is_live: [num_slots + 1] bool. births: [num_slots + 1], times a slot was handed out.
    """

    def __init__(self, allocator: Any, layer: KVLayer, num_slots: int):
        self.is_live = np.zeros(num_slots + 1, bool)
        self.births = np.zeros(num_slots + 1, np.int64)
        self._allocator, self._layer = allocator, layer
        self._free, self._clear, self._alloc = allocator.free, allocator.clear, allocator.alloc
        allocator.free, allocator.clear, allocator.alloc = self.free, self.clear, self.alloc

    def free(self, slots: torch.Tensor) -> None:
        index = slots.long()
        if self._allocator.is_not_in_free_group:
            assert self.is_live[index.numpy()].all(), "SGLang freed a slot twice"
            self.is_live[index.numpy()] = False
        self._layer.key_buffer[index] = torch.nan
        self._layer.value_buffer[index] = torch.nan
        self._free(slots)

    def clear(self) -> None:
        self._clear()
        self.is_live[:] = False
        self._layer.key_buffer.fill_(torch.nan)
        self._layer.value_buffer.fill_(torch.nan)

    def alloc(self, count: int) -> torch.Tensor | None:
        slots = self._alloc(count)
        if slots is not None:
            self.is_live[slots.numpy()] = True
            self.births[slots.numpy()] += 1
        return slots
