"""Rotary positions: the model's own table, and turning vectors with it and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from multipole_kernels.reference import unrotate


@dataclass(frozen=True)
class RopeTable:
    """cos, sin [max_len, rotary_dim / 2] float32, scaled as the model scales them."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of_model(cls, model: torch.nn.Module, max_len: int) -> RopeTable:
        """The table of any model with a `rotary_emb` that returns duplicated halves."""
        positions = torch.arange(max_len, device=model.device)[None]
        probe = torch.zeros(1, 1, 1, device=model.device)
        cos, sin = model.get_decoder().rotary_emb(probe, positions)
        half = cos.shape[-1] // 2
        return cls(cos[0, :, :half].float(), sin[0, :, :half].float())

    def rotate(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """vectors [*, T, head_dim] turned to positions [T]."""
        cos, sin = self.cos[positions], self.sin[positions]
        half = cos.shape[-1]
        x, y, rest = vectors[..., :half], vectors[..., half : 2 * half], vectors[..., 2 * half :]
        return torch.cat([x * cos - y * sin, y * cos + x * sin, rest], dim=-1)

    def unrotate(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """vectors [*, T, head_dim], which lie at positions [T], turned back to position 0."""
        return unrotate(vectors, self.cos[positions], self.sin[positions])
