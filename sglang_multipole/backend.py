"""The attention backend `multipole`: decode by clusters.

It decodes and nothing else; SGLang pairs it with a dense backend for prefill.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from multipole_patches import SCHEDULER_PATCHES, verify_applied
from sglang_multipole import sglang_compat
from sglang_multipole.attach import runtime_of
from sglang_multipole.config import BACKEND_NAME
from sglang_multipole.runtime import MultipoleRuntime

logger = logging.getLogger(__name__)

DENSE_TESTED_ON_GPUS = ("flashinfer", "triton")  # docs/testing.md


class MultipoleAttnBackend(AttentionBackend):
    """Decode attention over the cluster pool; all state is in the runtime.

    A batch in which no row may have clusters is attended by SGLang's dense backend.

    Args:
        dense: an attention backend of SGLang's own, used for decode alone.

    Attributes:
        is_sparse: whether the current step, or the graph being captured, is with clusters.
    """

    def __init__(self, runner: Any, runtime: MultipoleRuntime, dense: AttentionBackend):
        super().__init__()
        self.runtime, self.dense = runtime, dense
        self.is_sparse = False
        # SGLang reads these from the backend
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.needs_cpu_seq_lens = dense.needs_cpu_seq_lens

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self._begin_step(forward_batch)
        if not self.is_sparse:
            self.dense.init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if not in_capture:
            self._begin_step(forward_batch)
        elif self.is_sparse:
            self.runtime.begin_unplanned(forward_batch.req_pool_indices, forward_batch.seq_lens)
        if not self.is_sparse:
            self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        if not self.is_sparse:
            self.dense.init_forward_metadata_in_graph(forward_batch)

    def _begin_step(self, forward_batch: Any) -> None:
        rows = forward_batch.req_pool_indices
        if self.runtime.has_plan:
            self.is_sparse = self.runtime.begin_step(rows, forward_batch.seq_lens)
        else:
            self.is_sparse = False
            self.runtime.count_unannounced(len(rows))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        limit = self.runtime.path.limits.rows
        if max_bs > limit:
            raise RuntimeError(
                f"multipole: the decode buffers hold {limit} rows, and graphs of {max_bs} rows are "
                "to be captured"
            )
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        # a row of padding reads slot 0, which no request owns
        return self.dense.get_cuda_graph_seq_len_fill_value()

    def on_after_cuda_graph_warmup(self) -> None:
        self.dense.on_after_cuda_graph_warmup()

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
        if not self.is_sparse:
            return self.dense.forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs
            )
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None:
            sglang_compat.write_kv(pool, layer, forward_batch.out_cache_loc, k, v)
        q = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        out = torch.empty_like(q)
        self.runtime.path.attend(layer.layer_id - pool.start_layer, q, layer.scaling, out)
        return out.view(out.shape[0], -1)

    def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError(
            "multipole: this backend decodes only, and was asked to prefill; choose a dense "
            "backend with --prefill-attention-backend"
        )


def create_backend(runner: Any) -> AttentionBackend:
    """SGLang's factory of the backend; called once the model and its pools exist.

    Raises:
        RuntimeError: a hook is not in place, or multipole attention was not asked for properly.
    """
    verify_applied(SCHEDULER_PATCHES)
    runtime = runtime_of(runner)
    if runtime is None:
        raise RuntimeError(
            "multipole: the cluster pool was not built; start the server with --enable-multipole, "
            f"which also sets --decode-attention-backend {BACKEND_NAME}"
        )
    name = sglang_compat.dense_backend_name(runner, runtime.config)
    if runner.device == "cuda" and name not in DENSE_TESTED_ON_GPUS:
        logger.warning(
            "Multipole attention: dense attention by %s, which was not tested beside it on a GPU; "
            "%s were (--attention-backend)",
            name,
            " and ".join(DENSE_TESTED_ON_GPUS),
        )
    dense = sglang_compat.make_dense_backend(runner, name)
    return MultipoleAttnBackend(runner, runtime, dense)
