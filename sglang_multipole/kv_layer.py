"""A layer of the model as clustering, decode and audit see it."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class KVLayer:
    """One layer's part of the KV pool and its rotary table.

    key_buffer, value_buffer: [num_slots, H, D]. cos, sin: [max_position, rotary_dim / 2] float32,
    None for a layer without rotary positions.
    """

    key_buffer: torch.Tensor
    value_buffer: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
