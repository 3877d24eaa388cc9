"""What k-means looks at: the keys without position, with position, or both, and in what metric.

A metric weighs directions by how much queries use them. It enters by multiplying the features
by its square root, so k-means stays Euclidean. Metrics of the queries are measured on another text
(calibration) and are quantities of the model, never of a user's traffic; whitening uses the
segment's own keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.fidelity.capture import Capture
from benchmarks.fidelity.rope import RopeTable

FEATURES = ("content", "rotated", "joint")
METRICS = ("euclidean", "moment", "tempered", "pair", "ridge", "whitened", "half-whitened")
# exponent of the segment's own key covariance that the features are multiplied by
WHITENING = {"whitened": -0.5, "half-whitened": -0.25}


@dataclass(frozen=True)
class Calibration:
    """Square roots of the metrics of every KV head of the model: name -> [LH, D, D]."""

    roots: dict[str, torch.Tensor]

    @classmethod
    def of_capture(cls, capture: Capture) -> Calibration:
        """From the queries of a capture (its last positions)."""
        moment = torch.einsum("hgnd,hgne->hde", capture.queries, capture.queries)
        dim = moment.shape[-1]
        moment = moment / moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye = torch.eye(dim, device=moment.device)
        half = capture.rope.cos.shape[-1]
        power = moment.diagonal(dim1=-2, dim2=-1)
        # a pair of dimensions turns together, so its weight is the same with or without RoPE
        pair = (power[:, :half] + power[:, half : 2 * half]) / 2
        pair = torch.cat([pair, pair, power[:, 2 * half :]], -1)
        return cls(
            {
                "moment": matrix_power(moment, 0.5),
                "tempered": matrix_power(moment, 0.25),
                "ridge": matrix_power(moment + 0.3 * eye, 0.5),
                "pair": torch.diag_embed(pair.sqrt()),
            }
        )


def matrix_power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Power of symmetric positive matrices [*, D, D]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).pow(exponent).unsqueeze(-2)) @ vectors.mT


def cluster_features(
    keys: torch.Tensor,
    begin: int,
    rope: RopeTable,
    features: str,
    metric_root: torch.Tensor | None,
    whitening: float | None = None,
) -> torch.Tensor:
    """[H, T, D or 2D] of keys [H, T, D] at positions begin and on."""
    positions = torch.arange(begin, begin + keys.shape[-2], device=keys.device)
    parts = []
    if features in ("content", "joint"):
        parts.append(rope.unrotate(keys, positions))
    if features in ("rotated", "joint"):
        parts.append(keys)
    if metric_root is not None:
        parts = [p @ metric_root for p in parts]
    if whitening is not None:
        parts = [whiten(p, whitening) for p in parts]
    return torch.cat(parts, -1)


def whiten(features: torch.Tensor, exponent: float) -> torch.Tensor:
    """features [H, T, D] times a power of their own covariance: rare directions count more."""
    centered = features - features.mean(-2, keepdim=True)
    covariance = centered.mT @ centered / features.shape[-2]
    dim = covariance.shape[-1]
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    ridge = 0.01 * torch.eye(dim, device=features.device)
    return centered @ matrix_power(covariance / scale + ridge, exponent)
