"""What the kernel of cluster_selection computes, in PyTorch: for tensors in host memory.

The Triton interpreter runs the other launches of a decode step on such tensors and has no CUDA C++;
on a GPU it is the kernel's counterpart in the tests. Loops over rows and KV heads.
"""

from __future__ import annotations

import torch

from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer


def host_selection(
    num_rows: int, pool_layer: PoolLayer, plan: DecodePlan, workspace: DecodeWorkspace
) -> None:
    """List the selected clusters and their tokens' slots, and merge the coarse parts."""
    items, chunks = plan.item_indptr.tolist(), workspace.chunk_indptr.tolist()
    for row in range(num_rows):
        _merge_parts(workspace, row, slice(chunks[row], chunks[row + 1]))
        for head in range(workspace.num_kv_heads):
            budget = min(int(plan.token_budget[row]), workspace.budget_capacity)
            item_slice = slice(items[row], items[row + 1])
            places = plan.item_place[item_slice].long()
            tiles = slice(*(items[end] * workspace.tiles_per_segment for end in (row, row + 1)))
            ranks = _ranks(workspace, row, head, tiles)
            sizes = pool_layer.cluster_sizes[places, head].flatten().long()
            clusters = _take_best(ranks, sizes, budget)
            slots = [
                _slots(pool_layer, int(places[cluster // workspace.clusters_per_segment]), head,
                       cluster % workspace.clusters_per_segment)
                for cluster in clusters.tolist()
            ]  # fmt: skip
            slots = torch.cat([plan.item_place[:0], *slots])
            workspace.selected_clusters[row, head, : len(clusters)] = clusters.int()
            workspace.selected_slots[row, head, : len(slots)] = slots
            workspace.num_selected_clusters[row, head] = len(clusters)
            workspace.num_selected_tokens[row, head] = len(slots)
            workspace.num_clustered_tokens[row, head] = sizes.sum()


def _merge_parts(workspace: DecodeWorkspace, row: int, parts: slice) -> None:
    # [parts, H, G]
    part_max = workspace.part_max_log2[parts]
    merged_max = part_max.new_full(part_max.shape[1:], -torch.inf)
    if len(part_max):
        merged_max = part_max.amax(0)
    # a part that attended to nothing has no weight: exp2(-inf - 0)
    weight = (part_max - merged_max.nan_to_num(neginf=0.0)).exp2()
    workspace.coarse_max_log2[row] = merged_max
    workspace.coarse_sum[row] = (weight * workspace.part_sum[parts]).sum(0)
    workspace.coarse_acc[row] = (weight.unsqueeze(-1) * workspace.part_acc[parts]).sum(0)


def _ranks(workspace: DecodeWorkspace, row: int, head: int, tiles: slice) -> torch.Tensor:
    """[clusters of the tiles] float32, summed over the query heads in order."""
    lse_log2 = workspace.coarse_max_log2[row, head] + workspace.coarse_sum[row, head].log2()
    # [tiles, G]
    factor = (workspace.weight_shift_log2[tiles, head] - lse_log2).exp2()
    ranks = torch.zeros_like(workspace.cluster_weight[tiles, head, 0], dtype=torch.float32)
    for group in range(workspace.gqa_group_size):
        weight = workspace.cluster_weight[tiles, head, group].float()
        ranks += weight * factor[:, group, None]
    return ranks.flatten()


def _take_best(ranks: torch.Tensor, sizes: torch.Tensor, budget: int) -> torch.Tensor:
    """[selected] int64, rising: the longest list of the best clusters within the budget."""
    nonempty = sizes.nonzero().flatten()
    order = nonempty[ranks[nonempty].argsort(descending=True, stable=True)]
    fits = sizes[order].cumsum(0) <= budget
    fits[:1] = budget > 0
    return order[fits].sort().values


def _slots(pool_layer: PoolLayer, place: int, head: int, cluster: int) -> torch.Tensor:
    begin = int(pool_layer.member_begin[place, head, cluster])
    end = begin + int(pool_layer.cluster_sizes[place, head, cluster])
    return pool_layer.segment_slots[place, pool_layer.members[place, head, begin:end].long()]
