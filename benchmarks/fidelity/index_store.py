"""Clusterings of a text's segments, kept for as long as the keys they were made from are valid."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch

from benchmarks.fidelity.block import NUM_SINKS, Block
from benchmarks.fidelity.capture import Capture

# of a capture's row of heads, so that the distances of a long window fit in memory
HEADS_AT_ONCE = 30


@dataclass(frozen=True)
class SegmentClusters:
    """K clusters of one segment of T tokens, for H heads; what attention may know of them.

    cluster_ids [H, T] int64; key_centroids, value_centroids [H, K, D]; sizes [H, K];
    variance [H, K], of the keys about their mean, averaged over dimensions;
    pair_weight [H, D / 2], of reference.ClusterSummary;
    covariance [H, D, D], of all keys about their cluster's mean.
    """

    cluster_ids: torch.Tensor
    key_centroids: torch.Tensor
    value_centroids: torch.Tensor
    sizes: torch.Tensor
    variance: torch.Tensor
    pair_weight: torch.Tensor
    covariance: torch.Tensor

    def of_heads(self, heads: slice) -> SegmentClusters:
        """The same for some of the heads."""
        return SegmentClusters(*(getattr(self, f.name)[heads] for f in fields(self)))


class SegmentBuilder(Protocol):
    """How a segment is clustered. Builders with equal keys build equal clusters."""

    key: tuple
    segment_size: int

    def build(self, keys, values, begin: int, rope, heads: slice) -> SegmentClusters:
        """Clusters of keys, values [H, T, D] at positions begin and on."""


class IndexStore:
    """Builds each segment once for all heads of a capture, if it lies in the known prefix.

    num_known: tokens whose captured keys are those that the run sees. All of them when attention
    is tested on the captured queries; the dense prefix when the model itself runs sparsely.
    """

    def __init__(self, capture: Capture, num_known: int, shared: dict | None = None) -> None:
        self.capture, self.num_known = capture, num_known
        self.built = {} if shared is None else shared

    def segments(self, block: Block, builder: SegmentBuilder) -> list[SegmentClusters]:
        """The clusters of the block's extent, segment by segment."""
        segments = []
        for start in range(0, block.extent, builder.segment_size):
            begin, end = max(start, NUM_SINKS), min(start + builder.segment_size, block.extent)
            if end <= begin:
                continue
            if end <= self.num_known:
                segments.append(self._known(builder, begin, end).of_heads(block.heads))
            else:
                part = block.keys[:, begin:end], block.values[:, begin:end]
                segments.append(builder.build(*part, begin, block.rope, block.heads))
        return segments

    def _known(self, builder: SegmentBuilder, begin: int, end: int) -> SegmentClusters:
        place = (builder.key, begin, end)
        if place not in self.built:
            keys, values = self.capture.keys[:, begin:end], self.capture.values[:, begin:end]
            parts = []
            for first in range(0, len(keys), HEADS_AT_ONCE):
                heads = slice(first, min(first + HEADS_AT_ONCE, len(keys)))
                parts.append(
                    builder.build(keys[heads], values[heads], begin, self.capture.rope, heads)
                )
            names = [f.name for f in fields(parts[0])]
            columns = [torch.cat([getattr(p, name) for p in parts]) for name in names]
            self.built[place] = type(parts[0])(*columns)
        return self.built[place]
