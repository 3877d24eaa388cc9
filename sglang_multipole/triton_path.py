"""A decode step on a GPU: snapshot, plan and attention as Triton kernels over fixed buffers.

A captured graph owns the addresses of the buffers, so they are made once for the largest batch.
Nothing here waits for the device; results travel to the host through a ring of pinned buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from multipole_kernels.decode_buffers import DecodeWorkspace
from multipole_kernels.decode_plan import plan_chunks
from multipole_kernels.multipole_decode import multipole_decode
from multipole_kernels.segment_snapshot import PoolIndex, SegmentSnapshot
from multipole_kernels.torch_decode import NUM_COUNTERS
from sglang_multipole.cluster_pool import ClusterPool
from sglang_multipole.segment_builder import KVLayer

# steps whose results may be on their way to the host at a time; SGLang has two in flight
_RING = 4


class _Buffers:
    """What a step of at most max_rows rows is laid out in."""

    def __init__(self, pool: ClusterPool, max_rows: int, max_context: int, gqa_group_size: int):
        config, shape = pool.config, pool.shape
        device = torch.device(shape.device)
        max_segments = -(-max_context // config.segment_size)
        # forks share segments, so a batch can have more items than the pool has places
        max_items = min(max_rows * max_segments, 2 * pool.num_places)
        self.max_rows = max_rows
        self.snapshot = SegmentSnapshot(
            max_rows, max_segments, max_items, max_rows * max_context, device
        )
        self.workspace = DecodeWorkspace(
            max_rows,
            max_items,
            max_segments,
            # beyond the context a budget changes nothing
            min(config.token_budget_limit, max_context),
            shape.num_kv_heads,
            gqa_group_size,
            shape.head_dim,
            config.clusters_per_segment,
            config.max_cluster_size,
            device,
        )
        self.counters = torch.zeros(max_rows, NUM_COUNTERS, dtype=torch.int64, device=device)
        self.budgets = [_pinned(max_rows, dtype=torch.int32) for _ in range(_RING)]
        self.results = [
            TritonResults(
                _pinned(max_rows, max_segments, dtype=torch.int32),
                _pinned(max_rows, NUM_COUNTERS, dtype=torch.int64),
                _pinned(pool.num_places, dtype=torch.int64),
            )
            for _ in range(_RING)
        ]

    @property
    def nbytes(self) -> int:
        return self.snapshot.nbytes + self.workspace.bytes + self.counters.nbytes


class TritonPath:
    """Buffers and launches of a decode step.

    Args:
        max_context: tokens of the longest row.
    """

    def __init__(
        self,
        pool: ClusterPool,
        layers: Sequence[KVLayer],
        req_to_token: torch.Tensor,
        max_context: int,
        gqa_group_size: int,
    ):
        self.pool, self.layers, self.req_to_token = pool, layers, req_to_token
        self._sizes = (max_context, gqa_group_size)
        # captured graphs own the addresses in `_captured`; larger batches run without a graph
        self._captured: _Buffers | None = None
        self._larger: _Buffers | None = None
        self._current: _Buffers | None = None
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

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in (self._captured, self._larger) if b is not None)

    def reserve(self, max_rows: int) -> None:
        """Make the buffers that graphs of up to max_rows rows will own; once, before capture."""
        if self._captured is None:
            self._captured = _Buffers(self.pool, max_rows, *self._sizes)
        elif self._captured.max_rows < max_rows:
            raise RuntimeError(
                f"TritonPath: graphs of {max_rows} rows, but buffers for "
                f"{self._captured.max_rows} are already owned by captured graphs"
            )

    def _buffers_for(self, num_rows: int) -> _Buffers:
        for buffers in (self._captured, self._larger):
            if buffers is not None and num_rows <= buffers.max_rows:
                return buffers
        self._larger = _Buffers(self.pool, triton.next_power_of_2(num_rows), *self._sizes)
        return self._larger

    def begin(
        self, rows: torch.Tensor, seq_lens: torch.Tensor, token_budgets: Sequence[int], step: int
    ) -> None:
        """Find the rows' segments and lay out the step's work; see TorchPath.begin.

        Rows beyond len(token_budgets) are padding of a captured graph.
        """
        config, num_rows = self.pool.config, rows.shape[0]
        self._current = buffers = self._buffers_for(num_rows)
        self._turn = (self._turn + 1) % _RING
        budgets = buffers.budgets[self._turn]
        budgets[:num_rows] = 0
        budgets[: len(token_budgets)] = torch.tensor(token_budgets, dtype=torch.int32)
        plan = buffers.snapshot.plan
        plan.token_budget[:num_rows].copy_(budgets[:num_rows], non_blocking=True)
        buffers.snapshot.take(
            self._index,
            self.req_to_token,
            rows,
            seq_lens,
            step,
            min_context=config.min_context,
            recluster_interval=config.recluster_interval,
            num_sink_tokens=config.num_sink_tokens,
        )
        plan_chunks(plan, buffers.workspace, num_rows, self.pool.key_centroids.element_size())
        buffers.counters[:num_rows].zero_()

    def attend(self, layer: int, q: torch.Tensor, sm_scale: float, out: torch.Tensor) -> None:
        """Attention of the step's rows in one layer; q, out [B, num_q_heads, head_dim]."""
        kv, buffers = self.layers[layer], self._current
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

    def results(self, num_rows: int) -> TritonResults:
        """Start copying the step's results; to be called on the stream of the forward."""
        buffers = self._current
        results = buffers.results[self._turn]
        results.start(
            num_rows, buffers.snapshot.found_extent, buffers.counters, self.pool.last_used
        )
        return results


class TritonResults:
    """Pinned buffers of one step's results; read waits for the copy."""

    def __init__(self, found: torch.Tensor, counters: torch.Tensor, last_used: torch.Tensor):
        self._found, self._counters, self._last_used = found, counters, last_used
        # without a GPU (the interpreter) copies have happened when they return
        self._event = torch.cuda.Event() if torch.cuda.is_available() else None
        self._num_rows = 0

    def start(
        self, num_rows: int, found: torch.Tensor, counters: torch.Tensor, last_used: torch.Tensor
    ) -> None:
        self._num_rows = num_rows
        self._found[:num_rows].copy_(found[:num_rows], non_blocking=True)
        self._counters[:num_rows].copy_(counters[:num_rows], non_blocking=True)
        self._last_used.copy_(last_used, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        if self._event is not None:
            self._event.synchronize()
        n = self._num_rows
        return self._found[:n].tolist(), self._counters[:n].tolist(), self._last_used.tolist()


def _pinned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
