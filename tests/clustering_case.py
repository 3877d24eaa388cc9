"""Segments to cluster: a KV pool of several layers with RoPE, a request table, a cluster pool."""

from __future__ import annotations

import dataclasses

import torch

from multipole_kernels import reference
from multipole_kernels.clustering_batch import ClusteringGeometry, PoolPayload, make_layer_table
from multipole_kernels.segment_clustering import SegmentClustering
from tests.decode_keys import make_keys

CONTEXT_SEGMENTS = 4


@dataclasses.dataclass
class ClusteringCase:
    geometry: ClusteringGeometry
    keys: list[torch.Tensor]  # of each layer, [num_slots, H, D]
    values: list[torch.Tensor]
    cos: list[torch.Tensor | None]  # of each layer, [context, rotary_half] float32
    sin: list[torch.Tensor | None]
    req_to_token: torch.Tensor
    pool: PoolPayload
    clustering: SegmentClustering

    def tokens(self, row: int, segment: int, extent: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and slots of an order's clustered tokens, [T] int64."""
        size, sinks = self.geometry.segment_size, self.geometry.num_sink_tokens
        begin = segment * size
        positions = torch.arange(
            begin + (sinks if segment == 0 else 0), begin + extent, device=self.req_to_token.device
        )
        return positions, self.req_to_token[row, positions].long()

    def features(self, layer: int, row: int, segment: int, extent: int) -> torch.Tensor:
        """What the reference clusters, [H, T, D] float32."""
        positions, slots = self.tokens(row, segment, extent)
        keys = self.keys[layer][slots].transpose(0, 1)
        if self.cos[layer] is None:
            return keys.float()
        return reference.unrotate(keys, self.cos[layer][positions], self.sin[layer][positions])

    def cluster_ids(self, layer: int, row: int, segment: int, extent: int, place: int):
        """What the kernels stored: ids [H, T] int64, from the members."""
        positions, _ = self.tokens(row, segment, extent)
        num_sinks = int(positions[0]) - segment * self.geometry.segment_size
        pool = self.pool
        sizes = pool.cluster_sizes[layer, place].long()
        members = pool.members[layer, place, :, : len(positions)].long() - num_sinks
        numbers = torch.arange(sizes.shape[-1], device=sizes.device)
        ids = torch.stack([numbers.repeat_interleave(head) for head in sizes])
        assert ids.shape == members.shape, "sizes do not add up to the tokens"
        return torch.full_like(ids, -1).scatter_(-1, members, ids)


def make_clustering_case(
    *,
    num_layers: int = 2,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    rotary_half: int | None = None,
    kv_dtype: torch.dtype = torch.bfloat16,
    centroid_dtype: torch.dtype | None = None,
    segment_size: int = 256,
    tokens_per_cluster: int = 8,
    num_sink_tokens: int = 10,
    max_cluster_size: int = 64,
    num_lloyd_iters: int = 4,
    num_rows: int = 2,
    num_places: int = 12,
    layers_without_rope: tuple[int, ...] = (),
    seed: int = 0,
    device: str | None = None,
) -> ClusteringCase:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device=device).manual_seed(seed)
    context = CONTEXT_SEGMENTS * segment_size
    half = head_dim // 2 if rotary_half is None else rotary_half
    num_slots = num_rows * context + 1
    order = 1 + torch.randperm(num_slots - 1, generator=generator, device=device)
    req_to_token = order.view(num_rows, context).int()
    position_of_slot = torch.zeros(num_slots, dtype=torch.int64, device=device)
    position_of_slot[order] = torch.arange(context, device=device).repeat(num_rows)
    keys, values, tables = [], [], []
    for layer in range(num_layers):
        # [num_slots, H, D], by position and then moved to the slots
        content, _ = make_keys(num_slots, num_kv_heads, head_dim, generator)
        frequency = 10000.0 ** -(torch.arange(half, device=device) / max(half, 1))
        angle = torch.arange(context, device=device)[:, None] * frequency
        # a table of its own for each layer, of a magnitude that is not 1, as YaRN's
        cos, sin = 1.1 * (angle * (1 + layer)).cos(), 1.1 * (angle * (1 + layer)).sin()
        if layer in layers_without_rope:
            tables.append((None, None))
        else:
            tables.append((cos.contiguous(), sin.contiguous()))
            at = position_of_slot
            x, y = content[..., :half], content[..., half : 2 * half]
            c, s = cos[at][:, None], sin[at][:, None]
            content = torch.cat([x * c - y * s, y * c + x * s, content[..., 2 * half :]], -1)
        keys.append(content.to(kv_dtype))
        shape = (num_slots, num_kv_heads, head_dim)
        values.append(torch.randn(shape, generator=generator, device=device).to(kv_dtype))
    geometry = ClusteringGeometry(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_half=half,
        kv_dtype=kv_dtype,
        segment_size=segment_size,
        num_sink_tokens=num_sink_tokens,
        tokens_per_cluster=tokens_per_cluster,
        max_cluster_size=max_cluster_size,
        num_lloyd_iters=num_lloyd_iters,
    )
    clusters = segment_size // tokens_per_cluster
    pool = make_pool(geometry, num_layers, num_places, clusters, centroid_dtype, device)
    cos, sin = [table[0] for table in tables], [table[1] for table in tables]
    clustering = SegmentClustering(
        geometry, pool, make_layer_table(keys, values, cos, sin), req_to_token
    )
    return ClusteringCase(geometry, keys, values, cos, sin, req_to_token, pool, clustering)


def make_pool(
    geometry: ClusteringGeometry,
    num_layers: int,
    num_places: int,
    clusters: int,
    centroid_dtype: torch.dtype | None,
    device: str,
) -> PoolPayload:
    """A pool full of what no kernel writes: NaN, or the lowest number."""
    dtype = centroid_dtype or geometry.kv_dtype
    heads = (num_layers, num_places, geometry.num_kv_heads)

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(*heads, *shape, dtype=dtype, device=device)
        fill = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        return tensor.fill_(fill)

    has_scale = dtype.itemsize == 1
    return PoolPayload(
        key_centroids=new(clusters, geometry.head_dim, dtype=dtype),
        value_centroids=new(clusters, geometry.head_dim, dtype=dtype),
        key_scale=new(clusters, dtype=torch.float32) if has_scale else None,
        value_scale=new(clusters, dtype=torch.float32) if has_scale else None,
        cluster_sizes=new(clusters, dtype=torch.int16),
        key_variance=new(clusters, dtype=torch.float32),
        pair_weight=new(geometry.head_dim // 2, dtype=torch.float32),
        members=new(geometry.segment_size, dtype=torch.int16),
        member_begin=new(clusters, dtype=torch.int16),
    )
