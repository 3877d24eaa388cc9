"""What the cluster pool and the decode buffers cost, told to SGLang before it sizes the KV pool."""

from __future__ import annotations

from typing import Any

import torch

from sglang_multipole.cluster_pool import place_bytes
from sglang_multipole.config import MultipoleConfig


def num_places(config: MultipoleConfig, num_tokens: int) -> int:
    """Places for a KV pool of num_tokens tokens: one a segment, headroom, and place 0."""
    num_segments = -(-num_tokens // config.segment_size)
    return num_segments + (config.pool_headroom or max(num_segments // 16, 8)) + 1


def bytes_per_token(config: MultipoleConfig, kvc: Any, num_layers: int) -> int:
    """Bytes of the cluster pool per token of the KV pool, headroom included, rounded up.

    Args:
        kvc: SGLang's KVCacheConfigurator.
    """
    from sglang.srt.runtime_context import get_parallel

    num_kv_heads = kvc.model_config.get_num_kv_heads(get_parallel().attn_tp_size)
    head_dim = kvc.model_config.head_dim
    return bytes_of_shape(config, num_layers, num_kv_heads, head_dim, kvc.kv_cache_dtype)


def workspace_bytes(config: MultipoleConfig, kvc: Any, budget_bytes: int) -> int:
    """Bytes of the decode buffers and of a clustering's scratch, at most, on this process's GPU.

    Args:
        kvc: SGLang's KVCacheConfigurator.
        budget_bytes: for KV pool and cluster pool; bounds the tokens that a batch can have.
    """
    from sglang.srt.runtime_context import get_parallel

    from multipole_kernels.launch_config import launch_config
    from sglang_multipole import sglang_compat
    from sglang_multipole.step_buffers import StepBuffers, StepShape

    model_config, tp_size = kvc.model_config, get_parallel().attn_tp_size
    num_kv_heads = model_config.get_num_kv_heads(tp_size)
    num_layers = kvc.layer_info.num_effective_layers
    kv_bytes = 2 * model_config.head_dim * num_kv_heads * num_layers * kvc.kv_cache_dtype.itemsize
    shape = StepShape(
        max_rows=sglang_compat.max_batch_rows(
            kvc.server_args, kvc.server_args.max_running_requests
        ),
        max_context=model_config.context_len,
        num_slots=budget_bytes // kv_bytes,
        num_kv_heads=num_kv_heads,
        gqa_group_size=sglang_compat.gqa_group_size_of(model_config, num_kv_heads, tp_size),
        head_dim=model_config.head_dim,
    )
    card = torch.device(f"{kvc.device}:{kvc.gpu_id}")
    buffers = StepBuffers(config, shape, "meta", card)
    scratch = clustering_scratch_bytes(
        config,
        num_layers,
        num_kv_heads,
        model_config.head_dim,
        kvc.kv_cache_dtype,
        launch_config(card).num_sms,
    )
    return buffers.nbytes + scratch


def clustering_scratch_bytes(
    config: MultipoleConfig,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: torch.dtype,
    num_sms: int,
) -> int:
    """Bytes of a step's clustering on a GPU and of one under way in slices, at most."""
    from multipole_kernels.segment_clustering import scratch_bytes, slice_scratch_bytes
    from sglang_multipole import torch_clustering
    from sglang_multipole.triton_clustering import geometry_of

    # no size depends on the rotated dimensions
    geometry = geometry_of(config, num_kv_heads, head_dim, kv_dtype, rotary_half=0)
    if geometry is None:
        return torch_clustering.MAX_SCRATCH
    # strict activation bounds nothing
    num_orders = 1 << 30 if config.strict_activation else config.max_builds_per_step
    in_slices = slice_scratch_bytes(geometry, num_layers, num_sms)
    return scratch_bytes(geometry, num_layers, num_orders) + in_slices


def bytes_of_shape(
    config: MultipoleConfig,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: torch.dtype,
) -> int:
    """The same from the sizes of one rank and the dtype of its KV pool."""
    segment = place_bytes(config, num_layers, num_kv_heads, head_dim, kv_dtype)
    with_headroom = segment if config.pool_headroom else segment * 17 // 16
    # per slot: segment_of_slot and slot_generation, int32 each
    return -(-with_headroom // config.segment_size) + 8
