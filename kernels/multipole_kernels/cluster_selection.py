"""Cluster selection: each KV head's best clusters, whole, up to a token budget.

    rank(cluster) = sum over the query heads g of exp(score_g - lse_g)

lse_g is the log of the full denominator. Clusters are taken best first (a tie takes the lower
index) while their sizes sum to at most the budget; the first that does not fit ends the list; the
best is always taken unless the budget is 0 (reference.cluster_selection). Listed are the clusters
and the KV slots of their tokens. The same launch merges the coarse parts, on blocks of its own.

The kernel is CUDA C++ (cluster_selection.cu). Tensors in host memory, of the Triton interpreter,
are selected from by host_selection. A row without items selects nothing.
"""

from __future__ import annotations

from multipole_kernels.cuda_kernel import cuda_kernel
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer
from multipole_kernels.host_selection import host_selection


def cluster_selection(
    num_rows: int, pool_layer: PoolLayer, plan: DecodePlan, workspace: DecodeWorkspace
) -> None:
    """List the selected clusters and their tokens' slots, and merge the coarse parts.

    Runs after coarse_attention; plan.token_budget is cut to the workspace's budget_capacity.
    """
    device = workspace.selected_slots.device
    if device.type == "cpu":
        host_selection(num_rows, pool_layer, plan, workspace)
        return
    config = workspace.config
    kernel = cuda_kernel(
        "cluster_selection.cu",
        "cluster_selection",
        tuple(selection_constants(pool_layer, workspace).items()),
        device,
    )
    num_row_heads = num_rows * workspace.num_kv_heads
    resident = workspace.resident_clusters
    # a rank, a size and a begin for each cluster, a place for each segment
    shared_bytes = 8 * resident + 4 * (resident // workspace.clusters_per_segment)
    kernel.launch(
        grid=2 * num_row_heads,
        threads=config.select_threads,
        shared_bytes=shared_bytes,
        overlap=config.overlap_launches,
        # in the order of the kernel's struct
        pointers=[
            plan.item_indptr,
            plan.item_place,
            plan.token_budget,
            workspace.chunk_indptr,
            pool_layer.cluster_sizes,
            pool_layer.member_begin,
            pool_layer.members,
            pool_layer.segment_slots,
            workspace.cluster_weight,
            workspace.weight_shift_log2,
            workspace.part_max_log2,
            workspace.part_sum,
            workspace.part_acc,
            workspace.coarse_max_log2,
            workspace.coarse_sum,
            workspace.coarse_acc,
            workspace.long_row_ranks,
            workspace.selected_clusters,
            workspace.selected_slots,
            workspace.num_selected_clusters,
            workspace.num_selected_tokens,
            workspace.num_clustered_tokens,
        ],
        numbers=[
            num_row_heads,
            resident,
            workspace.selected_clusters.shape[2],
            workspace.selected_capacity,
            workspace.budget_capacity,
        ],
    )


def selection_constants(pool_layer: PoolLayer, workspace: DecodeWorkspace) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {
        "NUM_KV_HEADS": workspace.num_kv_heads,
        "GROUP": workspace.gqa_group_size,
        "HEAD_DIM": workspace.head_dim,
        "CLUSTERS": workspace.clusters_per_segment,
        "TILE_CLUSTERS": workspace.tile_clusters,
        "SEGMENT_SIZE": pool_layer.segment_slots.shape[1],
        "THREADS": workspace.config.select_threads,
    }
