"""The attention backend `multipole`: SGLang's dense backend with sparse decode in front.

The instance is the dense backend's own, its class extended: prefill, buffers and every isinstance
check stay the dense backend's.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_multipole import refusals, sglang_compat
from sglang_multipole.config import BACKEND_NAME
from sglang_multipole.runtime import MultipoleRuntime


def extend(dense_class: type) -> type:
    """A subclass of a dense backend's class that decodes by clusters.

    Its instances also hold `_multipole`, their MultipoleRuntime.
    """

    class Multipole(dense_class):
        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            if forward_batch.forward_mode.is_decode():
                self._multipole.begin_step(forward_batch.req_pool_indices, forward_batch.seq_lens)

        def forward_decode(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
            **kwargs: Any,
        ) -> torch.Tensor:
            runtime: MultipoleRuntime = self._multipole
            pool = self.token_to_kv_pool
            if save_kv_cache and k is not None:
                sglang_compat.write_kv(pool, layer, forward_batch.out_cache_loc, k, v)
            q = q.view(-1, layer.tp_q_head_num, layer.head_dim)
            out = torch.empty_like(q)
            multipole_decode(
                q,
                pool.get_key_buffer(layer.layer_id),
                pool.get_value_buffer(layer.layer_id),
                runtime.pool_layer(layer.layer_id - pool.start_layer),
                runtime.decode_plan,
                layer.scaling,
                runtime.config.max_logit_variance,
                out,
                runtime.counters,
            )
            return out.view(out.shape[0], -1)

    Multipole.__name__ = f"Multipole{dense_class.__name__}"
    return Multipole


def create_backend(runner: Any) -> Any:
    """SGLang's factory of the backend; called once the model and its pools exist.

    Raises:
        RuntimeError: a hook is not in place. RefusedError: the model or a pool is not supported.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from multipole_patches import SCHEDULER_PATCHES, verify_applied

    dense_name = sglang_compat.dense_backend_name(runner)
    if runner.is_draft_worker:
        return ATTENTION_BACKENDS[dense_name](runner)
    verify_applied(SCHEDULER_PATCHES)
    runtime = getattr(runner, "_multipole", None)
    if runtime is None:
        raise RuntimeError(
            "multipole: the cluster pool was not built; start the server with --enable-multipole, "
            f"which also sets --decode-attention-backend {BACKEND_NAME}"
        )
    refusals.check_runner(runner)
    backend = ATTENTION_BACKENDS[dense_name](runner)
    backend.__class__ = extend(type(backend))
    backend._multipole = runtime
    return backend
