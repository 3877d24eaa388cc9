"""K-means with a part of its seeds placed where the segment is worst covered.

The reference places all seeds by position. Here the last ones are found in rounds: the segment is
cut into equal strata, and each gives the token farthest from its nearest seed so far. Content that
is rare, or that no seed happened to hit, then has a cluster of its own from the start.
"""

from __future__ import annotations

import torch

from multipole_kernels import reference

# one round finds num_clusters // CLUSTERS_PER_FAR_SEED seeds
CLUSTERS_PER_FAR_SEED = 8


def squared_distances(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[*, T, K] between features [*, T, D] and others [*, K, D]."""
    product = features @ others.mT
    lengths = features.square().sum(-1, keepdim=True) + others.square().sum(-1).unsqueeze(-2)
    return lengths - 2.0 * product


def farthest_per_stratum(distance: torch.Tensor, num_strata: int) -> torch.Tensor:
    """[*, num_strata] int64: the first token of the largest distance [*, T] in each stratum."""
    num_tokens = distance.shape[-1]
    bounds = torch.arange(1, num_strata + 1, device=distance.device) * num_tokens // num_strata
    token = torch.arange(num_tokens, device=distance.device)
    stratum = torch.bucketize(token, bounds, right=True)
    is_inside = stratum == torch.arange(num_strata, device=distance.device).unsqueeze(-1)
    return distance.unsqueeze(-2).masked_fill(~is_inside, -1.0).argmax(-1)


def seed_tokens(
    features: torch.Tensor, num_clusters: int, segment_index: int, far_rounds: int
) -> torch.Tensor:
    """[*, K] int64: the tokens of features [*, T, D] that k-means starts from."""
    num_tokens, head_dim = features.shape[-2:]
    per_round = num_clusters // CLUSTERS_PER_FAR_SEED
    num_placed = num_clusters - far_rounds * per_round
    seeds = reference.seed_positions(num_tokens, num_placed, segment_index).to(features.device)
    seeds = seeds.expand(*features.shape[:-2], num_placed)

    def rows(tokens: torch.Tensor) -> torch.Tensor:
        return features.gather(-2, tokens.unsqueeze(-1).expand(*tokens.shape, head_dim))

    if per_round == 0:
        return seeds
    distance = squared_distances(features, rows(seeds)).amin(-1)
    for _ in range(far_rounds):
        far = farthest_per_stratum(distance, per_round)
        seeds = torch.cat([seeds, far], -1)
        distance = torch.minimum(distance, squared_distances(features, rows(far)).amin(-1))
    return seeds


def cluster_from_far_seeds(
    features: torch.Tensor,
    num_clusters: int,
    max_cluster_size: int,
    num_lloyd_iters: int,
    segment_index: int,
    far_rounds: int,
) -> torch.Tensor:
    """[*, T] int64: reference.cluster_segment in all but its seeds."""
    features = features.float() - features.float().mean(-2, keepdim=True)
    seeds = seed_tokens(features, num_clusters, segment_index, far_rounds)
    centroids = features.gather(-2, seeds.unsqueeze(-1).expand(*seeds.shape, features.shape[-1]))
    for _ in range(num_lloyd_iters):
        means = reference.cluster_means(
            features, reference.assign(features, centroids), num_clusters
        )
        centroids = torch.where(means.isnan(), centroids, means)
    ids = reference.assign(features, centroids)
    return reference.split_oversized(features, centroids, ids, max_cluster_size)
