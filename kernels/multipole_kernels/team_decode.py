"""A whole decode step of one layer in one launch, for small batches on Hopper.

A team of blocks, a thread-block cluster, attends for each (row, KV head): its blocks divide the
row's clusters and tokens and talk through each other's shared memory. What takes three launches
elsewhere has no launch, and no state in global memory, between its steps. CUDA C++
(team_decode.cu).
"""

from __future__ import annotations

import torch

from multipole_kernels.cuda_kernel import cuda_kernel
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer
from multipole_kernels.launch_config import Team

_CENTROIDS = {torch.int8: 1, torch.float8_e4m3fn: 2}


def team_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pool_layer: PoolLayer,
    plan: DecodePlan,
    workspace: DecodeWorkspace,
    sm_scale: float,
    max_logit_variance: float,
    out: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> None:
    """Attend every row's query to its context; arguments as of multipole_decode.

    workspace.team(num_rows) must not be None. Fills the workspace's selected_* and num_* tensors as
    cluster_selection does.
    """
    num_rows = q.shape[0]
    team = workspace.team(num_rows)
    kernel = cuda_kernel(
        "team_decode.cu",
        "team_decode",
        tuple(team_constants(q.dtype, pool_layer, workspace, team).items()),
        q.device,
    )
    kernel.launch(
        grid=num_rows * workspace.num_kv_heads * team.blocks,
        threads=team.threads,
        shared_bytes=_shared_bytes(workspace, team),
        overlap=workspace.config.overlap_launches,
        cluster=team.blocks,
        # in the order of the kernel's struct
        pointers=[
            q,
            k_cache,
            v_cache,
            out,
            pool_layer.key_centroids,
            pool_layer.value_centroids,
            pool_layer.key_scale,
            pool_layer.value_scale,
            pool_layer.cluster_sizes,
            pool_layer.key_variance,
            pool_layer.pair_weight,
            pool_layer.member_begin,
            pool_layer.members,
            pool_layer.segment_slots,
            plan.item_indptr,
            plan.item_place,
            plan.exact_indptr,
            plan.exact_slots,
            plan.token_budget,
            workspace.team_long_scores,
            workspace.team_long_ranks,
            workspace.team_long_spread,
            workspace.selected_clusters,
            workspace.selected_slots,
            workspace.num_selected_clusters,
            workspace.num_selected_tokens,
            workspace.num_clustered_tokens,
            workspace.heads_arrived,
            counters,
        ],
        numbers=[
            float(sm_scale),
            float(max_logit_variance),
            workspace.team_resident_clusters(team),
            workspace.selected_clusters.shape[2],
            workspace.selected_capacity,
            workspace.budget_capacity,
            q.stride(0),
            out.stride(0),
            k_cache.stride(0),
            int(counters is not None),
        ],
    )


def _shared_bytes(workspace: DecodeWorkspace, team: Team) -> int:
    """Dynamic shared memory of a block: its tables, and in the end the output's parts instead."""
    heads_stride = workspace.gqa_group_size + workspace.gqa_group_size % 2
    resident = workspace.team_resident_clusters(team)
    segments = resident // workspace.clusters_per_segment + 1
    tables = 4 * (resident * (heads_stride + 5) + segments * (heads_stride + 1))
    parts = team.threads // 32 * 4 * workspace.gqa_group_size * (workspace.head_dim + 8)
    return max(tables, parts)


def team_constants(
    dtype: torch.dtype, pool_layer: PoolLayer, workspace: DecodeWorkspace, team: Team
) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {
        "NUM_KV_HEADS": workspace.num_kv_heads,
        "GROUP": workspace.gqa_group_size,
        "HEAD_DIM": workspace.head_dim,
        "CLUSTERS": workspace.clusters_per_segment,
        "SEGMENT_SIZE": pool_layer.segment_slots.shape[1],
        "TEAM": team.blocks,
        "THREADS": team.threads,
        "BLOCKS_PER_SM": team.blocks_per_sm,
        "QUERY_IS_BF16": int(dtype == torch.bfloat16),
        "CENTROIDS": _CENTROIDS.get(pool_layer.key_centroids.dtype, 0),
        "LONG_ROWS": int(workspace.has_long_shares(team)),
    }
