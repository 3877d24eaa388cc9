"""The paper's Multipole Attention (arXiv 2506.13059) and its drop variant (Squeezed Attention).

Keys are clustered without position over the whole 8192-token window, anew for every extent with
ten Lloyd iterations, which flatters the paper's incremental update. Windowed RoPE: the query is
compared with a mean key as if it stood 2048 tokens behind it, in the lookup and in the tail.
Clusters are ranked by Eq. 1, exp(score) / sum_j size_j exp(score_j) over the centroids, summed
over the query group; whole clusters, best first, up to the budget. Everything is in bf16.
"""

from __future__ import annotations

from benchmarks.fidelity.methods.clusters import Clustering
from benchmarks.fidelity.methods.multipole import Multipole, MultipoleChoices

WINDOWED_QUERY_POSITION = 2048


class PaperMultipole(Multipole):
    def __init__(self, drop_tail: bool = False, seed: int = 0) -> None:
        clustering = Clustering(
            segment_size=8192,
            max_cluster_size=None,
            num_lloyd_iters=10,
            content_centroid=True,
            far_seeds=False,
            seed=seed,
        )
        choices = MultipoleChoices(
            clustering=clustering,
            number_format="bf16",
            variance="none",
            score="centroid-share",
            drop_tail=drop_tail,
        )
        super().__init__("squeezed" if drop_tail else "paper", choices)

    def centroid_logits(self, block, centroids):
        content = block.rope.unrotate(block.queries, block.positions)
        fixed = (block.positions * 0) + WINDOWED_QUERY_POSITION
        windowed_queries = block.rope.rotate(content, fixed)
        return (windowed_queries * block.sm_scale) @ centroids[:, None].mT
