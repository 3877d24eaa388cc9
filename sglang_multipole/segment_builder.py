"""Cluster segments: from keys and values in the KV pool to places in the cluster pool."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

from multipole_kernels import reference
from sglang_multipole.cluster_pool import ClusterPool

# most scratch of a clustering, in bytes
_MAX_SCRATCH = 1 << 30


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
    """Executes build orders on the current stream, which must be the forward's.

    Args:
        req_to_token: [rows, context] int32, SGLang's map from positions to KV slots.
    """

    def __init__(self, pool: ClusterPool, layers: Sequence[KVLayer], req_to_token: torch.Tensor):
        self.pool, self.layers, self.req_to_token = pool, layers, req_to_token

    def execute(self, orders: Sequence[BuildOrder]) -> list[bool]:
        """Build what is missing.

        Waits for the device once if a sealed segment is among the orders, which happens when a
        request begins to decode and once in segment_size of its tokens.

        Returns:
            For each order, whether its place was used; false when the pool already held the
            segment (another request's, or one built earlier in this call).
        """
        known = self._known(orders)
        missing = [order for order in orders if order not in known]
        if missing:
            # readers must not find a place while its payload is half written
            self.pool.kill([order.place for order in missing])
        for group in self._groups(missing):
            self._build(group)
        return [order not in known for order in orders]

    def _known(self, orders: Sequence[BuildOrder]) -> set[BuildOrder]:
        """The sealed segments among the orders that need no building."""
        pool, size = self.pool, self.pool.config.segment_size
        sealed = [order for order in orders if order.extent == size]
        if not sealed:
            return set()
        slots = self._slots(sealed)
        places = pool.segment_of_slot[slots[:, -1]].long()
        extent = pool.segment_extent[places]
        is_held = (extent == size) & pool.matches(places, slots, extent)
        known, last_slots = set(), set()
        held_and_last = torch.stack([is_held.long(), slots[:, -1]]).tolist()
        for order, held, last_slot in zip(sealed, *held_and_last, strict=True):
            if held or last_slot in last_slots:
                known.add(order)
            last_slots.add(last_slot)
        return known

    def _slots(self, orders: Sequence[BuildOrder]) -> torch.Tensor:
        """[orders, extent] int64 KV slots; the orders have one extent."""
        device = self.req_to_token.device
        rows = torch.tensor([order.row for order in orders], device=device)
        segments = torch.tensor([order.segment for order in orders], device=device)
        begin = segments * self.pool.config.segment_size
        positions = begin.unsqueeze(-1) + torch.arange(orders[0].extent, device=device)
        return self.req_to_token[rows.unsqueeze(-1), positions].long()

    def _groups(self, orders: Sequence[BuildOrder]) -> Iterator[list[BuildOrder]]:
        """The orders by equal numbers of tokens, which only the first segment's sinks change."""

        def shape(order: BuildOrder) -> tuple[int, bool]:
            return order.extent, order.segment == 0

        for (extent, _), group in itertools.groupby(sorted(orders, key=shape), key=shape):
            alike, at_once = list(group), self._max_pairs(extent)
            for begin in range(0, len(alike), at_once):
                yield alike[begin : begin + at_once]

    def _max_pairs(self, num_tokens: int) -> int:
        """How many (layer, segment) pairs of num_tokens are clustered in one go."""
        shape, config = self.pool.shape, self.pool.config
        # float32 copies of keys and values, and distances, alive at a time
        columns = 5 * shape.head_dim + 2 * config.clusters_per_segment
        return max(_MAX_SCRATCH // (4 * shape.num_kv_heads * num_tokens * columns), 1)

    def _build(self, orders: list[BuildOrder]) -> None:
        pool, config = self.pool, self.pool.config
        device = self.req_to_token.device
        slots = self._slots(orders)
        places = torch.tensor([order.place for order in orders], device=device)
        segments = torch.tensor([order.segment for order in orders], device=device)
        num_sinks = config.num_sink_tokens if orders[0].segment == 0 else 0
        offset = torch.arange(num_sinks, orders[0].extent, device=device)
        positions = segments.unsqueeze(-1) * config.segment_size + offset
        layers_at_once = max(self._max_pairs(orders[0].extent) // len(orders), 1)
        for begin in range(0, len(self.layers), layers_at_once):
            layers = range(begin, min(begin + layers_at_once, len(self.layers)))
            self._build_layers(layers, slots[:, num_sinks:], positions, places, segments, num_sinks)
        rows = torch.tensor([order.row for order in orders], device=device)
        pool.register(places, slots, rows)

    def _build_layers(
        self,
        layers: range,
        slots: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        segments: torch.Tensor,
        num_sinks: int,
    ) -> None:
        """Cluster tokens at slots, positions [M, T] in some layers into places [M]."""
        pool, config = self.pool, self.pool.config
        num_tokens = slots.shape[1]
        num_clusters = -(-num_tokens // config.tokens_per_cluster)
        # [layers, M, H, T, D]
        keys = torch.stack([self.layers[i].key_buffer[slots].transpose(1, 2) for i in layers])
        values = torch.stack([self.layers[i].value_buffer[slots].transpose(1, 2) for i in layers])
        cluster_ids = reference.cluster_segment(
            self._features(layers, keys, positions),
            num_clusters,
            config.max_cluster_size,
            config.num_lloyd_iters,
            segments.unsqueeze(-1),  # [M, 1] against [layers, M, H]
        )
        members = cluster_ids.argsort(dim=-1, stable=True) + num_sinks
        summary = reference.summarize_clusters(keys, values, cluster_ids, num_clusters)
        pool.store(slice(layers.start, layers.stop), places, summary, members)

    def _features(self, layers: range, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What is clustered: the keys without their rotary position, [layers, M, H, T, D]."""
        tables = {id(self.layers[i].cos) for i in layers}
        if len(tables) == 1:
            return self._unrotate(layers.start, keys, positions)
        each = [self._unrotate(i, keys[i - layers.start], positions) for i in layers]
        return torch.stack(each)

    def _unrotate(self, layer: int, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.layers[layer].cos, self.layers[layer].sin
        if cos is None:
            return keys.float()
        # [M, 1, T, rotary_dim / 2]
        return reference.unrotate(keys, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))
