"""Build the runtime of a model runner and tie it to the KV pool's allocator."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from sglang_multipole import memory, refusals, sglang_compat
from sglang_multipole.audit import Audit
from sglang_multipole.cluster_pool import ClusterPool, PoolShape
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.runtime import DecodePath, MultipoleRuntime
from sglang_multipole.segment_builder import Clustering, SegmentBuilder
from sglang_multipole.torch_clustering import TorchClustering
from sglang_multipole.torch_path import TorchPath

RUNTIME_ATTRIBUTE = "_multipole"

_logger = logging.getLogger(__name__)


def runtime_of(runner: Any) -> MultipoleRuntime | None:
    """The model runner's runtime, or None when multipole is off."""
    return getattr(runner, RUNTIME_ATTRIBUTE, None)


def attach_runtime(runner: Any, values: dict[str, Any]) -> None:
    """Give the runner its runtime.

    Raises:
        RefusedError: a layer or pool of the model is not supported.
    """
    refusals.check_runner(runner)
    config = MultipoleConfig.from_dict(values)
    layers = sglang_compat.kv_layers(runner)
    num_slots, num_kv_heads, head_dim = layers[0].key_buffer.shape
    req_to_token = runner.req_to_token_pool.req_to_token
    shape = PoolShape(
        num_layers=len(layers),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_slots=num_slots,
        num_rows=req_to_token.shape[0],
        dtype=layers[0].key_buffer.dtype,
        device=runner.device,
    )
    num_places = memory.num_places(config, runner.max_total_num_tokens)
    pool = ClusterPool(config, shape, num_places)
    builder = SegmentBuilder(pool, _clustering(pool, layers, req_to_token), req_to_token)
    audit = make_audit(config, layers, req_to_token)
    path = _decode_path(runner, pool, layers, req_to_token, audit)
    runtime = MultipoleRuntime(config, pool, builder, path, audit)
    _watch(runner.token_to_kv_pool_allocator, runtime)
    setattr(runner, RUNTIME_ATTRIBUTE, runtime)


def make_audit(
    config: MultipoleConfig, layers: list[KVLayer], req_to_token: torch.Tensor
) -> Audit | None:
    """The audit that the configuration asks for, None for none."""
    if not config.audit_interval:
        return None
    layer = config.audit_layer if config.audit_layer >= 0 else len(layers) // 2
    return Audit(config, layer, layers[layer], req_to_token)


def _clustering(pool: ClusterPool, layers: list[KVLayer], req_to_token: torch.Tensor) -> Clustering:
    if req_to_token.device.type == "cpu":
        return TorchClustering(pool, layers, req_to_token)
    from sglang_multipole.triton_clustering import make_clustering

    clustering = make_clustering(pool, layers, req_to_token)
    if clustering is None:
        _logger.warning(
            "multipole: segments of %d tokens in %d clusters at head_dim %d are clustered by "
            "PyTorch code, many times slower than by kernels; see docs/kernels.md, Clustering",
            pool.config.segment_size,
            pool.config.clusters_per_segment,
            pool.shape.head_dim,
        )
        return TorchClustering(pool, layers, req_to_token)
    clustering.warm_up()
    return clustering


def _decode_path(
    runner: Any,
    pool: ClusterPool,
    layers: list[KVLayer],
    req_to_token: torch.Tensor,
    audit: Audit | None,
) -> DecodePath:
    audit_layer = audit.layer if audit is not None else None
    if req_to_token.device.type == "cpu":
        return TorchPath(pool, layers, req_to_token, audit_layer)
    # imports kernels that a machine without a GPU never runs
    from sglang_multipole.step_buffers import StepBuffers, StepShape
    from sglang_multipole.triton_path import TritonPath

    shape = StepShape(
        max_rows=sglang_compat.max_batch_rows(runner.server_args, runner.req_to_token_pool.size),
        max_context=runner.model_config.context_len,
        num_slots=pool.shape.num_slots,
        num_kv_heads=pool.shape.num_kv_heads,
        gqa_group_size=sglang_compat.gqa_group_size(runner.model),
        head_dim=pool.shape.head_dim,
    )
    device = req_to_token.device
    buffers = StepBuffers(pool.config, shape, device, device)
    return TritonPath(pool, layers, req_to_token, buffers, audit_layer)


def _watch(allocator: Any, runtime: MultipoleRuntime) -> None:
    for name in ("alloc", "alloc_extend", "alloc_decode"):
        if hasattr(allocator, name):
            setattr(allocator, name, _invalidating(getattr(allocator, name), runtime))
    clear = allocator.clear

    @functools.wraps(clear)
    def clear_both() -> None:
        if runtime.config.check_integrity:
            runtime.check_integrity()
        clear()
        runtime.clear()

    allocator.clear = clear_both


def _invalidating(alloc: Any, runtime: MultipoleRuntime) -> Any:
    @functools.wraps(alloc)
    def alloc_and_invalidate(*args: Any, **kwargs: Any) -> Any:
        slots = alloc(*args, **kwargs)
        # None: the pool is full, SGLang evicts and asks again
        if slots is not None:
            runtime.pool.invalidate_slots(slots)
        return slots

    return alloc_and_invalidate
