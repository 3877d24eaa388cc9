"""How many places the cluster pool has and what they cost."""

from __future__ import annotations

from typing import Any

from sglang_multipole.cluster_pool import place_bytes
from sglang_multipole.config import MultipoleConfig


def num_places(config: MultipoleConfig, num_tokens: int) -> int:
    """Places for a KV pool of num_tokens tokens: one a segment, headroom, and place 0."""
    num_segments = -(-num_tokens // config.segment_size)
    return num_segments + (config.pool_headroom or num_segments // 16 + 8) + 1


def bytes_per_token(config: MultipoleConfig, kvc: Any, num_layers: int) -> int:
    """Bytes of the cluster pool per token of the KV pool, headroom included, rounded up.

    Args:
        kvc: SGLang's KVCacheConfigurator.
    """
    from sglang.srt.runtime_context import get_parallel

    num_kv_heads = kvc.model_config.get_num_kv_heads(get_parallel().attn_tp_size)
    element_size = kvc.kv_cache_dtype.itemsize
    head_dim = kvc.model_config.head_dim
    return bytes_of_shape(config, num_layers, num_kv_heads, head_dim, element_size)


def bytes_of_shape(
    config: MultipoleConfig, num_layers: int, num_kv_heads: int, head_dim: int, element_size: int
) -> int:
    """The same from the sizes of one rank; element_size in bytes."""
    segment = place_bytes(config, num_layers, num_kv_heads, head_dim, element_size)
    with_headroom = segment if config.pool_headroom else segment * 17 // 16
    # per slot: segment_of_slot and slot_generation, int32 each
    return -(-with_headroom // config.segment_size) + 8
