"""A ragged decode batch over really clustered keys: KV pool, cluster pool, plan, and its reference.

Also the benchmark's inputs. Keys are a mixture (tests/decode_keys.py), or come from another source.
"""

from __future__ import annotations

import dataclasses

import torch

from multipole_kernels import reference
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer
from multipole_kernels.decode_plan import plan_chunks
from multipole_kernels.launch_config import LaunchConfig
from multipole_kernels.multipole_decode import multipole_decode
from tests.decode_keys import Mixture, Source
from tests.tolerance import assert_error_within

NUM_SINK_TOKENS = 10


@dataclasses.dataclass
class Row:
    """One request: its tokens' slots, and each segment's place and cluster ids."""

    slots: torch.Tensor  # [length] int64
    num_clustered_tokens: int  # a prefix, sinks included; 0 below the gate
    places: list[int] = dataclasses.field(default_factory=list)
    cluster_ids: list[torch.Tensor] = dataclasses.field(default_factory=list)  # [H, tokens]


@dataclasses.dataclass
class DecodeCase:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    pool_layer: PoolLayer
    plan: DecodePlan
    workspace: DecodeWorkspace
    rows: list[Row]
    budgets: list[int]
    sm_scale: float
    max_logit_variance: float

    def decode(
        self, counters: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One step of multipole_decode; out is made, and poisoned, if not given."""
        return multipole_decode(
            self.q,
            self.k_cache,
            self.v_cache,
            self.pool_layer,
            self.plan,
            self.workspace,
            self.sm_scale,
            self.max_logit_variance,
            torch.full_like(self.q, torch.nan) if out is None else out,
            counters,
        )


def make_case(
    lengths: list[int],
    budgets: list[int],
    *,
    num_kv_heads: int = 2,
    gqa_group_size: int = 4,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    centroid_dtype: torch.dtype | None = None,
    segment_size: int = 256,
    clusters_per_segment: int = 16,
    max_cluster_size: int | None = None,
    min_context: int = 300,
    recent: int = 40,
    max_logit_variance: float = 4.0,
    padding_rows: int = 0,
    config: LaunchConfig | None = None,
    seed: int = 0,
    device: str | None = None,
    source: Source | None = None,
) -> DecodeCase:
    """A batch with one row per length; a length below min_context is attended exactly.

    Clusters are of at most max_cluster_size tokens, by default of 4 times the mean.
    """
    source = source or Mixture(num_kv_heads, gqa_group_size, head_dim)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device=device).manual_seed(seed)
    max_cluster_size = max_cluster_size or 4 * segment_size // clusters_per_segment
    num_slots = sum(lengths) + 64
    k_cache = torch.full((num_slots, num_kv_heads, head_dim), torch.nan, device=device, dtype=dtype)
    v_cache = k_cache.clone()
    # slots in no order, as in a pool that has lived
    shuffled = 1 + torch.randperm(num_slots - 1, generator=generator, device=device)
    q, rows, used = [], [], 0
    for length in lengths:
        slots = shuffled[used : used + length]
        used += length
        if length:
            keys, values, query = source.make(length, generator)
            k_cache[slots], v_cache[slots] = keys.to(dtype), values.to(dtype)
            q.append(query)
        else:
            q.append(torch.ones(num_kv_heads * gqa_group_size, head_dim, device=device))
        clustered = max(0, length - recent) if length >= min_context else 0
        if clustered % segment_size < 2 * clusters_per_segment:
            clustered -= clustered % segment_size
        rows.append(Row(slots=slots, num_clustered_tokens=clustered))
    pool_layer = _make_pool(
        rows, k_cache, v_cache, segment_size, clusters_per_segment, max_cluster_size,
        centroid_dtype or dtype, generator, source,
    )  # fmt: skip
    budgets = list(budgets)
    plan = make_plan(rows, budgets, padding_rows, device)
    q += [torch.ones_like(q[0])] * padding_rows
    num_items = [len(row.places) for row in rows]
    workspace = DecodeWorkspace(
        max_rows=len(rows) + padding_rows,
        max_items=max(1, sum(num_items)),
        max_items_per_row=max(1, *num_items) if num_items else 1,
        budget_capacity=max(budgets),
        num_kv_heads=num_kv_heads,
        gqa_group_size=gqa_group_size,
        head_dim=head_dim,
        clusters_per_segment=clusters_per_segment,
        max_cluster_size=max_cluster_size,
        device=device,
        config=config,
    )
    plan_chunks(plan, workspace, len(q), pool_layer.key_centroids.element_size())
    return DecodeCase(
        q=torch.stack(q).to(dtype),
        k_cache=k_cache,
        v_cache=v_cache,
        pool_layer=pool_layer,
        plan=plan,
        workspace=workspace,
        rows=rows,
        budgets=budgets,
        sm_scale=head_dim**-0.5,
        max_logit_variance=max_logit_variance,
    )


def _make_pool(
    rows: list[Row],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    segment_size: int,
    num_clusters: int,
    max_cluster_size: int,
    centroid_dtype: torch.dtype,
    generator: torch.Generator,
    source: Source,
) -> PoolLayer:
    num_kv_heads, head_dim = k_cache.shape[1:]
    device = k_cache.device
    counts = [-(-row.num_clustered_tokens // segment_size) for row in rows]
    num_places = 1 + sum(counts)  # place 0 is never used
    free = (1 + torch.randperm(num_places - 1, generator=generator, device=device)).tolist()

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(num_places, *shape, dtype=dtype, device=device)

    heads = (num_kv_heads, num_clusters)
    has_scale = centroid_dtype in (torch.int8, torch.float8_e4m3fn)
    pool = PoolLayer(
        key_centroids=new(*heads, head_dim, dtype=centroid_dtype),
        value_centroids=new(*heads, head_dim, dtype=centroid_dtype),
        cluster_sizes=new(*heads, dtype=torch.int16),
        key_variance=new(*heads, dtype=torch.float32),
        pair_weight=new(num_kv_heads, head_dim // 2, dtype=torch.float32),
        members=new(num_kv_heads, segment_size, dtype=torch.int16),
        member_begin=new(*heads, dtype=torch.int16),
        segment_slots=new(segment_size, dtype=torch.int32),
        key_scale=new(*heads, dtype=torch.float32) if has_scale else None,
        value_scale=new(*heads, dtype=torch.float32) if has_scale else None,
    )
    for segment in range(max(counts, default=0)):
        begin = segment * segment_size
        sinks = NUM_SINK_TOKENS if segment == 0 else 0
        ends = [
            (min(row.num_clustered_tokens, begin + segment_size), len(row.slots)) for row in rows
        ]
        for end, length in sorted({end for end in ends if end[0] > begin}):
            members = [
                row for row, row_end in zip(rows, ends, strict=True) if row_end == (end, length)
            ]
            places = [free.pop() for _ in members]
            # [n, tokens]
            slots = torch.stack([row.slots[begin:end] for row in members])
            # [n, H, tokens, D]
            keys = k_cache[slots[:, sinks:]].transpose(1, 2)
            values = v_cache[slots[:, sinks:]].transpose(1, 2)
            # an unfinished segment has fewer clusters, of the same mean size
            used = -(-(end - begin) * num_clusters // segment_size)
            features = source.features(keys.float(), begin + sinks, length)
            ids = reference.cluster_segment(features, used, max_cluster_size, 4, segment)
            summary = reference.summarize_clusters(keys, values, ids, num_clusters)
            key_centroids, value_centroids, sizes, variance, pair_weight = summary
            if has_scale:
                key_centroids, pool.key_scale[places] = reference.quantize_centroids(
                    key_centroids, centroid_dtype
                )
                value_centroids, pool.value_scale[places] = reference.quantize_centroids(
                    value_centroids, centroid_dtype
                )
            pool.key_centroids[places] = key_centroids.to(centroid_dtype)
            pool.value_centroids[places] = value_centroids.to(centroid_dtype)
            pool.cluster_sizes[places] = sizes.to(torch.int16)
            pool.key_variance[places] = variance
            pool.pair_weight[places] = pair_weight
            sorted_members = ids.argsort(dim=-1, stable=True) + sinks
            pool.members[places, :, : end - begin - sinks] = sorted_members.to(torch.int16)
            pool.member_begin[places] = (sizes.cumsum(-1) - sizes).to(torch.int16)
            pool.segment_slots[places, : end - begin] = slots.to(torch.int32)
            for nth, (row, place) in enumerate(zip(members, places, strict=True)):
                row.places.append(place)
                row.cluster_ids.append(ids[nth])
    return pool


def make_plan(
    rows: list[Row], budgets: list[int], padding_rows: int, device: torch.device | str
) -> DecodePlan:
    """What a step over the rows attends to; rows of padding behind them attend to nothing."""
    exact = []
    for row in rows:
        sinks = NUM_SINK_TOKENS if row.num_clustered_tokens else 0
        exact.append(torch.cat([row.slots[:sinks], row.slots[row.num_clustered_tokens :]]))

    def indptr(counts: list[int]) -> torch.Tensor:
        counts = torch.tensor([0, *counts, *[0] * padding_rows])
        return counts.cumsum(0).to(device, torch.int32)

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return DecodePlan(
        item_indptr=indptr([len(row.places) for row in rows]),
        item_place=int32([place for row in rows for place in row.places] or [0]),
        exact_indptr=indptr([len(slots) for slots in exact]),
        exact_slots=torch.cat([*exact, torch.zeros(1, dtype=torch.int64, device=device)]).int(),
        token_budget=int32(budgets + [0] * padding_rows),
    )


def reference_inputs(case: DecodeCase, nth: int, dtype: torch.dtype) -> dict[str, object]:
    """The arguments of reference.multipole_attention for one row, keys and values in dtype."""
    row, pool = case.rows[nth], case.pool_layer
    num_kv_heads = case.k_cache.shape[1]
    device = case.k_cache.device
    num_clusters = case.workspace.clusters_per_segment
    cluster_ids = torch.full((num_kv_heads, len(row.slots)), -1, device=device)
    segment_size = pool.segment_slots.shape[1]
    for segment, ids in enumerate(row.cluster_ids):
        sinks = NUM_SINK_TOKENS if segment == 0 else 0
        begin = segment * segment_size + sinks
        cluster_ids[:, begin : begin + ids.shape[-1]] = ids + segment * num_clusters
    places = torch.tensor(row.places, dtype=torch.int64, device=device)

    def of_row(tensor: torch.Tensor) -> torch.Tensor:
        # [segments, H, K, ...] -> [H, segments * K, ...]
        return tensor[places].transpose(0, 1).flatten(1, 2)

    def centroids(quantized: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return of_row(reference.dequantize_centroids(quantized, scale))

    return {
        "q": case.q[nth].to(dtype),
        "keys": case.k_cache[row.slots].to(dtype),
        "values": case.v_cache[row.slots].to(dtype),
        "cluster_ids": cluster_ids,
        "key_centroids": centroids(pool.key_centroids, pool.key_scale),
        "value_centroids": centroids(pool.value_centroids, pool.value_scale),
        "cluster_sizes": of_row(pool.cluster_sizes).int(),
        "key_variance": of_row(pool.key_variance),
        "pair_weight": of_row(pool.pair_weight.unsqueeze(2).expand(*pool.key_variance.shape, -1)),
        "token_budget": case.budgets[nth],
        "sm_scale": case.sm_scale,
        "max_logit_variance": case.max_logit_variance,
    }


def selected_flags(case: DecodeCase, nth: int) -> torch.Tensor:
    """[H, K] bool: the clusters of a row that the last decode step selected."""
    workspace = case.workspace
    num_clusters = len(case.rows[nth].places) * workspace.clusters_per_segment
    flags = torch.zeros(workspace.num_kv_heads, num_clusters, dtype=torch.bool)
    for head in range(workspace.num_kv_heads):
        count = int(workspace.num_selected_clusters[nth, head])
        flags[head, workspace.selected_clusters[nth, head, :count].cpu().long()] = True
    return flags.to(case.q.device)


def attention_given_selection(
    case: DecodeCase, nth: int, selected: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[H * G, D] reference output, in dtype, of a row whose selection [H, K] is given.

    Two clusters that rank alike to rounding may be taken either way; this separates the question
    of what was selected from that of how it was attended to.
    """
    given = reference_inputs(case, nth, dtype)
    num_kv_heads, head_dim = given["keys"].shape[1:]
    q = given["q"].view(num_kv_heads, -1, head_dim)
    keys, values = given["keys"].transpose(0, 1), given["values"].transpose(0, 1)
    ids, sizes = given["cluster_ids"], given["cluster_sizes"]
    # a token in no cluster, -1, looks at the last column
    of_token = torch.nn.functional.pad(selected, (0, 1), value=True)
    exactly = of_token.gather(-1, ids.where(ids >= 0, selected.shape[-1]))
    exact_out, exact_lse = reference.exact_attention(q, keys, values, exactly, case.sm_scale)
    scores = reference.centroid_lookup(q, given["key_centroids"], case.sm_scale)
    variance = reference.logit_variance(
        q, given["key_variance"], given["pair_weight"], case.sm_scale
    )
    tail = reference.tail_logits(scores, sizes, variance, case.max_logit_variance)
    tail_out, tail_lse = reference.centroid_attention(tail, given["value_centroids"], selected)
    out, _ = reference.merge_states(
        torch.stack([exact_out, tail_out], -2), torch.stack([exact_lse, tail_lse], -1)
    )
    return out.flatten(0, 1)


def assert_matches_reference(case: DecodeCase, out: torch.Tensor) -> None:
    """Every row selects what the reference does and is within tolerance; padding is 0."""
    for nth, row in enumerate(case.rows):
        if not row.slots.numel():
            assert (out[nth] == 0).all()
            continue
        truth, _, selected = reference.multipole_attention(
            **reference_inputs(case, nth, torch.float32)
        )
        baseline, _, _ = reference.multipole_attention(**reference_inputs(case, nth, case.q.dtype))
        torch.testing.assert_close(selected_flags(case, nth), selected, rtol=0, atol=0)
        assert_error_within(f"row {nth}", out[nth], truth, baseline)
    assert (out[len(case.rows) :] == 0).all()
