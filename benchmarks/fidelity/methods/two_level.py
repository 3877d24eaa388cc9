"""Two levels: coarse centroids are all read, fine ones only under the best coarse clusters.

A segment's fine clusters are grouped by k-means of their mean features into coarse ones. A coarse
cluster that is not refined stands for all its tokens; under the refined ones selection and tail go
on as in the flat method.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from benchmarks.fidelity.methods import selection
from benchmarks.fidelity.methods.base import COUNT_BYTES, Method
from benchmarks.fidelity.methods.clusters import Clustering, SegmentClusterer
from benchmarks.fidelity.methods.multipole import members_of
from benchmarks.fidelity.methods.quantize import centroid_bytes, stored
from benchmarks.fidelity.methods.seeding import cluster_from_placed_seeds
from benchmarks.fidelity.methods.tail import VARIANCE_BYTES
from multipole_kernels import reference


@dataclass(frozen=True)
class TwoLevelClusters:
    """Fine clusters as in SegmentClusters; coarse ones of the same kind (C of them).

    cluster_ids [H, T] fine; parents [H, K] int64; the others [H, K, ...] and coarse_* [H, C, ...].
    """

    cluster_ids: torch.Tensor
    parents: torch.Tensor
    key_centroids: torch.Tensor
    value_centroids: torch.Tensor
    sizes: torch.Tensor
    variance: torch.Tensor
    coarse_keys: torch.Tensor
    coarse_values: torch.Tensor
    coarse_sizes: torch.Tensor
    coarse_variance: torch.Tensor

    def of_heads(self, heads: slice) -> TwoLevelClusters:
        """The same for some of the heads."""
        return TwoLevelClusters(*(getattr(self, f.name)[heads] for f in fields(self)))


class TwoLevelClusterer:
    """A SegmentBuilder."""

    def __init__(self, clustering: Clustering, children: int) -> None:
        self.fine, self.children = SegmentClusterer(clustering), children
        self.key = ("two-level", clustering, children)
        self.segment_size = clustering.segment_size

    def build(self, keys, values, begin, rope, heads) -> TwoLevelClusters:
        """Clusters of keys, values [H, T, D] at positions begin and on."""
        fine = self.fine.build(keys, values, begin, rope, heads)
        num_fine = fine.sizes.shape[-1]
        num_coarse = max(1, round(num_fine / self.children))
        positions = torch.arange(begin, begin + keys.shape[-2], device=keys.device)
        content = rope.unrotate(keys, positions)
        content = reference.cluster_means(content, fine.cluster_ids, num_fine)
        content = content.nan_to_num(0.0)
        parents = cluster_from_placed_seeds(content, num_coarse, num_fine + 1, 4, 0)
        coarse_ids = parents.gather(-1, fine.cluster_ids)
        coarse = reference.summarize_clusters(keys, values, coarse_ids, num_coarse)
        return TwoLevelClusters(
            fine.cluster_ids,
            parents,
            fine.key_centroids,
            fine.value_centroids,
            fine.sizes,
            fine.variance,
            coarse.key_centroids,
            coarse.value_centroids,
            coarse.cluster_sizes,
            coarse.key_variance,
        )


class TwoLevel(Method):
    def __init__(
        self,
        name: str,
        clustering: Clustering,
        children: int = 8,
        refined: float = 0.375,
        number_format: str = "fp8",
        max_variance: float = 1.0,
    ) -> None:
        self.name, self.refined = name, refined
        self.number_format, self.max_variance = number_format, max_variance
        self.clustering, self.children = clustering, children
        self.clusterer = TwoLevelClusterer(clustering, children)

    def index_bytes(self, block) -> float:
        """All coarse clusters and the refined part of the fine ones."""
        per_cluster = 2 * centroid_bytes(block.keys.shape[-1], self.number_format)
        per_cluster += COUNT_BYTES + VARIANCE_BYTES
        clusters = block.num_clustered / self.clustering.tokens_per_cluster
        return clusters * per_cluster * (1 / self.children + self.refined)

    def attend(self, block, indexes, byte_budget):
        segments = indexes.segments(block, self.clusterer)
        index_bytes = self.index_bytes(block)
        budget = self.affordable_tokens(block, byte_budget, index_bytes)
        joined = {
            f.name: torch.cat([getattr(s, f.name) for s in segments], 1)
            for f in fields(TwoLevelClusters)
            if f.name not in ("cluster_ids", "parents")
        }
        first, parents = 0, []
        for segment in segments:
            parents.append(segment.parents + first)
            first += segment.coarse_sizes.shape[-1]
        parents = torch.cat(parents, -1)

        coarse_scores, coarse_tail = self._estimate(block, joined, "coarse_")
        scores, tail = self._estimate(block, joined, "")
        lse = torch.logaddexp(coarse_tail.logsumexp(-1), block.always_lse)[..., None]

        children = torch.zeros_like(joined["coarse_sizes"])
        children.scatter_add_(-1, parents, torch.ones_like(parents, dtype=children.dtype))
        coarse_rank = (coarse_scores - lse).exp().sum(1)
        refined = selection.take(coarse_rank, children, int(self.refined * parents.shape[-1]))
        open_fine = refined.gather(-1, parents[:, None].expand(-1, refined.shape[1], -1))

        rank = (scores - lse).exp().sum(1)
        # a cluster that is not read cannot be chosen: to take() it is empty
        chosen = selection.take(rank.masked_fill(~open_fine, 0.0), joined["sizes"], budget)
        chosen = chosen & open_fine
        rest = tail.masked_fill((chosen | ~open_fine)[:, None], float("-inf"))
        coarse_rest = coarse_tail.masked_fill(refined[:, None], float("-inf"))
        values = torch.cat([joined["value_centroids"], joined["coarse_values"]], -2)
        return block.attend(
            members_of(chosen, segments),
            index_bytes,
            torch.cat([rest, coarse_rest], -1),
            stored(values, self.number_format),
        )

    def _estimate(self, block, joined, level: str):
        """[H, G, Q, K] logits and log-masses of one level's centroids."""
        keys = joined["coarse_keys" if level else "key_centroids"]
        q = block.queries * block.sm_scale
        scores = q @ stored(keys, self.number_format)[:, None].mT
        spread = q.square().sum(-1, keepdim=True) * joined[level + "variance"][:, None, None]
        log_sizes = joined[level + "sizes"].log()[:, None, None]
        return scores, scores + 0.5 * spread.clamp(max=self.max_variance) + log_sizes
