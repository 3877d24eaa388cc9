"""K-means whose seeds are all placed by position: the paper's stand-in, the first study's, and ours
before reference.seed_tokens looked for the farthest tokens."""

from __future__ import annotations

import torch

from multipole_kernels import reference


def cluster_from_placed_seeds(
    features: torch.Tensor,
    num_clusters: int,
    max_cluster_size: int,
    num_lloyd_iters: int,
    segment_index: int,
) -> torch.Tensor:
    """[*, T] int64: reference.cluster_segment in all but its seeds."""
    features = features.float() - features.float().mean(-2, keepdim=True)
    seeds = reference.seed_positions(features.shape[-2], num_clusters, segment_index)
    seeds = seeds.to(features.device).expand(*features.shape[:-2], num_clusters)
    return reference.cluster_from_seeds(features, seeds, max_cluster_size, num_lloyd_iters)
