"""Cluster a segment: from its keys and values in the KV pool to its place in the cluster pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from multipole_kernels import reference
from sglang_multipole.cluster_pool import ClusterPool


@dataclasses.dataclass(frozen=True)
class BuildOrder:
    """Cluster tokens [segment * S, segment * S + extent) of a row into a free place, if missing."""

    row: int
    segment: int
    extent: int
    place: int


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


class SegmentBuilder:
    """Executes build orders, in order, on the forward stream."""

    def __init__(self, pool: ClusterPool, layers: Sequence[KVLayer]):
        self.pool, self.layers = pool, layers

    def execute(self, orders: Sequence[BuildOrder], req_to_token: torch.Tensor) -> list[bool]:
        """Build what is missing.

        Returns:
            For each order, whether its place was used; false when the pool already held the
            segment (another request's, or one built earlier in this call).
        """
        return [self._execute_one(order, req_to_token) for order in orders]

    def _execute_one(self, order: BuildOrder, req_to_token: torch.Tensor) -> bool:
        pool, size = self.pool, self.pool.config.segment_size
        begin = order.segment * size
        slots = req_to_token[order.row, begin : begin + order.extent].long()
        if order.extent == size:
            place = pool.segment_of_slot[slots[-1]].long()
            extent = pool.segment_extent[place]
            # the place can have become an open segment of the same first tokens
            if bool((extent == size) & pool.matches(place, slots, extent)):
                return False
        # readers must not find the place while its payload is half written
        pool.segment_extent[order.place] = 0
        self._build(order, slots)
        pool.register(order.place, slots, order.row, order.extent)
        return True

    def _build(self, order: BuildOrder, slots: torch.Tensor) -> None:
        pool, config = self.pool, self.pool.config
        num_sinks = config.num_sink_tokens if order.segment == 0 else 0
        slots = slots[num_sinks:]
        num_clusters = -(-len(slots) // config.tokens_per_cluster)
        begin = order.segment * config.segment_size + num_sinks
        positions = slice(begin, begin + len(slots))
        for index, layer in enumerate(self.layers):
            # [H, T, D]
            keys = layer.key_buffer[slots].transpose(0, 1)
            values = layer.value_buffer[slots].transpose(0, 1)
            features = keys.float()
            if layer.cos is not None:
                features = reference.unrotate(keys, layer.cos[positions], layer.sin[positions])
            cluster_ids = reference.cluster_segment(
                features,
                num_clusters,
                config.max_cluster_size,
                config.num_lloyd_iters,
                order.segment,
            )
            key_centroids, value_centroids, sizes, variance = reference.summarize_clusters(
                keys, values, cluster_ids, num_clusters
            )
            at = (index, order.place, slice(None))
            pool.cluster_sizes[at].zero_()
            pool.key_centroids[at][:, :num_clusters] = key_centroids.to(pool.shape.dtype)
            pool.value_centroids[at][:, :num_clusters] = value_centroids.to(pool.shape.dtype)
            pool.cluster_sizes[at][:, :num_clusters] = sizes.short()
            pool.key_variance[at][:, :num_clusters] = variance
            pool.member_begin[at][:, :num_clusters] = (sizes.cumsum(-1) - sizes).short()
            members = cluster_ids.argsort(dim=-1, stable=True) + num_sinks
            pool.members[at][:, : len(slots)] = members.short()
