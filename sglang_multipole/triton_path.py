"""A decode step on a GPU: snapshot, plan and attention as Triton kernels over fixed buffers.

A captured graph owns the addresses of the buffers, so they are made once for the largest batch;
a batch beyond their limits is attended densely, and nothing is allocated while the server runs.
Nothing here waits for the device; results travel to the host through a ring of pinned buffers, on a
stream of their own, beside the sampling of the step's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from multipole_kernels.decode_plan import plan_chunks
from multipole_kernels.multipole_decode import multipole_decode
from multipole_kernels.segment_snapshot import PoolIndex
from multipole_kernels.torch_decode import NUM_COUNTERS
from sglang_multipole.audit import AuditedRow
from sglang_multipole.cluster_pool import ClusterPool
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.step_buffers import StepBuffers

# steps whose results may be on their way to the host at a time; SGLang has two in flight
_RING = 4


class TritonPath:
    """Buffers and launches of a decode step.

    Args:
        buffers: what a step is laid out in; captured graphs own their addresses.
        audit_layer: whose queries and outputs are kept for the audit, if buffers has a place.
    """

    def __init__(
        self,
        pool: ClusterPool,
        layers: Sequence[KVLayer],
        req_to_token: torch.Tensor,
        buffers: StepBuffers,
        audit_layer: int | None = None,
    ):
        self._audit_layer = audit_layer
        self.pool, self.layers, self.req_to_token = pool, layers, req_to_token
        self.buffers = buffers
        self.nbytes, self.limits = buffers.nbytes, buffers.limits
        max_rows, max_segments = buffers.snapshot.found_extent.shape
        self._budgets = [_pinned(max_rows, dtype=torch.int32) for _ in range(_RING)]
        self._budgets_sent: list[int] | None = None
        # without a GPU (the interpreter) copies have happened when they return
        self._copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._results = [
            TritonResults(
                _pinned(max_rows, max_segments, dtype=torch.int32),
                _pinned(max_rows, NUM_COUNTERS, dtype=torch.int64),
                _pinned(pool.num_places, dtype=torch.int64),
                self._copies,
            )
            for _ in range(_RING)
        ]
        self._index = PoolIndex(
            pool.segment_slots,
            pool.segment_slot_generation,
            pool.segment_extent,
            pool.last_used,
            pool.segment_of_slot,
            pool.slot_generation,
            pool.open_place,
        )
        self._turn = 0

    def begin(
        self, rows: torch.Tensor, seq_lens: torch.Tensor, token_budgets: Sequence[int], step: int
    ) -> None:
        """Find the rows' segments and lay out the step's work; see TorchPath.begin.

        Rows beyond len(token_budgets) are padding of a captured graph.
        """
        config, num_rows, buffers = self.pool.config, rows.shape[0], self.buffers
        self._turn = (self._turn + 1) % _RING
        plan = buffers.snapshot.plan
        if self._copies is not None:
            # what the last step's results are copied from is written below
            torch.cuda.current_stream().wait_stream(self._copies)
        self._send_budgets([*token_budgets, *[0] * (num_rows - len(token_budgets))])
        buffers.snapshot.take(
            self._index,
            self.req_to_token,
            rows,
            seq_lens,
            step,
            min_context=config.min_context_of(len(token_budgets)),
            recluster_interval=config.recluster_interval,
            num_sink_tokens=config.num_sink_tokens,
        )
        plan_chunks(plan, buffers.workspace, num_rows, self.pool.key_centroids.element_size())
        buffers.counters[:num_rows].zero_()

    def _send_budgets(self, budgets: list[int]) -> None:
        """Fill plan.token_budget, unless it holds them from the step before."""
        if budgets == self._budgets_sent:
            return
        pinned = self._budgets[self._turn][: len(budgets)]
        pinned.copy_(torch.tensor(budgets, dtype=torch.int32))
        token_budget = self.buffers.snapshot.plan.token_budget
        token_budget[: len(budgets)].copy_(pinned, non_blocking=True)
        self._budgets_sent = budgets

    def attend(self, layer: int, q: torch.Tensor, sm_scale: float, out: torch.Tensor) -> None:
        """Attention of the step's rows in one layer; q, out [B, num_q_heads, head_dim]."""
        kv, buffers = self.layers[layer], self.buffers
        multipole_decode(
            q,
            kv.key_buffer,
            kv.value_buffer,
            self.pool.layer(layer),
            buffers.snapshot.plan,
            buffers.workspace,
            sm_scale,
            self.pool.config.max_logit_variance,
            out,
            buffers.counters,
        )
        if layer == self._audit_layer:
            buffers.audit.keep(q, out, buffers.workspace, sm_scale)

    def audited(self, index: int, seq_len: int) -> AuditedRow:
        """What the step under way did for its row `index`, which is seq_len tokens long."""
        return self.buffers.audit.row(self.buffers.snapshot.plan, index, seq_len)

    def results(self, num_rows: int) -> TritonResults:
        """Start copying the step's results; to be called on the stream of the forward."""
        results, buffers = self._results[self._turn], self.buffers
        results.start(
            num_rows, buffers.snapshot.found_extent, buffers.counters, self.pool.last_used
        )
        return results


class TritonResults:
    """Pinned buffers of one step's results; read waits for the copy.

    Args:
        copies: the stream of the copies, None without a GPU.
    """

    def __init__(
        self,
        found: torch.Tensor,
        counters: torch.Tensor,
        last_used: torch.Tensor,
        copies: torch.cuda.Stream | None,
    ):
        self._found, self._counters, self._last_used = found, counters, last_used
        self._copies = copies
        self._event = torch.cuda.Event() if copies is not None else None
        self._num_rows = 0

    def start(
        self, num_rows: int, found: torch.Tensor, counters: torch.Tensor, last_used: torch.Tensor
    ) -> None:
        self._num_rows = num_rows
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):  # None: no stream
            self._found[:num_rows].copy_(found[:num_rows], non_blocking=True)
            self._counters[:num_rows].copy_(counters[:num_rows], non_blocking=True)
            self._last_used.copy_(last_used, non_blocking=True)
            if self._event is not None:
                self._event.record(self._copies)

    def read(self) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        n = self._num_rows
        # copies: the buffers are filled again in a few steps
        found, last_used = self._found[:n].numpy().copy(), self._last_used.numpy().copy()
        return found, self._counters[:n].tolist(), last_used


def _pinned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
