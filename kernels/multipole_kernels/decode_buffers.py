"""The buffers of a decode step: what the kernels are given, and the workspace they share.

All are of fixed size and made once, so that a captured graph can own their addresses.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from multipole_kernels.launch_config import LaunchConfig, Team, launch_config

# most blocks of a (row, KV head) that take selected clusters' centroids out of the coarse state
MAX_OUT_SPLITS = 4
# of a Hopper multiprocessor
SHARED_BYTES_PER_SM = 228 * 1024
# chunks that a row of a large batch may be cut into
CHUNKS_PER_ROW = 8
# most clusters of a segment that coarse attention works on at a time: with fewer than a block has
# threads, Triton loads sizes, variance and scales where they are used, without a change of layout
MAX_TILE_CLUSTERS = 64


@dataclasses.dataclass
class PoolLayer:
    """One layer of the cluster pool: P places, H KV heads, K clusters, S tokens a segment."""

    key_centroids: torch.Tensor  # [P, H, K, D] model dtype, int8 or float8_e4m3fn
    value_centroids: torch.Tensor  # [P, H, K, D], same dtype
    cluster_sizes: torch.Tensor  # [P, H, K] int16, tokens
    key_variance: torch.Tensor  # [P, H, K] float32
    pair_weight: torch.Tensor  # [P, H, D / 2] float32, see reference.ClusterSummary
    members: torch.Tensor  # [P, H, S] int16, offsets in the segment, sorted by cluster
    member_begin: torch.Tensor  # [P, H, K] int16
    segment_slots: torch.Tensor  # [P, S] int32, shared by the layers
    key_scale: torch.Tensor | None = None  # [P, H, K] float32, with 8-bit centroids
    value_scale: torch.Tensor | None = None  # [P, H, K] float32, with 8-bit centroids


@dataclasses.dataclass
class DecodePlan:
    """What a step attends to; filled outside the graph. Rows beyond the batch have no entries."""

    item_indptr: torch.Tensor  # [rows + 1] int32
    item_place: torch.Tensor  # [max_items] int32, place in the pool
    exact_indptr: torch.Tensor  # [rows + 1] int32
    exact_slots: torch.Tensor  # [max_exact] int32, KV slots
    token_budget: torch.Tensor  # [rows] int32, tokens per KV head


class DecodeWorkspace:
    """Scratch of one decode step, reused by every layer.

    A tile is all clusters of an item, or tile_clusters of them; tile t of the step is part
    t % tiles_per_segment of item t // tiles_per_segment. `chunks` of the plan are runs of one row's
    tiles or exact tokens; plan_chunks fills them once a step. Attention states are kept as (log2 of
    the largest weight, sum of weights, unnormalised weighted sum) rather than as (out, lse): the
    third launch takes selected clusters' centroids out again, and a state with a negative sum has
    no log.
    """

    def __init__(
        self,
        max_rows: int,
        max_items: int,
        max_items_per_row: int,
        budget_capacity: int,
        num_kv_heads: int,
        gqa_group_size: int,
        head_dim: int,
        clusters_per_segment: int = 128,
        max_cluster_size: int = 128,
        device: torch.device | str = "cuda",
        config: LaunchConfig | None = None,
    ) -> None:
        """
        Args:
            max_rows: rows of the largest batch, padding included.
            max_items: usable segments of a whole batch.
            max_items_per_row: usable segments of one row: the context length in segments.
            budget_capacity: tokens; a larger token_budget is cut to it.
            max_cluster_size: tokens; no cluster of the pool is larger.
        """
        device = torch.device(device)
        self.config = config or launch_config(device)
        if not 1 <= gqa_group_size <= 16:
            raise ValueError(
                "DecodeWorkspace: gqa_group_size must be between 1 and 16, "
                f"got {gqa_group_size}; more query heads a KV head are not supported"
            )
        if clusters_per_segment % 16:
            raise ValueError(
                "DecodeWorkspace: clusters_per_segment must be a multiple of 16, "
                f"got {clusters_per_segment}"
            )
        # a power of two
        self.tile_clusters = math.gcd(clusters_per_segment, MAX_TILE_CLUSTERS)
        self.tiles_per_segment = clusters_per_segment // self.tile_clusters
        self.max_rows, self.max_items = max_rows, max_items
        self.max_items_per_row = max_items_per_row
        self.budget_capacity, self.max_cluster_size = budget_capacity, max_cluster_size
        self.num_kv_heads, self.gqa_group_size = num_kv_heads, gqa_group_size
        self.head_dim, self.clusters_per_segment = head_dim, clusters_per_segment

        config = self.config
        max_chunks = self.num_chunks(max_rows)
        self.target_exact_blocks = config.num_sms * config.exact_blocks_per_sm
        max_exact_blocks = self.target_exact_blocks + max_rows * num_kv_heads * 2
        heads = (num_kv_heads, gqa_group_size)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.chunk_row = new(max_chunks, dtype=torch.int32)
        # 1 for exact tokens, 0 for items
        self.chunk_is_exact = new(max_chunks, dtype=torch.int32)
        self.chunk_begin = new(max_chunks, dtype=torch.int32)
        self.chunk_end = new(max_chunks, dtype=torch.int32)
        # where its state is kept: a row's parts lie together, its tiles' first
        self.chunk_part = new(max_chunks, dtype=torch.int32)
        self.chunk_indptr = new(max_rows + 1, dtype=torch.int32)

        # exp(score - weight_shift) of each cluster, weight_shift the tile's largest score
        max_tiles = max_items * self.tiles_per_segment
        self.cluster_weight = new(max_tiles, *heads, self.tile_clusters, dtype=torch.float16)
        self.weight_shift_log2 = new(max_tiles, *heads)
        # variance of a query's logits per unit of key variance, by tile
        self.logit_spread = new(max_tiles, *heads)
        self.part_max_log2 = new(max_chunks, *heads)
        self.part_sum = new(max_chunks, *heads)
        self.part_acc = new(max_chunks, *heads, head_dim)
        self.coarse_max_log2 = new(max_rows, *heads)
        self.coarse_sum = new(max_rows, *heads)
        self.coarse_acc = new(max_rows, *heads, head_dim)

        self.selected_capacity = budget_capacity + max_cluster_size
        # the KV slots of the selected clusters' tokens
        self.selected_slots = new(max_rows, num_kv_heads, self.selected_capacity, dtype=torch.int32)
        # numbered over the row's items: item of the row * clusters_per_segment + cluster
        self.selected_clusters = new(max_rows, num_kv_heads, budget_capacity + 1, dtype=torch.int32)
        self.num_selected_tokens = new(max_rows, num_kv_heads, dtype=torch.int32)
        self.num_selected_clusters = new(max_rows, num_kv_heads, dtype=torch.int32)
        self.num_clustered_tokens = new(max_rows, num_kv_heads, dtype=torch.int32)
        # clusters of a row that the selection holds in shared memory; a longer row's ranks lie here
        self.resident_clusters = clusters_per_segment * min(
            config.select_resident_clusters // clusters_per_segment, max_items_per_row
        )
        has_long_rows = max_items_per_row * clusters_per_segment > self.resident_clusters
        self.long_row_ranks = new(
            max_items if has_long_rows else 0,
            num_kv_heads,
            clusters_per_segment,
            dtype=torch.int32,
        )

        self.exact_max_log2 = new(max_exact_blocks, gqa_group_size)
        self.exact_sum = new(max_exact_blocks, gqa_group_size)
        self.exact_acc = new(max_exact_blocks, gqa_group_size, head_dim)
        # what a team's block does not hold in shared memory
        self.team_long_scores = new(
            max_items if any(map(self.has_long_shares, self.config.teams)) else 0,
            num_kv_heads,
            clusters_per_segment,
            gqa_group_size + gqa_group_size % 2,
        )
        self.team_long_ranks = new(
            *self.team_long_scores.shape[:3],
            dtype=torch.int32,
        )
        self.team_long_spread = new(
            self.team_long_scores.shape[0], num_kv_heads, self.team_long_scores.shape[3]
        )
        # KV heads of a row whose teams have arrived, in the upper half; 0 between launches
        self.heads_arrived = new(max_rows, dtype=torch.int64)
        # blocks of a (row, head) that have stored their part; the last one sets it back to 0
        self.num_arrived = new(max_rows, num_kv_heads, dtype=torch.int32)

    def team(self, num_rows: int) -> Team | None:
        """The team that attends for each (row, KV head); None: three launches."""
        # more query heads or dimensions do not fit the registers; a bin's count is 16 bits
        if self.gqa_group_size > 8 or self.head_dim > 128 or self.budget_capacity >= 1 << 16:
            return None
        row_heads = num_rows * self.num_kv_heads
        row_clusters = self.max_items_per_row * self.clusters_per_segment
        for team in self.config.teams:
            if row_heads <= team.max_row_heads and row_clusters <= team.max_row_clusters:
                return team
        return None

    def team_resident_clusters(self, team: Team) -> int:
        """Clusters that one of its blocks holds in shared memory: whole segments."""
        heads = self.gqa_group_size + self.gqa_group_size % 2
        # scores, entry and rank of a cluster; spread and place of a segment
        per_segment = 4 * (self.clusters_per_segment * (heads + 5) + heads + 1)
        # the kernel asserts it
        static = 1024 * (36 + self.gqa_group_size) + 4 * self.gqa_group_size * self.head_dim
        available = SHARED_BYTES_PER_SM // team.blocks_per_sm - 1024 - static
        # a share may begin inside a segment
        fits = max(0, available // per_segment - 1)
        needed = -(-self.max_items_per_row // team.blocks) + 1
        return self.clusters_per_segment * min(fits, needed)

    def has_long_shares(self, team: Team) -> bool:
        """Whether a block of it may have more clusters than it holds in shared memory."""
        row_clusters = self.max_items_per_row * self.clusters_per_segment
        return row_clusters <= team.max_row_clusters and -(
            -row_clusters // team.blocks
        ) > self.team_resident_clusters(team)

    def num_chunks(self, num_rows: int) -> int:
        """The most chunks a batch of num_rows rows is cut into.

        Either kind of a row's chunks is rounded up: one more of each.
        """
        return self.target_chunks(num_rows) + 2 * num_rows

    def wave_chunks(self, centroid_bytes: int) -> int:
        """Chunks of each KV head that run at once; centroid_bytes of one element."""
        resident = self.config.coarse_resident_blocks[centroid_bytes == 1]
        return max(1, self.config.num_sms * resident // self.num_kv_heads)

    def target_chunks(self, num_rows: int) -> int:
        """Chunks over which a batch is spread at most: a launch has as many blocks, work or not."""
        return self.wave_chunks(1) + CHUNKS_PER_ROW * num_rows

    def num_exact_splits(self, num_rows: int) -> int:
        """Blocks over which one (row, head)'s selected tokens are spread."""
        by_card = self.target_exact_blocks // (num_rows * self.num_kv_heads)
        out_splits = self.num_out_splits(num_rows)
        by_tokens = -(-self.selected_capacity // self.config.exact_block_tokens)
        # the last block merges all parts in one go
        by_merge = self.config.merge_parts_at_once - out_splits
        return max(1, min(by_card - out_splits, by_tokens, by_merge))

    def num_out_splits(self, num_rows: int) -> int:
        """Blocks that take one (row, head)'s selected clusters out of the coarse state."""
        return max(1, min(MAX_OUT_SPLITS, self.config.num_sms // (num_rows * self.num_kv_heads)))

    @property
    def bytes(self) -> int:
        """Device memory held."""
        tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in tensors)
