"""Clustering in PyTorch: on a CPU, and for shapes that the kernels do not take."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterator, Sequence

import torch

from multipole_kernels import reference
from sglang_multipole.cluster_pool import ClusterPool
from sglang_multipole.kv_layer import KVLayer

# most scratch of a clustering, in bytes
MAX_SCRATCH = 1 << 30

Order = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """What is clustered in some layers: slots, positions [M, T] int64, into places [M].

    segments: [M]. num_sinks: tokens before the first of them that are in no cluster.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    segments: torch.Tensor
    num_sinks: int


class TorchClustering:
    """Writes the payload of orders (row, segment, extent, place) by reference.cluster_segment."""

    def __init__(self, pool: ClusterPool, layers: Sequence[KVLayer], req_to_token: torch.Tensor):
        self.pool, self.layers, self.req_to_token = pool, layers, req_to_token

    def cluster(self, orders: Sequence[Order]) -> None:
        for group in self._groups(orders):
            self._build(group)

    def slices(self, order: Order) -> Generator[None]:
        """Do the same for one order in num_slices slices, one with each `next`: two a layer."""
        tokens = self._tokens([order])
        for layer in range(len(self.layers)):
            layers = range(layer, layer + 1)
            cluster_ids = self._cluster_ids(layers, tokens)
            yield
            self._store(layers, tokens, cluster_ids)
            yield

    def num_slices(self) -> int:
        return 2 * len(self.layers)

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
        tokens = self._tokens(orders)
        layers_at_once = max(self._max_pairs(orders[0][2]) // len(orders), 1)
        for begin in range(0, len(self.layers), layers_at_once):
            layers = range(begin, min(begin + layers_at_once, len(self.layers)))
            self._store(layers, tokens, self._cluster_ids(layers, tokens))

    def _tokens(self, orders: list[Order]) -> _Tokens:
        """The tokens of orders that have equally many."""
        config = self.pool.config
        table = torch.tensor(orders, device=self.req_to_token.device)
        rows, segments, _, places = table.unbind(1)
        num_sinks = config.num_sink_tokens if orders[0][1] == 0 else 0
        offset = torch.arange(num_sinks, orders[0][2], device=table.device)
        positions = segments.unsqueeze(-1) * config.segment_size + offset
        slots = self.req_to_token[rows.unsqueeze(-1), positions].long()
        return _Tokens(slots, positions, places, segments, num_sinks)

    def _num_clusters(self, tokens: _Tokens) -> int:
        return -(-tokens.slots.shape[1] // self.pool.config.tokens_per_cluster)

    def _cluster_ids(self, layers: range, tokens: _Tokens) -> torch.Tensor:
        """[layers, M, H, T] int64."""
        config = self.pool.config
        keys = self._heads_of(tokens, [self.layers[i].key_buffer for i in layers])
        return reference.cluster_segment(
            self._features(layers, keys, tokens.positions),
            self._num_clusters(tokens),
            config.max_cluster_size,
            config.num_lloyd_iters,
            tokens.segments.unsqueeze(-1),  # [M, 1] against [layers, M, H]
        )

    def _store(self, layers: range, tokens: _Tokens, cluster_ids: torch.Tensor) -> None:
        keys = self._heads_of(tokens, [self.layers[i].key_buffer for i in layers])
        values = self._heads_of(tokens, [self.layers[i].value_buffer for i in layers])
        members = cluster_ids.argsort(dim=-1, stable=True) + tokens.num_sinks
        num_clusters = self._num_clusters(tokens)
        summary = reference.summarize_clusters(keys, values, cluster_ids, num_clusters)
        self.pool.store(slice(layers.start, layers.stop), tokens.places, summary, members)

    def _heads_of(self, tokens: _Tokens, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """[len(buffers), M, H, T, D]."""
        return torch.stack([buffer[tokens.slots].transpose(1, 2) for buffer in buffers])

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
