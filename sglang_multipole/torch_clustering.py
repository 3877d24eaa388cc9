"""Clustering in PyTorch: on a CPU, and for shapes that the kernels do not take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from multipole_kernels import reference
from sglang_multipole.cluster_pool import ClusterPool
from sglang_multipole.kv_layer import KVLayer

# most scratch of a clustering, in bytes
MAX_SCRATCH = 1 << 30

Order = tuple[int, int, int, int]


class TorchClustering:
    """Writes the payload of orders (row, segment, extent, place) by reference.cluster_segment."""

    def __init__(self, pool: ClusterPool, layers: Sequence[KVLayer], req_to_token: torch.Tensor):
        self.pool, self.layers, self.req_to_token = pool, layers, req_to_token

    def cluster(self, orders: Sequence[Order]) -> None:
        for group in self._groups(orders):
            self._build(group)

    def _groups(self, orders: Sequence[Order]) -> Iterator[list[Order]]:
        """The orders by equal numbers of tokens, which only the first segment's sinks change."""

        def shape(order: Order) -> tuple[int, bool]:
            _, segment, extent, _ = order
            return extent, segment == 0

        for (extent, _), group in itertools.groupby(sorted(orders, key=shape), key=shape):
            alike, at_once = list(group), self._max_pairs(extent)
            for begin in range(0, len(alike), at_once):
                yield alike[begin : begin + at_once]

    def _max_pairs(self, num_tokens: int) -> int:
        """How many (layer, segment) pairs of num_tokens are clustered in one go."""
        shape, config = self.pool.shape, self.pool.config
        # float32 copies of keys and values, and distances, alive at a time
        columns = 5 * shape.head_dim + 2 * config.clusters_per_segment
        return max(MAX_SCRATCH // (4 * shape.num_kv_heads * num_tokens * columns), 1)

    def _build(self, orders: list[Order]) -> None:
        config, extent = self.pool.config, orders[0][2]
        table = torch.tensor(orders, device=self.req_to_token.device)
        rows, segments, _, places = table.unbind(1)
        num_sinks = config.num_sink_tokens if orders[0][1] == 0 else 0
        offset = torch.arange(num_sinks, extent, device=table.device)
        positions = segments.unsqueeze(-1) * config.segment_size + offset
        slots = self.req_to_token[rows.unsqueeze(-1), positions].long()
        layers_at_once = max(self._max_pairs(extent) // len(orders), 1)
        for begin in range(0, len(self.layers), layers_at_once):
            layers = range(begin, min(begin + layers_at_once, len(self.layers)))
            self._build_layers(layers, slots, positions, places, segments, num_sinks)

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
