"""A decode step over the cluster pool in PyTorch: what the Triton kernels compute.

Serves machines without a GPU, and the tests as the kernels' counterpart on the pool's own layout.
Loops over rows and KV heads and reads counts on the host, so it is no code for a GPU server.
"""

from __future__ import annotations

import torch

from multipole_kernels import reference
from multipole_kernels.decode_buffers import DecodePlan, PoolLayer

# columns of the counters; see multipole_decode
SPARSE_STEPS, DENSE_STEPS, EXACT_TOKENS, CONTEXT_TOKENS = range(4)
NUM_COUNTERS = 4


def multipole_decode(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layer: PoolLayer,
    plan: DecodePlan,
    sm_scale: float,
    max_logit_variance: float,
    out: torch.Tensor,
    counters: torch.Tensor,
) -> list[list[torch.Tensor]]:
    """Attention of one new token per row.

    Args:
        q: [B, H * G, D]; key_cache, value_cache: [num_slots, H, D].
        out: [B, H * G, D], written.
        counters: [B, 4] int64, added to by what was attended in this call: 1 if the row had
            clusters (sparse), else 1 in the next column (dense; a row of padding counts in
            neither); tokens attended exactly, mean of the KV heads; tokens in context.

    Returns:
        For each row and KV head the KV slots of its selected clusters' tokens, int64.
    """
    selected_slots = []
    item_indptr, exact_indptr = plan.item_indptr.tolist(), plan.exact_indptr.tolist()
    for row in range(q.shape[0]):
        places = plan.item_place[item_indptr[row] : item_indptr[row + 1]].long()
        slots = plan.exact_slots[exact_indptr[row] : exact_indptr[row + 1]].long()
        out[row], selected = _decode_row(
            q[row],
            key_cache,
            value_cache,
            layer,
            places,
            slots,
            int(plan.token_budget[row]),
            sm_scale,
            max_logit_variance,
        )
        if len(places) or len(slots):
            counters[row, SPARSE_STEPS if len(places) else DENSE_STEPS] += 1
        selected_slots.append(selected)
        num_selected = sum(len(head_slots) for head_slots in selected) // key_cache.shape[1]
        counters[row, EXACT_TOKENS] += len(slots) + num_selected
        # every KV head has the same tokens under its clusters
        counters[row, CONTEXT_TOKENS] += len(slots) + layer.cluster_sizes[places, 0].sum()
    return selected_slots


def _decode_row(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layer: PoolLayer,
    places: torch.Tensor,
    exact_slots: torch.Tensor,
    token_budget: int,
    sm_scale: float,
    max_logit_variance: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """out [H * G, D] and each KV head's slots of the selected clusters' tokens."""
    num_kv_heads, head_dim = key_cache.shape[1:]
    grouped_q = q.view(num_kv_heads, -1, head_dim)
    keys, values = key_cache[exact_slots].transpose(0, 1), value_cache[exact_slots].transpose(0, 1)
    everything = torch.ones(keys.shape[:2], dtype=torch.bool, device=q.device)
    states = [reference.exact_attention(grouped_q, keys, values, everything, sm_scale)]
    selected_slots = [exact_slots[:0]] * num_kv_heads
    if len(places):
        key_centroids = _clusters(layer.key_centroids, places, layer.key_scale)
        value_centroids = _clusters(layer.value_centroids, places, layer.value_scale)
        sizes = _clusters(layer.cluster_sizes, places)
        scores = reference.centroid_lookup(grouped_q, key_centroids, sm_scale)
        pair_weight = layer.pair_weight.unsqueeze(2).expand(*layer.key_variance.shape, -1)
        variance = reference.logit_variance(
            grouped_q,
            _clusters(layer.key_variance, places),
            _clusters(pair_weight, places),
            sm_scale,
        )
        tail = reference.tail_logits(scores, sizes, variance, max_logit_variance)
        selected = reference.cluster_selection(
            scores, tail, states[0][1], sizes.int(), token_budget
        )
        states.append(reference.centroid_attention(tail, value_centroids.to(q.dtype), selected))
        selected_slots = [
            _member_slots(layer, places, head, selected[head]) for head in range(num_kv_heads)
        ]
        head_states = []
        for head, slots in enumerate(selected_slots):
            mask = torch.ones(1, len(slots), dtype=torch.bool, device=q.device)
            head_states.append(
                reference.exact_attention(
                    grouped_q[head : head + 1],
                    key_cache[slots, head].unsqueeze(0),
                    value_cache[slots, head].unsqueeze(0),
                    mask,
                    sm_scale,
                )
            )
        states.append(tuple(torch.cat(parts) for parts in zip(*head_states, strict=True)))
    out, _ = reference.merge_states(
        torch.stack([state_out for state_out, _ in states], -2),
        torch.stack([lse for _, lse in states], -1),
    )
    return out.reshape(q.shape), selected_slots


def _clusters(
    of_places: torch.Tensor, places: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """[H, items * K, ...] the places' clusters in a row; float32 if there is a scale."""
    rows = of_places[places].transpose(0, 1).flatten(1, 2)
    if scale is None:
        return rows
    return reference.dequantize_centroids(rows, _clusters(scale, places))


def _member_slots(
    layer: PoolLayer, places: torch.Tensor, head: int, selected: torch.Tensor
) -> torch.Tensor:
    """[tokens] int64 KV slots of the members of a head's selected clusters [items * K]."""
    segment_size = layer.segment_slots.shape[1]
    sizes = layer.cluster_sizes[places, head].long()
    begin = layer.member_begin[places, head].long()
    item, cluster = selected.view(sizes.shape).nonzero(as_tuple=True)
    size = sizes[item, cluster]
    # position of each member in its place's run of members, all clusters in a row
    run_end = size.cumsum(0)
    offset = torch.arange(int(size.sum()), device=size.device)
    offset += (begin[item, cluster] - (run_end - size)).repeat_interleave(size)
    place = places[item].repeat_interleave(size)
    member = layer.members[place, head, offset.clamp(max=segment_size - 1)].long()
    return layer.segment_slots[place, member].long()
