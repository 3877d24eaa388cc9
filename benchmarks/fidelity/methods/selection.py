"""Which clusters are attended to exactly: how they are ranked, and when to stop."""

from __future__ import annotations

import torch

SCORES = ("share", "centroid-share", "corrected", "residual", "optimistic", "mass")
GROUPS = ("sum", "max")
RULES = ("prefix", "fill", "threshold", "heads")


def rank_score(
    scores: torch.Tensor,
    variance: torch.Tensor | float,
    tail: torch.Tensor,
    always_lse: torch.Tensor,
    kind: str,
    group: str,
) -> torch.Tensor:
    """[H, Q, K] the rank of a cluster for a KV head; larger is better.

        share           mean probability of a token of the cluster, exp(score) / all mass
        centroid-share  the same without the always exact tokens in the denominator (Eq. 1)
        corrected       share with the second-order correction, exp(score + variance / 2)
        residual        share * variance, what leaving the cluster to its centroid may cost
        optimistic      share of a token one standard deviation above the mean
        mass            share of the whole cluster

    summed over the query heads of the group, or the largest of them.

    Args:
        scores, tail: [H, G, Q, K] logits of the centroids; log of the mass they stand for.
        always_lse: [H, G, Q].
    """
    lse = tail.logsumexp(-1)
    if kind != "centroid-share":
        lse = torch.logaddexp(lse, always_lse)
    if kind == "corrected":
        scores = scores + 0.5 * variance
    elif kind == "optimistic":
        scores = scores + (variance + 1e-12) ** 0.5
    elif kind == "residual":
        scores = scores + torch.log(variance + 1e-12)
    elif kind == "mass":
        scores = tail
    probability = (scores - lse[..., None]).exp()
    return probability.sum(1) if group == "sum" else probability.amax(1)


def take(
    ranks: torch.Tensor,
    sizes: torch.Tensor,
    budget: int,
    rule: str = "prefix",
    threshold: float = 0.0,
) -> torch.Tensor:
    """[H, Q, K] bool: whole clusters, best first, of at most budget tokens.

        prefix      the first cluster that does not fit ends the list
        fill        it is passed over, and smaller ones further down are tried (three rounds)
        threshold   as prefix, and the list ends where the rank falls below the threshold

    Args:
        ranks: [H, Q, K].
        sizes: [H, K] tokens; empty clusters are never taken.
    """
    nonempty = (sizes > 0)[:, None].expand(ranks.shape)
    order = ranks.masked_fill(~nonempty, -1.0).argsort(dim=-1, descending=True, stable=True)
    sizes = sizes[:, None].expand(ranks.shape).gather(-1, order)
    taken = sizes.cumsum(-1) <= budget
    if rule == "fill":
        for _ in range(2):
            left = budget - (sizes * taken).sum(-1, keepdim=True)
            fits = ~taken & (sizes <= left)
            taken = taken | (fits & ((sizes * fits).cumsum(-1) <= left))
    elif rule == "threshold":
        taken = taken & (ranks.gather(-1, order) >= threshold)
    chosen = torch.zeros_like(taken).scatter_(-1, order, taken)
    return chosen & nonempty


def take_together(
    ranks: torch.Tensor,
    sizes: torch.Tensor,
    budget: int,
    num_kv_heads: int,
    cap_factor: float,
) -> torch.Tensor:
    """As prefix, with one budget of num_kv_heads * budget tokens for the heads of a layer.

    No head takes more than cap_factor * budget tokens. ranks [H, Q, K], sizes [H, K].
    """
    capped = take(ranks, sizes, int(cap_factor * budget))
    ranks = ranks.masked_fill(~capped, 0.0)
    together = ranks.unflatten(0, (-1, num_kv_heads)).transpose(1, 2).flatten(-2)
    joint_sizes = sizes.unflatten(0, (-1, num_kv_heads)).flatten(-2)
    chosen = take(together, joint_sizes, num_kv_heads * budget)
    chosen = chosen.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2).flatten(0, 1)
    return chosen & capped
