"""What the clustering kernels share: the orders of a launch, the layers' buffers, the scratch.

A *unit* is one (order, layer, KV head): unit = (order * num_layers + layer) * NUM_KV_HEADS + head.
Whatever is computed of a unit depends on that unit's tokens and shape alone, never on what else is
in the launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# columns of an order and of a row of the layer table
NUM_ORDER_FIELDS = 4
NUM_LAYER_FIELDS = 4
# tokens that the k-means kernels take at a time
BLOCK_TOKENS = 128
# fewer clusters are padded to so many, which bounds how many kernels are compiled
_MIN_BLOCK_CLUSTERS = 32
# clusters that one program summarizes one after another
CLUSTERS_PER_PROGRAM = 8

# of a KV pool
KV_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@dataclasses.dataclass(frozen=True)
class ClusteringGeometry:
    """Sizes that do not change while a server runs; tokens unless said.

    rotary_half: half of the rotated dimensions, the same in all layers that have any.
    """

    num_kv_heads: int
    head_dim: int
    rotary_half: int
    kv_dtype: torch.dtype
    segment_size: int
    num_sink_tokens: int
    tokens_per_cluster: int
    max_cluster_size: int
    num_lloyd_iters: int

    @property
    def block_dim(self) -> int:
        return triton.next_power_of_2(self.head_dim)

    def block_clusters(self, extent: int, segment: int) -> int:
        """Clusters of an order, padded: of one shape, hence of one kernel."""
        num_tokens = extent - (self.num_sink_tokens if segment == 0 else 0)
        num_clusters = -(-num_tokens // self.tokens_per_cluster)
        return max(triton.next_power_of_2(num_clusters), _MIN_BLOCK_CLUSTERS)

    def padded_tokens(self, block_clusters: int) -> int:
        """Rows of scratch of an order with so many clusters."""
        most = block_clusters * self.tokens_per_cluster
        return -(-most // BLOCK_TOKENS) * BLOCK_TOKENS

    def unit_bytes(self, block_clusters: int) -> int:
        """Scratch of one unit."""
        num_tokens, num_parts = self.padded_tokens(block_clusters), num_parts_of(block_clusters)
        rows = 2 * (num_tokens + block_clusters) + 4 * (num_parts + 1)
        return rows * self.block_dim + (2 + 4) * num_tokens + 4


def num_parts_of(num_clusters: int) -> int:
    """Programs that summarize a unit's clusters."""
    return -(-num_clusters // CLUSTERS_PER_PROGRAM)


@dataclasses.dataclass(frozen=True)
class PoolPayload:
    """What the clustering writes, of all layers: L layers, P places, H KV heads, K clusters.

    Sizes and scales as in decode_buffers.PoolLayer, with a leading dimension of layers.
    """

    key_centroids: torch.Tensor  # [L, P, H, K, D]
    value_centroids: torch.Tensor
    key_scale: torch.Tensor | None  # [L, P, H, K] float32
    value_scale: torch.Tensor | None
    cluster_sizes: torch.Tensor  # [L, P, H, K] int16
    key_variance: torch.Tensor  # [L, P, H, K] float32
    pair_weight: torch.Tensor  # [L, P, H, D / 2] float32
    members: torch.Tensor  # [L, P, H, S] int16
    member_begin: torch.Tensor  # [L, P, H, K] int16

    @property
    def num_places(self) -> int:
        return self.key_centroids.shape[1]

    @property
    def clusters_per_segment(self) -> int:
        return self.key_centroids.shape[3]


def make_layer_table(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    cos: Sequence[torch.Tensor | None],
    sin: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """The addresses of each layer's buffers, [L, 4] int64; the tensors must outlive the table."""
    rows = [
        [0 if tensor is None else tensor.data_ptr() for tensor in layer]
        for layer in zip(keys, values, cos, sin, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=keys[0].device)


def make_orders(
    orders: Sequence[tuple[int, int, int, int]], device: torch.device | str
) -> torch.Tensor:
    """(row, segment, extent, place) of each order as [M, 4] int32; the copy waits for nothing."""
    table = torch.tensor(orders, dtype=torch.int32, pin_memory=torch.cuda.is_available())
    return table.to(device, non_blocking=True)


@dataclasses.dataclass
class ClusteringBatch:
    """One launch's orders and layers, and its scratch: U units, T padded tokens, K clusters.

    orders: [M, 4] int32: row of req_to_token, segment, extent, place.
    layer_table: [L, 4] int64, addresses: keys, values, cos, sin; the last two 0 without RoPE.
    req_to_token: [rows, context] int32.
    """

    geometry: ClusteringGeometry
    orders: torch.Tensor
    layer_table: torch.Tensor
    req_to_token: torch.Tensor
    layers: range
    block_clusters: int

    def __post_init__(self) -> None:
        geometry, device = self.geometry, self.orders.device
        tokens, dim = geometry.padded_tokens(self.block_clusters), geometry.block_dim

        def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(self.num_units, *shape, dtype=dtype, device=device)

        # in the order in which they are written; [U, D], [U], [U, T, D], [U, T], [U, K, D], [U, T]
        self.offset = new(dim, dtype=torch.float32)
        self.scale = new(dtype=torch.float32)
        self.features = new(tokens, dim, dtype=torch.float16)
        self.seed_distance = new(tokens, dtype=torch.float32)
        self.centroids = new(self.block_clusters, dim, dtype=torch.float16)
        self.cluster_ids = new(tokens, dtype=torch.int16)
        # [U, K / CLUSTERS_PER_PROGRAM, D]
        self.spread = new(num_parts_of(self.block_clusters), dim, dtype=torch.float32)

    @property
    def num_pairs(self) -> int:
        return len(self.orders) * len(self.layers)

    @property
    def num_units(self) -> int:
        return self.num_pairs * self.geometry.num_kv_heads

    @property
    def padded_tokens(self) -> int:
        return self.geometry.padded_tokens(self.block_clusters)

    def order_arguments(self) -> dict[str, object]:
        """Arguments of every kernel."""
        geometry = self.geometry
        return {
            "orders_ptr": self.orders,
            "num_layers": len(self.layers),
            "NUM_KV_HEADS": geometry.num_kv_heads,
            "NUM_SINKS": geometry.num_sink_tokens,
            "TOKENS_PER_CLUSTER": geometry.tokens_per_cluster,
        }

    def kv_arguments(self) -> dict[str, object]:
        """Arguments of the kernels that read the KV pool."""
        geometry = self.geometry
        return {
            "layer_table_ptr": self.layer_table[self.layers.start :],
            "req_to_token_ptr": self.req_to_token,
            "stride_table_row": self.req_to_token.stride(0),
            "SEGMENT_SIZE": geometry.segment_size,
            "HEAD_DIM": geometry.head_dim,
            "BLOCK_DIM": geometry.block_dim,
            "KV_DTYPE": KV_DTYPES[geometry.kv_dtype],
        }


@triton.jit
def load_order(orders_ptr, order, NUM_SINKS: tl.constexpr, TOKENS_PER_CLUSTER: tl.constexpr):
    """row, segment, place, sinks before its tokens, clustered tokens, clusters."""
    row = tl.load(orders_ptr + order * 4).to(tl.int64)
    segment = tl.load(orders_ptr + order * 4 + 1)
    extent = tl.load(orders_ptr + order * 4 + 2)
    place = tl.load(orders_ptr + order * 4 + 3).to(tl.int64)
    num_sinks = tl.where(segment == 0, NUM_SINKS, 0)
    num_tokens = extent - num_sinks
    num_clusters = (num_tokens + TOKENS_PER_CLUSTER - 1) // TOKENS_PER_CLUSTER
    return row, segment, place, num_sinks, num_tokens, num_clusters


@triton.jit
def load_pointer(field_ptr, DTYPE: tl.constexpr):
    """The address in a field of the layer table, as a pointer to a buffer of DTYPE."""
    # so aligned are allocations, and views of whole slots: loads may be 16 bytes wide
    return tl.multiple_of(tl.load(field_ptr).to(tl.pointer_type(DTYPE)), 16)
