"""Inputs of the decode benchmarks: one pool of many rows, whose rows are taken in turn.

A replayed graph goes through as many groups of rows as it takes to find each group out of L2, as a
server finds a layer's inputs when other layers have come between. Groups share the pools and the
workspace; they differ in their slots, their places and their queries.
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.captured_keys import CapturedKeys
from multipole_kernels import reference
from sglang_multipole.segment_size import segment_size_for
from tests.decode_case import DecodeCase, make_case, make_plan
from tests.decode_keys import Mixture

NUM_RECENT = 200  # tokens; between one and two recluster intervals
# a replay touches at least this many times the L2 cache
L2_TIMES = 3
MAX_GROUPS = 128
CENTROIDS = {"bf16": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A model's attention, and how its keys are clustered; the server's defaults."""

    num_kv_heads: int
    rope_base: float
    num_q_heads: int = 32
    head_dim: int = 128
    tokens_per_cluster: int = 16
    max_cluster_size: int = 128
    max_logit_variance: float = 2.0

    @property
    def gqa_group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def segment_size(self) -> int:
        return segment_size_for(self.rope_base)

    @property
    def clusters_per_segment(self) -> int:
        return self.segment_size // self.tokens_per_cluster

    def least_bytes(self, context: int) -> int:
        """Of one row's step with 8-bit centroids and a small budget."""
        clusters = context // self.tokens_per_cluster
        tokens = NUM_RECENT + 128
        return self.num_kv_heads * self.head_dim * 2 * (clusters + 2 * tokens)


def make_rows(
    geometry: Geometry, context: int, largest_batch: int, captured: str | None = None
) -> DecodeCase:
    """Really clustered rows of one length, enough for largest_batch and for a cold L2.

    captured: a file of benchmarks.capture_keys; keys are a mixture without one.
    """
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    num_rows = -(-L2_TIMES * l2_bytes // geometry.least_bytes(context))
    num_rows = -(-num_rows // largest_batch) * largest_batch
    shape = (geometry.num_kv_heads, geometry.gqa_group_size)
    if captured is None:
        source = Mixture(*shape, geometry.head_dim)
    else:
        source = CapturedKeys(captured, *shape, "cuda")
    return make_case(
        [context] * num_rows,
        [0] * num_rows,
        num_kv_heads=geometry.num_kv_heads,
        gqa_group_size=geometry.gqa_group_size,
        head_dim=geometry.head_dim,
        segment_size=geometry.segment_size,
        clusters_per_segment=geometry.clusters_per_segment,
        max_cluster_size=geometry.max_cluster_size,
        max_logit_variance=geometry.max_logit_variance,
        recent=NUM_RECENT,
        source=source,
    )


def with_centroids(case: DecodeCase, name: str) -> DecodeCase:
    """The case with centroids of another dtype, from those in the model's."""
    dtype = CENTROIDS[name]
    if dtype is None:
        return case
    pool = dataclasses.replace(case.pool_layer)
    pool.key_centroids, pool.key_scale = reference.quantize_centroids(
        pool.key_centroids.float(), dtype
    )
    pool.value_centroids, pool.value_scale = reference.quantize_centroids(
        pool.value_centroids.float(), dtype
    )
    return dataclasses.replace(case, pool_layer=pool)


def groups_of_rows(
    case: DecodeCase, batch: int, budget: int, bytes_touched: int
) -> list[DecodeCase]:
    """The case's rows in groups of batch: as many as together touch L2_TIMES the L2 cache.

    budget in tokens; bytes_touched by the step of one row.
    """
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    wanted = min(MAX_GROUPS, -(-L2_TIMES * l2_bytes // (batch * bytes_touched)))
    available = len(case.rows) // batch
    groups = []
    for nth in range(min(wanted, available)):
        chosen = slice(nth * batch, (nth + 1) * batch)
        rows, budgets = case.rows[chosen], [budget] * batch
        plan = make_plan(rows, budgets, 0, case.q.device)
        groups.append(
            dataclasses.replace(case, q=case.q[chosen], rows=rows, budgets=budgets, plan=plan)
        )
    return groups


def bytes_moved(case: DecodeCase) -> int:
    """What the case's last step must have read and written, once each, in bytes."""
    workspace, pool = case.workspace, case.pool_layer
    heads, head_dim, group = workspace.num_kv_heads, workspace.head_dim, workspace.gqa_group_size
    items = int(case.plan.item_indptr[-1])
    clusters = items * heads * workspace.clusters_per_segment
    tiles = items * heads * workspace.tiles_per_segment
    size = pool.key_centroids.element_size()
    per_cluster = 2 * head_dim * size + 2 + 4 + (8 if size == 1 else 0)
    per_cluster += 2 * 2 * group  # weights, written and read
    per_tile = 4 * (head_dim // 2) + 3 * 4 * group  # pair weight; shift, spread
    exact = int(case.plan.exact_indptr[-1]) * heads
    selected = int(workspace.num_selected_tokens[: len(case.rows)].sum())
    return clusters * per_cluster + tiles * per_tile + (exact + selected) * 2 * head_dim * 2
