"""Centroids as they are stored: bf16, or 8 bits with one scale a centroid."""

from __future__ import annotations

import torch

from multipole_kernels import reference

FORMATS = ("float32", "bf16", "int8", "fp8")
# bytes of a scale of an 8-bit centroid
SCALE_BYTES = 4


def stored(centroids: torch.Tensor, number_format: str) -> torch.Tensor:
    """centroids [*, D] after a round trip through their storage format."""
    if number_format == "float32":
        return centroids
    if number_format == "bf16":
        return centroids.bfloat16().float()
    dtype = torch.int8 if number_format == "int8" else torch.float8_e4m3fn
    return reference.dequantize_centroids(*reference.quantize_centroids(centroids, dtype))


def centroid_bytes(head_dim: int, number_format: str) -> int:
    """One centroid of head_dim numbers, its scale included."""
    if number_format in ("int8", "fp8"):
        return head_dim + SCALE_BYTES
    return 2 * head_dim
