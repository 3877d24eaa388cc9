"""Cluster a segment as the reference does, with its choices open."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.fidelity.index_store import SegmentClusters
from benchmarks.fidelity.methods.features import WHITENING, Calibration, cluster_features
from benchmarks.fidelity.methods.seeding import cluster_from_placed_seeds
from multipole_kernels import reference


@dataclass(frozen=True)
class Clustering:
    """Choices that decide which tokens share a cluster.

    max_cluster_size None leaves clusters as k-means made them. `content_centroid` keeps the mean
    of the keys without position (the paper) instead of the keys as attention sees them.
    `dissolve_needed` makes room for the parts of oversized clusters by dissolving no more of the
    smallest ones than it takes. Without `far_seeds` all of k-means' seeds are placed by position.
    """

    segment_size: int = 2048
    tokens_per_cluster: int = 16
    max_cluster_size: int | None = 128
    dissolve_needed: bool = False
    features: str = "content"
    metric: str = "euclidean"
    num_lloyd_iters: int = 4
    content_centroid: bool = False
    far_seeds: bool = True
    seed: int = 0


class SegmentClusterer:
    """A SegmentBuilder for one Clustering."""

    def __init__(self, clustering: Clustering, calibration: Calibration | None = None) -> None:
        self.clustering, self.calibration = clustering, calibration
        self.key = ("clusters", clustering)
        self.segment_size = clustering.segment_size

    def build(self, keys, values, begin, rope, heads) -> SegmentClusters:
        """Clusters of keys, values [H, T, D] at positions begin and on."""
        choice = self.clustering
        num_clusters = max(1, round(keys.shape[-2] / choice.tokens_per_cluster))
        metric_root = None
        whitening = WHITENING.get(choice.metric)
        if choice.metric != "euclidean" and whitening is None:
            metric_root = self.calibration.roots[choice.metric][heads]
        features = cluster_features(keys, begin, rope, choice.features, metric_root, whitening)
        max_size = choice.max_cluster_size or keys.shape[-2] + 1
        # the cap cannot hold in a segment too short to have clusters to dissolve
        max_size = max(max_size, -(-keys.shape[-2] // num_clusters) * 2)
        cluster = reference.cluster_segment if choice.far_seeds else cluster_from_placed_seeds
        cluster_ids = cluster(
            features,
            num_clusters,
            keys.shape[-2] + 1 if choice.dissolve_needed else max_size,
            choice.num_lloyd_iters,
            begin // choice.segment_size + 7919 * choice.seed,
        )
        if choice.dissolve_needed:
            cluster_ids = split_dissolving_few(features, cluster_ids, num_clusters, max_size)
        seen_keys = keys
        if choice.content_centroid:
            positions = torch.arange(begin, begin + keys.shape[-2], device=keys.device)
            seen_keys = rope.unrotate(keys, positions)
        return summarize(seen_keys, values, cluster_ids, num_clusters)


def split_dissolving_few(
    features: torch.Tensor, cluster_ids: torch.Tensor, num_clusters: int, max_size: int
) -> torch.Tensor:
    """reference.split_oversized, but with the fewest clusters dissolved (smallest first).

    A dissolved cluster's tokens may make another one too large, so the number is found by trying.
    """
    features = features.float() - features.float().mean(-2, keepdim=True)
    centroids = reference.cluster_means(features, cluster_ids, num_clusters)
    by_size = reference.cluster_sizes(cluster_ids, num_clusters).argsort(dim=-1, stable=True)
    place = by_size.argsort(dim=-1)
    num_dissolved = torch.zeros_like(place[..., :1])
    while True:
        dissolved = place < num_dissolved
        moved = reference.assign(features, centroids.masked_fill(dissolved[..., None], math.nan))
        ids = torch.where(dissolved.gather(-1, cluster_ids), moved, cluster_ids)
        sizes = reference.cluster_sizes(ids, num_clusters)
        parts = (sizes + max_size - 1) // max_size
        lacking = (parts.sum(-1, keepdim=True) - num_clusters).clamp(min=0)
        if not lacking.any():
            return _cut(ids, sizes, parts)
        num_dissolved = num_dissolved + lacking


def _cut(ids: torch.Tensor, sizes: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Ids [*, T] dealt anew: a cluster's parts are equal runs of its tokens by position."""
    order = ids.argsort(dim=-1, stable=True)
    begin = (sizes.cumsum(-1) - sizes).gather(-1, ids.gather(-1, order))
    counter = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    rank = torch.empty_like(ids).scatter_(-1, order, counter - begin)
    first_part = parts.cumsum(-1) - parts
    return first_part.gather(-1, ids) + rank * parts.gather(-1, ids) // sizes.gather(-1, ids)


def summarize(keys, values, cluster_ids, num_clusters: int) -> SegmentClusters:
    """What is kept of clusters of keys, values [H, T, D]."""
    summary = reference.summarize_clusters(keys, values, cluster_ids, num_clusters)
    means = summary.key_centroids.gather(-2, cluster_ids.unsqueeze(-1).expand(keys.shape))
    residual = keys - means
    covariance = residual.mT @ residual / keys.shape[-2]
    return SegmentClusters(cluster_ids, *summary, covariance)
