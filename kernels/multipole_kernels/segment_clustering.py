"""Cluster segments on a GPU: six launches a chunk of units, the results stored in the pool.

write_features   two: keys out of the KV pool, rotation undone, float16
kmeans           one: cluster ids
sort_members     one: size cap, sizes, members
summarize        two: centroids, scales, variances; pair weights
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterator, Sequence

import torch

from multipole_kernels.cluster_members import sort_members
from multipole_kernels.cluster_summary import summarize
from multipole_kernels.clustering_batch import (
    ClusteringBatch,
    ClusteringGeometry,
    PoolPayload,
    make_orders,
)
from multipole_kernels.kmeans import kmeans, num_passes
from multipole_kernels.launch_config import launch_config
from multipole_kernels.segment_features import write_features

# most scratch of a chunk of units, in bytes
_MAX_SCRATCH = 1 << 29
# most numbers of a unit's centroids: their sums are kept in registers
_MAX_CENTROIDS = 256 * 128
_MAX_CLUSTERS = 256


def supports(geometry: ClusteringGeometry, clusters_per_segment: int) -> bool:
    """Whether the kernels can cluster segments of so many clusters."""
    block = geometry.block_clusters(geometry.segment_size, 1)
    return clusters_per_segment <= _MAX_CLUSTERS and block * geometry.block_dim <= _MAX_CENTROIDS


def scratch_bytes(geometry: ClusteringGeometry, num_layers: int, num_orders: int) -> int:
    """The most scratch that a clustering of so many orders in so many layers holds at a time."""
    pair_bytes = _pair_bytes(geometry)
    return min(num_orders * num_layers * pair_bytes, max(_MAX_SCRATCH, pair_bytes))


def slice_scratch_bytes(geometry: ClusteringGeometry, num_layers: int, num_sms: int) -> int:
    """The most scratch that an order in slices holds."""
    parts = layers_of_slices(num_layers, geometry.num_kv_heads, num_sms)
    return max(map(len, parts)) * _pair_bytes(geometry)


def _pair_bytes(geometry: ClusteringGeometry) -> int:
    """Scratch of one sealed segment in one layer."""
    block = geometry.block_clusters(geometry.segment_size, 1)
    return geometry.num_kv_heads * geometry.unit_bytes(block)


def layers_of_slices(num_layers: int, num_kv_heads: int, num_sms: int) -> list[range]:
    """All layers in as few parts, equal but for one layer, as give a unit a multiprocessor."""
    num_parts = -(-num_layers // max(num_sms // num_kv_heads, 1))
    bounds = [num_layers * nth // num_parts for nth in range(num_parts + 1)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


@dataclasses.dataclass
class SegmentClustering:
    """The layers' buffers and the pool, for as long as they live.

    layer_table: [L, 4] int64, see ClusteringBatch. req_to_token: [rows, context] int32.
    """

    geometry: ClusteringGeometry
    pool: PoolPayload
    layer_table: torch.Tensor
    req_to_token: torch.Tensor

    def cluster(self, orders: Sequence[tuple[int, int, int, int]]) -> None:
        """Write the payload of orders (row, segment, extent, place); nothing finds it yet."""

        def block_clusters(order: tuple[int, int, int, int]) -> int:
            _, segment, extent, _ = order
            return self.geometry.block_clusters(extent, segment)

        for block, group in itertools.groupby(sorted(orders, key=block_clusters), block_clusters):
            alike = list(group)
            table = make_orders(alike, self.req_to_token.device)
            for some, layers in self.chunks(len(alike), block):
                self._cluster_chunk(table[some], layers, block)

    def slices(self, order: tuple[int, int, int, int]) -> Generator[None]:
        """Write the payload of one order in num_slices slices, one with each `next`.

        The same bits as `cluster` writes. Between two slices the scratch of some layers is held.
        """
        _, segment, extent, _ = order
        block = self.geometry.block_clusters(extent, segment)
        table = make_orders([order], self.req_to_token.device)
        for layers in self._layers_of_slices():
            yield from self._cluster_in_slices(self._batch(table, layers, block))

    def num_slices(self) -> int:
        return len(self._layers_of_slices()) * (num_passes(self.geometry) + 3)

    def _layers_of_slices(self) -> list[range]:
        num_sms = launch_config(self.req_to_token.device).num_sms
        return layers_of_slices(len(self.layer_table), self.geometry.num_kv_heads, num_sms)

    def _cluster_in_slices(self, batch: ClusteringBatch) -> Generator[None]:
        write_features(batch)
        yield
        passes = range(num_passes(self.geometry))
        for nth in passes:
            kmeans(batch, passes[nth : nth + 1])
            yield
        sort_members(batch, self.pool)
        yield
        summarize(batch, self.pool)
        yield

    def _batch(self, orders: torch.Tensor, layers: range, block_clusters: int) -> ClusteringBatch:
        return ClusteringBatch(
            self.geometry, orders, self.layer_table, self.req_to_token, layers, block_clusters
        )

    def warm_up(self) -> None:
        """Compile what any order can need, so that no request waits for it; writes to place 0."""
        geometry = self.geometry
        longest = min(geometry.segment_size, self.req_to_token.shape[1])
        block_clusters = 0
        for extent in range(geometry.num_sink_tokens + 1, longest + 1):
            if geometry.block_clusters(extent, 0) > block_clusters:
                block_clusters = geometry.block_clusters(extent, 0)
                order = make_orders([(0, 0, extent, 0)], self.req_to_token.device)
                self._cluster_chunk(order, range(1), block_clusters)

    def _cluster_chunk(self, orders: torch.Tensor, layers: range, block_clusters: int) -> None:
        batch = self._batch(orders, layers, block_clusters)
        write_features(batch)
        kmeans(batch)
        sort_members(batch, self.pool)
        summarize(batch, self.pool)

    def chunks(self, num_orders: int, block_clusters: int) -> Iterator[tuple[slice, range]]:
        """Orders and layers that fit the scratch; all layers of some orders, or some of one."""
        num_layers = len(self.layer_table)
        pair_bytes = self.geometry.num_kv_heads * self.geometry.unit_bytes(block_clusters)
        pairs = max(_MAX_SCRATCH // pair_bytes, 1)
        orders_at_once, layers_at_once = max(pairs // num_layers, 1), min(pairs, num_layers)
        for first in range(0, num_orders, orders_at_once):
            some = slice(first, min(first + orders_at_once, num_orders))
            for layer in range(0, num_layers, layers_at_once):
                yield some, range(layer, min(layer + layers_at_once, num_layers))
