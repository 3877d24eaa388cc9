"""Every read of SGLang's internals that differs, or may come to differ, between its versions.

Checked with SGLang 0.5.17. Imports of SGLang are inside the functions: this module is imported by
the entry point, in processes that never run a model.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch

from sglang_multipole.config import MultipoleConfig
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.request_settings import accepted_token_budget
from sglang_multipole.segment_planner import DecodeRow

TESTED_VERSIONS = ("0.5.17",)

# rows that batches without a CUDA graph may have, if there are so many requests
_MAX_ROWS_WITHOUT_GRAPH = 256

# what SGLang's models take where a configuration names none
_DEFAULT_ROPE_BASE = 10000.0

# attribute of ServerArgs that carries the configuration to every process as plain builtins; its
# leading underscore is what lets it through SGLang's read-only and field checks
ARGS_ATTRIBUTE = "_multipole"


def sglang_version() -> str:
    return importlib.metadata.version("sglang")


def own_version() -> str:
    return importlib.metadata.version("sglang-multipole")


def config_values(server_args: Any) -> dict[str, Any] | None:
    """The configuration that travels in server_args, or None when multipole is off."""
    return getattr(server_args, ARGS_ATTRIBUTE, None)


def applied_hooks() -> set[str]:
    """Targets that SGLang's hook registry has patched in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return set(HookRegistry._patched)


def decode_rows(batch: Any, config: MultipoleConfig) -> list[DecodeRow]:
    """The rows of a ScheduleBatch about to decode; lengths include the token being decoded."""
    rows = batch.req_pool_indices_cpu.tolist()
    lengths = batch.seq_lens_cpu.tolist()
    generations = batch.req_to_token_pool.req_generation[batch.req_pool_indices_cpu].tolist()
    return [
        DecodeRow(
            req.rid,
            row,
            length,
            accepted_token_budget(req.sampling_params.custom_params, config),
            generation,
        )
        for req, row, length, generation in zip(batch.reqs, rows, lengths, generations, strict=True)
    ]


def finished_requests(batch: Any) -> list[Any]:
    """The Reqs of a processed ScheduleBatch that have ended, each possibly in two batches."""
    return [req for req in batch.reqs if req.finished()]


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(module path, RadixAttention, rotary embedding or None) of each attention layer."""
    from sglang.srt.layers.radix_attention import RadixAttention

    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, RadixAttention):
            parent = modules.get(name.rpartition(".")[0])
            yield name, module, getattr(parent, "rotary_emb", None)


def kv_layers(runner: Any) -> list[KVLayer]:
    """The runner's layers in order: their KV buffers and rotary tables."""
    pool = runner.token_to_kv_pool
    rotary = {layer.layer_id: emb for _, layer, emb in attention_layers(runner.model)}
    tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    layers = []
    for layer_id in range(pool.start_layer, pool.start_layer + pool.layer_num):
        emb = rotary[layer_id]
        if emb is not None and id(emb) not in tables:
            tables[id(emb)] = _rotary_table(emb, runner)
        cos, sin = tables[id(emb)] if emb is not None else (None, None)
        layers.append(
            KVLayer(pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id), cos, sin)
        )
    return layers


def _rotary_table(emb: Any, runner: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [max_position, rotary_dim / 2] float32, of the positions a request can have."""
    table = emb.cos_sin_cache[: runner.req_to_token_pool.req_to_token.shape[1]]
    cos, sin = table.to(runner.device, torch.float32).chunk(2, dim=-1)
    return cos.contiguous(), sin.contiguous()


def rope_base(model_config: Any) -> float:
    """rope_theta of a model's configuration, the largest if there are several kinds of layers."""
    text_config = model_config.hf_text_config
    parameters = getattr(text_config, "rope_parameters", None) or {}
    by_kind = [value for value in parameters.values() if isinstance(value, dict)]
    bases = [kind.get("rope_theta") for kind in (by_kind or [parameters])]
    bases.append(getattr(text_config, "rope_theta", None))
    return max((base for base in bases if base is not None), default=_DEFAULT_ROPE_BASE)


def write_kv(pool: Any, layer: Any, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store new tokens' keys and values in the KV pool."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v)


def gqa_group_size(model: torch.nn.Module) -> int:
    """Query heads that share a KV head."""
    _, layer, _ = next(attention_layers(model))
    return layer.tp_q_head_num // layer.tp_k_head_num


def gqa_group_size_of(model_config: Any, num_kv_heads: int, tp_size: int) -> int:
    """The same from the model's configuration, on one rank with num_kv_heads KV heads."""
    return model_config.num_attention_heads // tp_size // num_kv_heads


def max_batch_rows(server_args: Any, max_requests: int | None) -> int:
    """Rows of the largest decode batch that is attended with clusters.

    Args:
        max_requests: that run at a time, None if not known yet.
    """
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.utils import get_cuda_graph_max_batch_size

    rows = _MAX_ROWS_WITHOUT_GRAPH if max_requests is None else max_requests
    graphs = server_args.cuda_graph_config.decode
    largest = 0
    if graphs.backend != Backend.DISABLED and graphs.bs:
        largest = max(graphs.bs)
        if max_requests is not None:
            largest = min(largest, get_cuda_graph_max_batch_size(server_args, max_requests))
    return max(largest, min(rows, _MAX_ROWS_WITHOUT_GRAPH))


def dense_backend_name(runner: Any, config: MultipoleConfig) -> str:
    """The name of SGLang's own attention backend for batches without clusters."""
    if config.dense_backend != "auto":
        return config.dense_backend
    prefill, _ = runner.server_args.get_attention_backends()
    return prefill


def make_dense_backend(runner: Any, name: str) -> Any:
    """One of SGLang's own attention backends."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return ATTENTION_BACKENDS[name](runner)


def decode_backend(runner: Any) -> Any:
    """The runner's decode attention backend, which SGLang pairs with another for prefill."""
    return runner.attn_backend.decode_backend


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """A model on one rank, from its configuration alone; gqa_group_size in query heads."""

    architecture: str
    num_layers: int
    num_kv_heads: int
    gqa_group_size: int
    head_dim: int
    dtype: torch.dtype


def model_sizes(server_args: Any) -> ModelSizes:
    """The sizes of the model that these ServerArgs would serve."""
    model_config = server_args.get_model_config()
    tp_size = server_args.tp_size
    num_kv_heads = model_config.get_num_kv_heads(tp_size)
    return ModelSizes(
        architecture=model_config.hf_config.architectures[0],
        num_layers=model_config.num_hidden_layers,
        num_kv_heads=num_kv_heads,
        gqa_group_size=gqa_group_size_of(model_config, num_kv_heads, tp_size),
        head_dim=model_config.head_dim,
        dtype=model_config.dtype,
    )
