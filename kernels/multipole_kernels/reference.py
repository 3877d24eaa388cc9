"""Multipole attention in plain PyTorch: the whole algorithm on one page, the definition of right.

A segment is a run of consecutive tokens of one request. Its keys are clustered by content (k-means
of the keys without their rotary position); what attention sees of a cluster is the mean of its keys
as they lie in the KV pool, the mean of its values, its size and the variance of its keys. A decode
step scores every cluster, attends exactly to the tokens of the best ones, and lets the centroids
stand in for the tokens of all the others. Method: Multipole Attention, arXiv 2506.13059; where and
why this differs from the paper is written in docs/architecture.md.

Each function works on CPU and GPU and computes in the dtype it is given. `*` is any leading batch
(layers, KV heads); T tokens, K clusters, G query heads per KV head, D head_dim. Log-sum-exps are
natural logs; an lse of -inf means "attended to nothing".
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# multipliers of the integer hash that places the seeds (splitmix32's)
_HASH_1, _HASH_2 = 0x21F0AAAD, 0x735A2D97
# rounds that find a part of the seeds, each num_clusters // CLUSTERS_PER_FAR_SEED of them
FAR_ROUNDS = 3
CLUSTERS_PER_FAR_SEED = 8


# ------------------------------------------------------------------ clustering of a segment


def unrotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Undo RoPE (rotate-half pairing) on the first 2 * cos.shape[-1] dimensions.

    Args:
        keys: [*, T, D], as they lie in the KV pool.
        cos, sin: [T, rotary_dim / 2] float32, the model's own table at the tokens' positions.

    Returns:
        [*, T, D] float32. Dividing by cos^2 + sin^2 takes YaRN's scale out as well.
    """
    keys = keys.float()
    half = cos.shape[-1]
    scale = 1.0 / (cos * cos + sin * sin)
    x, y, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    return torch.cat([(x * cos + y * sin) * scale, (y * cos - x * sin) * scale, rest], dim=-1)


def seed_positions(
    num_tokens: int, num_clusters: int, segment_index: int | torch.Tensor
) -> torch.Tensor:
    """[*, K] int64: one token at a hashed place in each of K equal strata of the segment.

    segment_index, a number or [*] int64, is the segment's number in its sequence. A function of the
    segment's place alone, so that clustering the same tokens again, on another rank or for another
    request, gives the same clusters.
    """
    segment_index = torch.as_tensor(segment_index).unsqueeze(-1)
    stratum = torch.arange(num_clusters, dtype=torch.int64, device=segment_index.device)
    begin = stratum * num_tokens // num_clusters
    end = (stratum + 1) * num_tokens // num_clusters
    x = (stratum + 1 + segment_index * 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * _HASH_1) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * _HASH_2) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    return begin + x % (end - begin).clamp(min=1)


