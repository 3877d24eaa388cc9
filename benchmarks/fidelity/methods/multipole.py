"""Ours, with every choice open: clusters of content in segments, seen with their position."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.fidelity.index_store import SegmentClusters
from benchmarks.fidelity.methods import selection, tail
from benchmarks.fidelity.methods.base import COUNT_BYTES, Method
from benchmarks.fidelity.methods.clusters import Clustering, SegmentClusterer
from benchmarks.fidelity.methods.features import Calibration
from benchmarks.fidelity.methods.quantize import centroid_bytes, stored


@dataclass(frozen=True)
class MultipoleChoices:
    """A point of the design space; the defaults are the definition in reference.py."""

    clustering: Clustering = Clustering()
    number_format: str = "int8"
    variance: str = "pair"
    max_variance: float = 2.0
    score: str = "share"
    group: str = "sum"
    rule: str = "prefix"
    # of the threshold rule: rank below which a cluster is left to its centroid, and the cap
    threshold: float = 0.0
    cap_factor: float = 1.0
    # budget of each layer over the mean budget; None for equal ones
    layer_weights: tuple[float, ...] | None = None
    drop_tail: bool = False
    # part of the clusters, by mass, whose value centroid is read; the mean value of its segment
    # stands for the others
    value_fraction: float = 1.0


class Multipole(Method):
    def __init__(
        self, name: str, choices: MultipoleChoices, calibration: Calibration | None = None
    ) -> None:
        self.name, self.choices = name, choices
        self.clusterer = SegmentClusterer(choices.clustering, calibration)

    def index_bytes(self, block) -> float:
        """Read per head and step: both centroids, the size, and what the variance needs."""
        choices, head_dim = self.choices, block.keys.shape[-1]
        per_cluster = 2 * centroid_bytes(head_dim, choices.number_format) + COUNT_BYTES
        value_part = 0.0 if choices.drop_tail else choices.value_fraction
        per_cluster -= (1 - value_part) * centroid_bytes(head_dim, choices.number_format)
        if choices.variance in ("isotropic", "pair", "pooled"):
            per_cluster += tail.VARIANCE_BYTES
        shapes = {"pair": head_dim // 2 * 4, "pooled": head_dim * head_dim * 2}
        per_segment = shapes.get(choices.variance, 0)
        if value_part < 1:
            per_segment += 2 * head_dim
        segments = -(-block.extent // choices.clustering.segment_size)
        clusters = block.num_clustered / choices.clustering.tokens_per_cluster
        return clusters * per_cluster + segments * per_segment

    def attend(self, block, indexes, byte_budget):
        segments = indexes.segments(block, self.clusterer)
        index_bytes = self.index_bytes(block)
        budget = self.affordable_tokens(block, byte_budget, index_bytes)
        sizes = torch.cat([s.sizes for s in segments], -1)
        scores, variance, log_mass = self.estimate(block, segments, sizes)
        ranks = selection.rank_score(
            scores, variance, log_mass, block.always_lse, self.choices.score, self.choices.group
        )
        chosen_clusters = self.select(block, ranks, sizes, budget)
        chosen = members_of(chosen_clusters, segments)
        if self.choices.drop_tail:
            return block.attend(chosen, index_bytes)
        rest = log_mass.masked_fill(chosen_clusters[:, None], float("-inf"))
        values = torch.cat([s.value_centroids for s in segments], -2)
        values = stored(values, self.choices.number_format)
        if self.choices.value_fraction < 1:
            rest, values = coarse_values(rest, values, segments, self.choices.value_fraction)
        return block.attend(chosen, index_bytes, rest, values)

    def estimate(self, block, segments, sizes):
        """[H, G, Q, K] logits of the centroids, variance of the logits, log of the mass."""
        centroids = torch.cat([s.key_centroids for s in segments], -2)
        scores = self.centroid_logits(block, stored(centroids, self.choices.number_format))
        variance = tail.logit_variance(block, segments, self.choices.variance)
        if isinstance(variance, torch.Tensor):
            variance = variance.clamp(max=self.choices.max_variance)
        return scores, variance, scores + 0.5 * variance + sizes.log()[:, None, None]

    def centroid_logits(self, block, centroids: torch.Tensor) -> torch.Tensor:
        """[H, G, Q, K] of the true queries against key_centroids [H, K, D]."""
        return (block.queries * block.sm_scale) @ centroids[:, None].mT

    def select(self, block, ranks, sizes, budget: int) -> torch.Tensor:
        """[H, Q, K] bool: the clusters to attend to exactly."""
        choices = self.choices
        if choices.layer_weights is not None:
            return self._select_by_layer(block, ranks, sizes, budget)
        if choices.rule == "heads":
            return selection.take_together(
                ranks, sizes, budget, block.num_kv_heads, choices.cap_factor
            )
        cap = int(budget * choices.cap_factor)
        return selection.take(ranks, sizes, cap, choices.rule, choices.threshold)

    def _select_by_layer(self, block, ranks, sizes, budget: int) -> torch.Tensor:
        weights = torch.tensor(self.choices.layer_weights, device=ranks.device)
        heads_per_layer = block.num_kv_heads
        all_heads = weights.repeat_interleave(heads_per_layer)[block.heads]
        budgets = (all_heads * budget).long()[:, None, None]
        return selection.take(ranks, sizes, budgets, self.choices.rule)


def members_of(clusters: torch.Tensor, segments: list[SegmentClusters]) -> torch.Tensor:
    """[H, Q, T] bool: the tokens of clusters [H, Q, K]."""
    parts, begin = [], 0
    for segment in segments:
        end = begin + segment.sizes.shape[-1]
        ids = segment.cluster_ids[:, None].expand(-1, clusters.shape[1], -1)
        parts.append(clusters[..., begin:end].gather(-1, ids))
        begin = end
    return torch.cat(parts, -1)


def coarse_values(
    rest: torch.Tensor, values: torch.Tensor, segments: list[SegmentClusters], fraction: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the value centroids of the heaviest clusters; the others share their segment's mean.

    Args:
        rest: [H, G, Q, K] log of the mass of the clusters not attended to exactly.
        values: [H, K, D].

    Returns:
        The same with one more column per segment, its mean value and the mass of the others.
    """
    mass = rest.logsumexp(1)
    count = max(1, int(fraction * mass.shape[-1]))
    kept = torch.zeros_like(mass, dtype=torch.bool)
    kept = kept.scatter_(-1, mass.topk(count, dim=-1).indices, True)[:, None]
    light = rest.masked_fill(kept, float("-inf"))
    columns, means, begin = [], [], 0
    for segment in segments:
        end = begin + segment.sizes.shape[-1]
        columns.append(light[..., begin:end].logsumexp(-1))
        weight = segment.sizes / segment.sizes.sum(-1, keepdim=True)
        means.append((weight[..., None] * values[:, begin:end]).sum(-2))
        begin = end
    heavy = rest.masked_fill(~kept, float("-inf"))
    return (
        torch.cat([heavy, torch.stack(columns, -1)], -1),
        torch.cat([values, torch.stack(means, -2)], -2),
    )
