"""One decode step of one layer: multipole attention over a ragged batch, in three launches or one.

    coarse_attention    all clusters by their centroids, all always-exact tokens
    cluster_selection   the best clusters of each (row, KV head); coarse parts merged
    exact_attention     the selected clusters' tokens in, their centroids out; the output

or, of small batches on Hopper (launch_config.py),

    team_decode         all of it

reference.multipole_attention is the definition. No host sync and no allocation: with the same
num_rows the launches can be captured in a CUDA graph and replayed over any plan.
"""

from __future__ import annotations

import torch

from multipole_kernels.cluster_selection import cluster_selection
from multipole_kernels.coarse_attention import coarse_attention
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer
from multipole_kernels.exact_attention import exact_attention
from multipole_kernels.team_decode import team_decode

_HEAD_DIMS = (64, 96, 128, 256)
_KV_DTYPES = (torch.float16, torch.bfloat16)
_EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


def multipole_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pool_layer: PoolLayer,
    plan: DecodePlan,
    workspace: DecodeWorkspace,
    sm_scale: float,
    max_logit_variance: float,
    out: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend every row's query to its context, and return out.

    plan_chunks must have run on the same plan and num_rows in this step.

    Args:
        q: [num_rows, num_q_heads, head_dim] float16 or bfloat16, query heads of a KV head adjacent.
        k_cache, v_cache: [num_slots, num_kv_heads, head_dim], the layer's KV pool, q's dtype.
        plan: rows of padding have no items and no exact tokens; their output is 0.
        max_logit_variance: bound of the second-order correction of a centroid's logit.
        out: [num_rows, num_q_heads, head_dim], q's dtype.
        counters: [at least num_rows, 4] int64; if given, each row of the batch adds to its own:
            steps with items; steps without (padding rows: neither); tokens attended exactly, the
            mean over the KV heads; tokens in the context. Give it for one layer of a step.

    Raises:
        ValueError: a shape, dtype or layout is not as above.
    """
    _check(q, k_cache, v_cache, pool_layer, workspace, out, counters)
    if q.shape[0] == 0:
        return out
    step = (q, k_cache, v_cache, pool_layer, plan, workspace, sm_scale, max_logit_variance)
    if workspace.team(q.shape[0]) is not None:
        team_decode(*step, out, counters)
        return out
    coarse_attention(*step)
    cluster_selection(q.shape[0], pool_layer, plan, workspace)
    exact_attention(*step, out, counters)
    return out


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pool_layer: PoolLayer,
    workspace: DecodeWorkspace,
    out: torch.Tensor,
    counters: torch.Tensor | None,
) -> None:
    heads, head_dim = workspace.num_kv_heads, workspace.head_dim
    q_heads = heads * workspace.gqa_group_size
    if q.shape[1:] != (q_heads, head_dim) or q.shape[0] > workspace.max_rows:
        raise ValueError(
            f"multipole_decode: q must have shape (at most {workspace.max_rows}, {q_heads}, "
            f"{head_dim}) as the workspace was made for, got {tuple(q.shape)}"
        )
    if head_dim not in _HEAD_DIMS:
        raise ValueError(f"multipole_decode: head_dim must be in {_HEAD_DIMS}, got {head_dim}")
    if q.dtype not in _KV_DTYPES or not q.dtype == k_cache.dtype == v_cache.dtype == out.dtype:
        raise ValueError(
            "multipole_decode: q, k_cache, v_cache and out must all be float16 or all bfloat16, "
            f"got {q.dtype}, {k_cache.dtype}, {v_cache.dtype} and {out.dtype}"
        )
    if out.shape != q.shape or q.stride()[1:] != (head_dim, 1) or out.stride()[1:] != (head_dim, 1):
        raise ValueError(
            f"multipole_decode: out must have q's shape {tuple(q.shape)} and both must be "
            f"contiguous within a row, got {tuple(out.shape)}, strides {q.stride()}, {out.stride()}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[1:] != (heads, head_dim) or cache.stride() != (
            k_cache.stride(0),
            head_dim,
            1,
        ):
            raise ValueError(
                f"multipole_decode: {name} must have shape (slots, {heads}, {head_dim}), "
                f"contiguous within a slot, got {tuple(cache.shape)}, strides {cache.stride()}"
            )
    centroids = pool_layer.key_centroids.dtype
    has_scale = pool_layer.key_scale is not None and pool_layer.value_scale is not None
    if (
        centroids != pool_layer.value_centroids.dtype
        or has_scale != (centroids in _EIGHT_BITS)
        or (not has_scale and centroids != q.dtype)
    ):
        raise ValueError(
            "multipole_decode: key and value centroids must both be q's dtype without scales, or "
            f"both int8 or float8_e4m3fn with scales, got {centroids} and "
            f"{pool_layer.value_centroids.dtype}, {'with' if has_scale else 'without'} scales"
        )
    for name, tensor in vars(pool_layer).items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"multipole_decode: pool_layer.{name} must be contiguous")
    if counters is not None and (counters.dtype != torch.int64 or counters.shape[1:] != (4,)):
        raise ValueError(
            "multipole_decode: counters must be int64 of shape (rows, 4), "
            f"got {counters.dtype} {tuple(counters.shape)}"
        )