def rows_at(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[*, N, D]: the rows [*, T, D] of tokens [*, N] int64."""
    return rows.gather(-2, tokens.unsqueeze(-1).expand(*tokens.shape, rows.shape[-1]))


def nearest_distance(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[*, T]: squared Euclid from each of features [*, T, D] to the nearest of others [*, N, D]."""
    # |x|^2 is the same for every other row, so it is added to the least
    distance = others.square().sum(-1).unsqueeze(-2) - 2.0 * features @ others.mT
    return features.square().sum(-1) + distance.amin(-1)


def farthest_per_stratum(distance: torch.Tensor, num_strata: int) -> torch.Tensor:
    """[*, S] int64: the token of the largest distance [*, T] in each of S equal strata of T.

    A tie takes the first.
    """
    num_tokens = distance.shape[-1]
    stratum = torch.arange(num_strata, device=distance.device).unsqueeze(-1)
    begin = stratum * num_tokens // num_strata
    end = (stratum + 1) * num_tokens // num_strata
    longest = -(-num_tokens // num_strata)
    # [S, longest]; a shorter stratum has its last token twice
    token = (begin + torch.arange(longest, device=distance.device)).minimum(end - 1)
    return begin.squeeze(-1) + distance[..., token].argmax(-1)


def seed_tokens(
    features: torch.Tensor, num_clusters: int, segment_index: int | torch.Tensor
) -> torch.Tensor:
    """[*, K] int64: the tokens of features [*, T, D] float32 that k-means starts from.

    The first ones, K less FAR_ROUNDS (K // CLUSTERS_PER_FAR_SEED), lie at seed_positions. The
    others are found in rounds: the segment is cut into K // CLUSTERS_PER_FAR_SEED equal strata,
    and each gives the token farthest from its nearest seed so far. Content that is rare, or near
    to no placed seed, so has a cluster from the start. A function of the segment's tokens and
    place alone, as seed_positions is of its place.
    """
    num_tokens, per_round = features.shape[-2], num_clusters // CLUSTERS_PER_FAR_SEED
    num_placed = num_clusters - FAR_ROUNDS * per_round
    placed = seed_positions(num_tokens, num_placed, segment_index).to(features.device)
    seeds = placed.expand(*features.shape[:-2], num_placed)
    if per_round == 0:
        return seeds
    distance = nearest_distance(features, rows_at(features, seeds))
    for nth in range(FAR_ROUNDS):
        if nth > 0:
            last = rows_at(features, seeds[..., -per_round:])
            distance = distance.minimum(nearest_distance(features, last))
        seeds = torch.cat([seeds, farthest_per_stratum(distance, per_round)], -1)
    return seeds


def assign(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """[*, T] int64: the nearest centroid of each token (squared Euclid; a tie takes the first).

    A centroid of NaN is no candidate.
    """
    # |x|^2 is the same for every centroid, so it is left out
    distance = centroids.square().sum(-1).unsqueeze(-2) - 2.0 * features @ centroids.mT
    return distance.nan_to_num(nan=float("inf")).argmin(-1)


def cluster_means(rows: torch.Tensor, cluster_ids: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """[*, K, D] float32: the mean of each cluster's rows [*, T, D]; NaN where it has none.

    The sums are products with a matrix of ones and zeros: added up in the same order every time,
    which scattered additions on a GPU are not.
    """
    is_member = cluster_ids.unsqueeze(-2) == torch.arange(
        num_clusters, device=rows.device
    ).unsqueeze(-1)
    return is_member.float() @ rows.float() / is_member.sum(-1, keepdim=True)


def cluster_sizes(cluster_ids: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """[*, K] int32: tokens in each cluster."""
    sizes = cluster_ids.new_zeros(*cluster_ids.shape[:-1], num_clusters, dtype=torch.int32)
    return sizes.scatter_add_(-1, cluster_ids, torch.ones_like(cluster_ids, dtype=torch.int32))


def split_oversized(
    features: torch.Tensor, centroids: torch.Tensor, cluster_ids: torch.Tensor, max_size: int
) -> torch.Tensor:
    """Cluster ids [*, T] in which no cluster is larger than max_size, so that it fits a budget.

    In a head that has a larger one, the T // max_size smallest clusters are dissolved (their tokens
    join the nearest of the others), which frees enough ids to cut every large cluster into equal
    parts by position; ids are then dealt anew in order.
    """
    num_tokens, num_clusters = cluster_ids.shape[-1], centroids.shape[-2]
    sizes = cluster_sizes(cluster_ids, num_clusters)
    has_oversized = (sizes > max_size).any(-1)
    smallest = sizes.argsort(dim=-1, stable=True)[..., : num_tokens // max_size]
    dissolved = torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, smallest, True)
    kept_centroids = centroids.masked_fill(dissolved.unsqueeze(-1), float("nan"))
    moved = assign(features, kept_centroids)
    ids = torch.where(dissolved.gather(-1, cluster_ids), moved, cluster_ids)

    sizes = cluster_sizes(ids, num_clusters)
    parts = (sizes + max_size - 1) // max_size
    first_part = parts.cumsum(-1) - parts
    # rank of each token inside its cluster, by position
    order = ids.argsort(dim=-1, stable=True)
    begin = (sizes.cumsum(-1) - sizes).gather(-1, ids.gather(-1, order))
    rank = torch.empty_like(ids)
    position_in_order = torch.arange(num_tokens, device=ids.device).expand(ids.shape)
    rank.scatter_(-1, order, position_in_order - begin)
    size, part_count = sizes.gather(-1, ids), parts.gather(-1, ids)
    split_ids = first_part.gather(-1, ids) + rank * part_count // size
    return torch.where(has_oversized.unsqueeze(-1), split_ids, cluster_ids)


def cluster_segment(
    features: torch.Tensor,
    num_clusters: int,
    max_cluster_size: int,
    num_lloyd_iters: int,
    segment_index: int | torch.Tensor,
) -> torch.Tensor:
    """[*, T] int64 cluster ids of a segment: k-means of features [*, T, D], float32.

    segment_index is a number, or int64 that broadcasts to the leading batch *.

    Raises:
        ValueError: num_clusters clusters of max_cluster_size cannot hold the tokens.
    """
    num_tokens = features.shape[-2]
    # dissolving must leave a cluster to join, and the parts must fit the freed ids
    if not num_tokens // max_cluster_size < num_clusters <= num_tokens:
        raise ValueError(
            f"cluster_segment: {num_tokens} tokens need more than "
            f"{num_tokens // max_cluster_size} clusters of at most {max_cluster_size} tokens and "
            f"at most one cluster a token, got {num_clusters}"
        )
    # k-means does not see a common offset; low-precision distances do
    features = features.float() - features.float().mean(-2, keepdim=True)
    seeds = seed_tokens(features, num_clusters, segment_index)
    return cluster_from_seeds(features, seeds, max_cluster_size, num_lloyd_iters)


def cluster_from_seeds(
    features: torch.Tensor, seeds: torch.Tensor, max_cluster_size: int, num_lloyd_iters: int
) -> torch.Tensor:
    """[*, T] int64 cluster ids: Lloyd iterations from the tokens seeds [*, K], then the size cap.

    features: [*, T, D] float32, less their mean.
    """
    centroids = rows_at(features, seeds)
    for _ in range(num_lloyd_iters):
        means = cluster_means(features, assign(features, centroids), seeds.shape[-1])
        # a cluster that lost its last token stays where it was
        centroids = torch.where(means.isnan(), centroids, means)
    return split_oversized(features, centroids, assign(features, centroids), max_cluster_size)


class ClusterSummary(NamedTuple):
    """What attention sees of a segment's clusters; 0 for an empty cluster.

    key_centroids, value_centroids: [*, K, D] float32, means of the clusters' keys and values.
    cluster_sizes: [*, K] int32, tokens.
    key_variance: [*, K] float32, of the cluster's keys about their mean, averaged over D.
    pair_weight: [*, D / 2] float32, how the segment's key variance is spread over the rotary pairs
        of dimensions (f, f + D / 2); its mean is 1.
    """

    key_centroids: torch.Tensor
    value_centroids: torch.Tensor
    cluster_sizes: torch.Tensor
    key_variance: torch.Tensor
    pair_weight: torch.Tensor


def summarize_clusters(
    keys: torch.Tensor, values: torch.Tensor, cluster_ids: torch.Tensor, num_clusters: int
) -> ClusterSummary:
    """Summarize clusters of keys, values [*, T, D] as they lie in the KV pool (keys with RoPE).

    cluster_ids: [*, T]. A rotation by position mixes the two dimensions of a pair, so their
    variance is one number; how it differs between pairs is alike in all clusters of a segment.
    """
    key_centroids = cluster_means(keys, cluster_ids, num_clusters).nan_to_num(0.0)
    value_centroids = cluster_means(values, cluster_ids, num_clusters).nan_to_num(0.0)
    member_centroid = key_centroids.gather(-2, cluster_ids.unsqueeze(-1).expand(keys.shape))
    spread = (keys.float() - member_centroid).square()
    key_variance = cluster_means(spread.mean(-1, keepdim=True), cluster_ids, num_clusters)
    pair_spread = spread.mean(-2).unflatten(-1, (2, -1)).mean(-2)
    pair_weight = pair_spread / pair_spread.mean(-1, keepdim=True)
    return ClusterSummary(
        key_centroids,
        value_centroids,
        cluster_sizes(cluster_ids, num_clusters),
        key_variance.squeeze(-1).nan_to_num(0.0),
        # keys that are all equal have no variance to spread
        pair_weight.nan_to_num(1.0),
    )


def quantize_centroids(
    centroids: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids [*, K, D] in 8 bits (int8 or float8_e4m3fn) and their scale [*, K] float32.

    The scale takes a centroid's largest magnitude to the dtype's largest number; centroid =
    quantized * scale.
    """
    is_int8 = dtype == torch.int8
    largest_number = 127.0 if is_int8 else torch.finfo(dtype).max
    largest = centroids.abs().amax(-1)
    scale = torch.where(largest > 0.0, largest / largest_number, 1.0)
    quantized = centroids / scale.unsqueeze(-1)
    return (quantized.round() if is_int8 else quantized).to(dtype), scale


def dequantize_centroids(quantized: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """[*, K, D] float32; without a scale they are stored as they are."""
    centroids = quantized.float()
    return centroids if scale is None else centroids * scale.unsqueeze(-1)


# ---------------------------------------------------------------------------- a decode step


def centroid_lookup(q: torch.Tensor, key_centroids: torch.Tensor, sm_scale: float) -> torch.Tensor:
    """[H, G, K] float32 scores (natural-log logits) of q [H, G, D] against [H, K, D]."""
    return q.float() @ key_centroids.float().mT * sm_scale


def logit_variance(
    q: torch.Tensor, key_variance: torch.Tensor, pair_weight: torch.Tensor, sm_scale: float
) -> torch.Tensor:
    """[H, G, K] variance of the logits of each cluster's tokens, for q [H, G, D].

        key_variance * sum over pairs f of pair_weight_f * (q_f^2 + q_{f + D/2}^2) * sm_scale^2

    Args:
        key_variance: [H, K] float32.
        pair_weight: [H, K, D / 2] float32, of each cluster's segment.
    """
    q_square = (q.float() * sm_scale).square().unflatten(-1, (2, -1)).sum(-2)
    return q_square @ pair_weight.mT * key_variance.unsqueeze(-2)


def tail_logits(
    scores: torch.Tensor,
    cluster_sizes: torch.Tensor,
    logit_variance: torch.Tensor,
    max_logit_variance: float,
) -> torch.Tensor:
    """[H, G, K] log of the softmax mass a cluster stands for; -inf for an empty cluster.

        log(size) + score + min(variance of its logits, max_logit_variance) / 2

    The mean of exp is larger than exp of the mean (Jensen); the last term is the second-order
    correction, which overshoots for a large variance and is therefore cut off.
    """
    correction = 0.5 * logit_variance.clamp(max=max_logit_variance)
    return scores + correction + cluster_sizes[:, None].float().log()


def cluster_selection(
    scores: torch.Tensor,
    tail: torch.Tensor,
    exact_lse: torch.Tensor,
    cluster_sizes: torch.Tensor,
    token_budget: int,
) -> torch.Tensor:
    """[H, K] bool: the clusters that each KV head attends to exactly.

    A cluster is ranked by its tokens' estimated mean probability, summed over the G query heads:
    exp(score - lse), lse the log of the full denominator (clusters and always-exact tokens).
    Clusters are taken whole, best first (a tie takes the lower index), while their sizes sum to at
    most token_budget; the first that does not fit ends the list. The best is always taken, unless
    the budget is 0.

    Args:
        scores: [H, G, K] float32, from centroid_lookup.
        tail: [H, G, K] float32, from tail_logits.
        exact_lse: [H, G] float32, of the always-exact tokens (sinks, recent, not clustered).
        cluster_sizes: [H, K] int32, tokens.
    """
    lse = torch.logaddexp(torch.logsumexp(tail, -1), exact_lse)
    probability = (scores - lse.unsqueeze(-1)).exp().sum(1)
    nonempty = cluster_sizes > 0
    order = probability.masked_fill(~nonempty, -1.0).argsort(dim=-1, descending=True, stable=True)
    sizes = cluster_sizes.gather(-1, order)
    taken = sizes.cumsum(-1) <= token_budget
    taken[..., :1] = token_budget > 0
    return torch.zeros_like(nonempty).scatter_(-1, order, taken) & nonempty


def exact_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [H, G, D] to the tokens of keys, values [H, T, D] where mask [H, T] is true.

    Returns:
        out [H, G, D] in q's dtype and lse [H, G] float32; 0 and -inf where a head's mask is empty.
    """
    scores = (q @ keys.mT).float() * sm_scale
    return _attend(scores.masked_fill(~mask.unsqueeze(1), float("-inf")), values)


def centroid_attention(
    tail: torch.Tensor, value_centroids: torch.Tensor, selected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the centroids of the clusters not selected, each weighted by exp(tail).

    Args:
        tail: [H, G, K] float32, from tail_logits.
        value_centroids: [H, K, D].
        selected: [H, K] bool.
    """
    return _attend(tail.masked_fill(selected.unsqueeze(1), float("-inf")), value_centroids)


def _attend(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if scores.shape[-1] == 0:
        shape = scores.shape[:-1]
        return values.new_zeros(*shape, values.shape[-1]), scores.new_full(shape, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    # a row with nothing to attend to has weights exp(-inf - -inf) = NaN
    weight = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return weight.to(values.dtype) @ values, lse


def merge_states(
    part_out: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention states of disjoint tokens: out [*, P, D], lse [*, P] -> [*, D], [*]."""
    lse = torch.logsumexp(part_lse, dim=-1)
    # a row whose parts are all empty has weights exp(-inf - -inf) = NaN: it attends to nothing
    weight = torch.exp(part_lse - lse.unsqueeze(-1)).nan_to_num(0.0)
    out = (part_out.nan_to_num(0.0) * weight.unsqueeze(-1).to(part_out.dtype)).sum(dim=-2)
    return out, lse


def multipole_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cluster_ids: torch.Tensor,
    key_centroids: torch.Tensor,
    value_centroids: torch.Tensor,
    cluster_sizes: torch.Tensor,
    key_variance: torch.Tensor,
    pair_weight: torch.Tensor,
    token_budget: int,
    sm_scale: float,
    max_logit_variance: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One decode step of one request and layer: every token is counted exactly once.

    Args:
        q: [H * G, D], query heads of a KV head adjacent.
        keys, values: [T, H, D], the request's tokens in order of position.
        cluster_ids: [H, T], -1 for a token in no cluster: sinks, recent and not yet clustered.
        key_centroids, value_centroids, cluster_sizes, key_variance: [H, K, ...], all segments'
            clusters in a row, as summarize_clusters gives them.
        pair_weight: [H, K, D / 2], of each cluster's segment.
        token_budget: tokens per KV head attended exactly beside those in no cluster.

    Returns:
        out [H * G, D] in q's dtype, lse [H * G] float32, selected [H, K] bool.
    """
    num_kv_heads, head_dim = keys.shape[1], keys.shape[2]
    grouped_q = q.view(num_kv_heads, -1, head_dim)
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    in_no_cluster = cluster_ids < 0

    always_out, always_lse = exact_attention(grouped_q, keys, values, in_no_cluster, sm_scale)
    scores = centroid_lookup(grouped_q, key_centroids, sm_scale)
    variance = logit_variance(grouped_q, key_variance, pair_weight, sm_scale)
    tail = tail_logits(scores, cluster_sizes, variance, max_logit_variance)
    selected = cluster_selection(scores, tail, always_lse, cluster_sizes, token_budget)
    if selected.shape[-1] == 0:
        in_selected = torch.zeros_like(in_no_cluster)
    else:
        in_selected = selected.gather(-1, cluster_ids.clamp(min=0)) & ~in_no_cluster
    exact_out, exact_lse = exact_attention(grouped_q, keys, values, in_selected, sm_scale)
    tail_out, tail_lse = centroid_attention(tail, value_centroids.to(q.dtype), selected)
    out, lse = merge_states(
        torch.stack([always_out, exact_out, tail_out], -2),
        torch.stack([always_lse, exact_lse, tail_lse], -1),
    )
    return out.reshape(q.shape), lse.flatten(), selected
