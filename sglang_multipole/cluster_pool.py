"""The cluster pool: the KV pool's side-car, one place a segment.

Nothing here is tied to a request, a row or a node of the radix tree. A segment is identified by the
KV slots of its tokens and the slots' generations; what does not match is not used. The layout is in
docs/architecture.md.
"""

from __future__ import annotations

import dataclasses

import torch

from multipole_kernels import reference
from multipole_kernels.decode_buffers import PoolLayer
from multipole_kernels.reference import ClusterSummary
from sglang_multipole.config import MultipoleConfig


@dataclasses.dataclass(frozen=True)
class PoolShape:
    """Sizes that the cluster pool takes from the model and from SGLang's pools.

    num_slots counts KV slots with the padding page; num_rows rows of req_to_token.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_slots: int
    num_rows: int
    dtype: torch.dtype
    device: torch.device | str


_EIGHT_BITS = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


def centroid_dtype(config: MultipoleConfig, kv_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which centroids of a KV pool of kv_dtype are stored."""
    return _EIGHT_BITS.get(config.centroid_dtype, kv_dtype)


def place_bytes(
    config: MultipoleConfig,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: torch.dtype,
) -> int:
    """Bytes of one place (one segment, all layers and KV heads of this rank)."""
    num_clusters, size = config.clusters_per_segment, config.segment_size
    dtype = centroid_dtype(config, kv_dtype)
    per_cluster = 2 * head_dim * dtype.itemsize + 2 + 4 + 2  # centroids, size, variance, begin
    if dtype in _EIGHT_BITS.values():
        per_cluster += 2 * 4  # scales
    per_head = num_clusters * per_cluster + 4 * (head_dim // 2) + 2 * size  # pair weight, members
    return num_layers * num_kv_heads * per_head + 8 * size + 12


class ClusterPool:
    """Device state of all segments. Place 0, slot 0 and row 0 are padding and never match."""

    def __init__(self, config: MultipoleConfig, shape: PoolShape, num_places: int):
        self.config, self.shape, self.num_places = config, shape, num_places
        clusters, size = config.clusters_per_segment, config.segment_size
        per_head = (shape.num_layers, num_places, shape.num_kv_heads)

        def zeros(*dims: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*dims, dtype=dtype, device=shape.device)

        dtype = centroid_dtype(config, shape.dtype)
        self.key_centroids = zeros(*per_head, clusters, shape.head_dim, dtype=dtype)
        self.value_centroids = zeros(*per_head, clusters, shape.head_dim, dtype=dtype)
        self.key_scale: torch.Tensor | None = None
        self.value_scale: torch.Tensor | None = None
        if dtype in _EIGHT_BITS.values():
            self.key_scale = zeros(*per_head, clusters, dtype=torch.float32)
            self.value_scale = zeros(*per_head, clusters, dtype=torch.float32)
        self.cluster_sizes = zeros(*per_head, clusters, dtype=torch.int16)
        self.key_variance = zeros(*per_head, clusters, dtype=torch.float32)
        self.pair_weight = zeros(*per_head, shape.head_dim // 2, dtype=torch.float32)
        self.members = zeros(*per_head, size, dtype=torch.int16)
        self.member_begin = zeros(*per_head, clusters, dtype=torch.int16)

        self.segment_slots = zeros(num_places, size, dtype=torch.int32)
        self.segment_slot_generation = zeros(num_places, size, dtype=torch.int32)
        self.segment_extent = zeros(num_places, dtype=torch.int32)
        self.last_used = zeros(num_places, dtype=torch.int64)
        self.segment_of_slot = zeros(shape.num_slots, dtype=torch.int32)
        self.slot_generation = zeros(shape.num_slots, dtype=torch.int32)
        self.open_place = zeros(shape.num_rows, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, torch.Tensor))

    def invalidate_slots(self, slots: torch.Tensor) -> None:
        """The slots can get new content: no segment that holds one of them is found again."""
        self.slot_generation[slots] += 1

    def clear(self) -> None:
        """Forget every segment; what the KV pool's own clear leaves behind is not found either."""
        self.slot_generation += 1
        self.segment_extent.zero_()
        self.segment_of_slot.zero_()
        self.open_place.zero_()

    def kill(self, places: torch.Tensor) -> None:
        """No row finds these places, [M] int64, from here on."""
        self.segment_extent[places] = 0

    def layer(self, index: int) -> PoolLayer:
        """One layer's part, as the kernels take it."""
        return PoolLayer(
            key_centroids=self.key_centroids[index],
            value_centroids=self.value_centroids[index],
            cluster_sizes=self.cluster_sizes[index],
            key_variance=self.key_variance[index],
            pair_weight=self.pair_weight[index],
            members=self.members[index],
            member_begin=self.member_begin[index],
            segment_slots=self.segment_slots,
            key_scale=None if self.key_scale is None else self.key_scale[index],
            value_scale=None if self.value_scale is None else self.value_scale[index],
        )

    def store(
        self,
        layers: slice,
        places: torch.Tensor,
        summary: ClusterSummary,
        members: torch.Tensor,
    ) -> None:
        """Write the payload of places [M] in some layers; nothing finds it before publish.

        Args:
            summary: of K' <= K clusters; its leading dimensions are [layers, M, H].
            members: [layers, M, H, T] offsets in the segment, sorted by cluster.
        """
        sizes = summary.cluster_sizes
        used = slice(0, sizes.shape[-1])
        self.cluster_sizes[layers, places] = 0
        self.cluster_sizes[layers, places, :, used] = sizes.short()
        self.member_begin[layers, places, :, used] = (sizes.cumsum(-1) - sizes).short()
        self.members[layers, places, :, : members.shape[-1]] = members.short()
        self.key_variance[layers, places, :, used] = summary.key_variance
        self.pair_weight[layers, places] = summary.pair_weight
        for pool, scales, centroids in (
            (self.key_centroids, self.key_scale, summary.key_centroids),
            (self.value_centroids, self.value_scale, summary.value_centroids),
        ):
            if scales is not None:
                centroids, scale = reference.quantize_centroids(centroids, pool.dtype)
                scales[layers, places, :, used] = scale
            pool[layers, places, :, used] = centroids.to(pool.dtype)

    def matches(
        self, places: torch.Tensor, slots: torch.Tensor, extent: torch.Tensor
    ) -> torch.Tensor:
        """[*] bool: the place holds a live segment of exactly these slots.

        Args:
            places: [*] int, 0 for none.
            slots: [*, S] int, the segment's slots in the row.
            extent: [*] int, tokens of it that must match; the rest is not compared.
        """
        same = (self.segment_slots[places] == slots) & (
            self.segment_slot_generation[places] == self.slot_generation[slots]
        )
        offset = torch.arange(slots.shape[-1], device=slots.device)
        behind = offset >= extent.unsqueeze(-1)
        return (places > 0) & (extent > 0) & (same | behind).all(-1)

    def find(
        self, rows: torch.Tensor, slots: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find each row's segments.

        Args:
            rows: [B] int64, rows of req_to_token.
            slots: [B, N, S] int64, the slots of each row's first N segments; anything valid beyond
                the row's length.
            wanted: [B, N] int32, tokens of the segment that may be under clusters: S for a sealed
                segment, less for the open one, 0 behind it.

        Returns:
            place [B, N] int64, 0 where none is found, and extent [B, N] int64, its tokens.
        """
        size = self.config.segment_size
        is_sealed = wanted == size
        # one slot belongs to one prefix, so the last token's slot names a sealed segment
        sealed_place = self.segment_of_slot[slots[..., -1]]
        open_place = self.open_place[rows].unsqueeze(-1)
        place = torch.where(is_sealed, sealed_place, open_place) * (wanted > 0)
        place = place.long()
        extent = self.segment_extent[place].long()
        # an open place that reaches further than this row may is another request's
        usable = torch.where(is_sealed, extent == size, extent <= wanted)
        found = usable & self.matches(place, slots, extent)
        return place * found, extent * found

    def describe(self, places: torch.Tensor, slots: torch.Tensor) -> None:
        """Say of which tokens places will hold the clusters; no row finds them until `publish`.

        If a slot gets new content between the two, no row finds them ever.

        Args:
            places: [M] int64.
            slots: [M, largest extent] int64; anything valid behind a shorter extent.
        """
        self.kill(places)
        width = slots.shape[1]
        self.segment_slots[places, :width] = slots.int()
        self.segment_slot_generation[places, :width] = self.slot_generation[slots]

    def publish(
        self,
        places: torch.Tensor,
        slots: torch.Tensor,
        rows: torch.Tensor,
        extents: torch.Tensor,
        num_sealed: int,
    ) -> None:
        """Make built places findable: full ones by their last slot, open ones by their row.

        Args:
            places, rows, extents: [M] int64; the first num_sealed are full segments.
            slots: [M, largest extent] int64, the rows' own; anything valid behind a shorter extent.
        """
        self.segment_extent[places] = extents.int()
        self.segment_of_slot[slots[:num_sealed, -1]] = places[:num_sealed].int()
        self.open_place[rows[num_sealed:]] = places[num_sealed:].int()

    def check_integrity(self) -> None:
        """Compare what lies in the pool with its invariants (synchronises; not for the hot path).

        Raises:
            RuntimeError: an invariant is broken; the message has the place and the numbers.
        """
        size, sinks = self.config.segment_size, self.config.num_sink_tokens
        for place in self.segment_extent.nonzero().flatten().tolist():
            extent = int(self.segment_extent[place])
            if place == 0 or not 0 < extent <= size:
                raise RuntimeError(f"ClusterPool: place {place} has extent {extent} of {size}")
            totals = self.cluster_sizes[:, place].long().sum(-1)
            first = totals.flatten()[0].item()
            if first not in (extent, extent - sinks) or (totals != first).any():
                raise RuntimeError(
                    f"ClusterPool: place {place} has {extent} tokens, {sinks} of them may be "
                    f"sinks; its clusters hold {totals.min().item()} to {totals.max().item()}"
                )
            if int(self.cluster_sizes[:, place].max()) > self.config.max_cluster_size:
                raise RuntimeError(f"ClusterPool: place {place} has a cluster over the size cap")
            members = self.members[:, place, :, :first].long().sort(-1).values
            expected = torch.arange(extent - first, extent, device=members.device)
            if (members != expected).any():
                raise RuntimeError(f"ClusterPool: place {place} misses or repeats a member")
        stored = ("key_centroids", "value_centroids", "key_variance", "pair_weight")
        for name in stored:
            if not getattr(self, name).float().isfinite().all():
                raise RuntimeError(f"ClusterPool: {name} holds a value that is not finite")
