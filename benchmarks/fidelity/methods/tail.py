"""How much softmax mass a cluster stands for when only its mean key is known.

The mean of exp(logit) over a cluster is larger than exp of the mean logit; to second order by the
factor exp(variance / 2), the variance being that of the cluster's logits. The kinds differ in what
they know of it (q stands for the scaled query):

    none        0
    constant    CONSTANT_VARIANCE, of any cluster
    isotropic   |q|^2 * v, v the mean variance of the cluster's keys, one scalar a cluster
    pair        reference.logit_variance: how v is spread over the rotary pairs, one vector [D / 2]
                per segment and head
    pooled      q' C q * v / mean(v), C [D, D] the covariance, one matrix per segment and head
    true        the variance itself: a bound, it needs every token
"""

from __future__ import annotations

import torch

from benchmarks.fidelity.block import Block
from benchmarks.fidelity.index_store import SegmentClusters
from multipole_kernels import reference

KINDS = ("none", "constant", "isotropic", "pair", "pooled", "true")
CONSTANT_VARIANCE = 0.75
VARIANCE_BYTES = 4


def logit_variance(
    block: Block, segments: list[SegmentClusters], kind: str
) -> torch.Tensor | float:
    """[H, G, Q, K] variance of the logits inside each cluster, or one number for all."""
    if kind == "none":
        return 0.0
    if kind == "constant":
        return CONSTANT_VARIANCE
    q = block.queries * block.sm_scale
    if kind == "isotropic":
        variance = torch.cat([s.variance for s in segments], -1)
        return q.square().sum(-1, keepdim=True) * variance[:, None, None]
    if kind == "true":
        return torch.cat([_true_variance(q, block, s) for s in segments_at(block, segments)], -1)
    h, g, n, d = q.shape
    if kind == "pair":
        weight = [s.pair_weight[:, None].expand(-1, s.sizes.shape[-1], -1) for s in segments]
        variance = torch.cat([s.variance for s in segments], -1)
        flat = block.queries.reshape(h, g * n, d)
        pair = reference.logit_variance(flat, variance, torch.cat(weight, 1), block.sm_scale)
        return pair.view(h, g, n, -1)
    parts = []
    for segment in segments:
        spread = torch.einsum("hgnd,hde,hgne->hgn", q, segment.covariance, q)
        parts.append(spread[..., None] * relative_variance(segment)[:, None, None])
    return torch.cat(parts, -1)


def relative_variance(segment: SegmentClusters) -> torch.Tensor:
    """[H, K] a cluster's variance over the mean variance of the segment's tokens."""
    total = (segment.variance * segment.sizes).sum(-1, keepdim=True)
    mean = total / segment.sizes.sum(-1, keepdim=True)
    return segment.variance / mean.clamp(min=1e-12)


def segments_at(block: Block, segments: list[SegmentClusters]):
    """(segment, its tokens' logits [H, G, Q, T]) in order."""
    begin = 0
    for segment in segments:
        end = begin + segment.cluster_ids.shape[-1]
        yield segment, block.candidates[..., begin:end]
        begin = end


def _true_variance(q, block, part) -> torch.Tensor:
    segment, logits = part
    h, g, n, _ = logits.shape
    index = segment.cluster_ids[:, None, None].expand(logits.shape)
    size = segment.sizes.clamp(min=1)[:, None, None]
    zeros = logits.new_zeros(h, g, n, segment.sizes.shape[-1])
    mean = zeros.scatter_add(-1, index, logits) / size
    centered = logits - mean.gather(-1, index)
    return zeros.scatter_add(-1, index, centered.square()) / size
