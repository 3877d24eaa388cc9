"""Cluster a segment as the reference does, with its choices open."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.fidelity.index_store import SegmentClusters
from benchmarks.fidelity.methods.features import WHITENING, Calibration, cluster_features
from multipole_kernels import reference


@dataclass(frozen=True)
class Clustering:
    """Choices that decide which tokens share a cluster.

    max_cluster_size None leaves clusters as k-means made them. `content_centroid` keeps the mean
    of the keys without position (the paper) instead of the keys as attention sees them.
    """

    segment_size: int = 1024
    tokens_per_cluster: int = 16
    max_cluster_size: int | None = 64
    features: str = "content"
    metric: str = "euclidean"
    num_lloyd_iters: int = 4
    content_centroid: bool = False
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
        cluster_ids = reference.cluster_segment(
            features,
            num_clusters,
            max_size,
            choice.num_lloyd_iters,
            begin // choice.segment_size + 7919 * choice.seed,
        )
        seen_keys = keys
        if choice.content_centroid:
            positions = torch.arange(begin, begin + keys.shape[-2], device=keys.device)
            seen_keys = rope.unrotate(keys, positions)
        return summarize(seen_keys, values, cluster_ids, num_clusters)


def summarize(keys, values, cluster_ids, num_clusters: int) -> SegmentClusters:
    """What is kept of clusters of keys, values [H, T, D]."""
    key_centroids, value_centroids, sizes, variance = reference.summarize_clusters(
        keys, values, cluster_ids, num_clusters
    )
    residual = keys - key_centroids.gather(-2, cluster_ids.unsqueeze(-1).expand(keys.shape))
    covariance = residual.mT @ residual / keys.shape[-2]
    return SegmentClusters(cluster_ids, key_centroids, value_centroids, sizes, variance, covariance)
