"""What one model runner holds: the pool, its planner and builder, and a decode step's life.

Scheduler.run_batch            plan_step       host: kills and orders from token counts
backend.init_forward_metadata  begin_step      device: kills, builds, snapshot, decode plan
backend.forward_decode         (per layer)     device: attention, counters
Scheduler.run_batch            end_step        device: feedback copied to the host
process_batch_result           apply_feedback  host: places, requests, counters
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from multipole_kernels.torch_decode import NUM_COUNTERS, DecodePlan, PoolLayer
from sglang_multipole.activity import Activity
from sglang_multipole.cluster_pool import ClusterPool, PoolShape
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.segment_builder import KVLayer, SegmentBuilder
from sglang_multipole.segment_planner import DecodeRow, SegmentPlanner, StepFeedback, StepPlan

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class PendingFeedback:
    """A step's results on their way to the host; see MultipoleRuntime.apply_feedback."""

    plan: StepPlan
    activities: Sequence[Activity]
    built: list[bool]
    found: torch.Tensor
    last_used: torch.Tensor
    counters: torch.Tensor


class MultipoleRuntime:
    """Everything multipole attention keeps for one model runner."""

    def __init__(
        self,
        config: MultipoleConfig,
        shape: PoolShape,
        num_places: int,
        layers: Sequence[KVLayer],
        req_to_token: torch.Tensor,
    ):
        self.config = config
        self.pool = ClusterPool(config, shape, num_places)
        self.planner = SegmentPlanner(config, num_places)
        self.builder = SegmentBuilder(self.pool, layers)
        self.layers = layers
        self.req_to_token = req_to_token
        self.totals = Activity()
        self.build_seconds = 0.0
        self._next_plan: StepPlan | None = None
        self._activities: Sequence[Activity] = ()
        self._built: list[bool] = []
        self._found = torch.zeros(0, 0, dtype=torch.int64)
        self.decode_plan: DecodePlan | None = None
        self.counters = torch.zeros(0, NUM_COUNTERS, dtype=torch.int64, device=shape.device)

    # ------------------------------------------------------------------ a decode step, in order

    def plan_step(self, rows: Sequence[DecodeRow], activities: Sequence[Activity]) -> None:
        """Orders for the next decode step; activities[i] is added to by what row i's step does."""
        self._next_plan, self._activities = self.planner.plan(rows), activities

    def begin_step(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Builds, then the snapshot of the batch.

        Args:
            rows: [B] int64, rows of req_to_token. seq_lens: [B], the new token included.
        """
        plan = self._next_plan
        if plan is None or len(plan.rows) != len(rows):
            raise RuntimeError(
                f"MultipoleRuntime: a decode step of {len(rows)} rows without a plan of them; "
                "the hook on Scheduler.run_batch did not run for this batch"
            )
        started = time.perf_counter()
        if plan.kills:
            self.pool.kill(torch.tensor(plan.kills, device=rows.device))
        self._built = self.builder.execute(plan.orders, self.req_to_token)
        if plan.orders:
            self.build_seconds += time.perf_counter() - started
        budget = torch.tensor([row.token_budget for row in plan.rows], device=rows.device)
        self._snapshot(rows, seq_lens.long(), budget, plan.step)
        self.counters = torch.zeros(len(rows), NUM_COUNTERS, dtype=torch.int64, device=rows.device)

    def _snapshot(
        self, rows: torch.Tensor, seq_lens: torch.Tensor, budget: torch.Tensor, step: int
    ) -> None:
        """Find the rows' segments and lay out the step's work (DecodePlan)."""
        config, size = self.config, self.config.segment_size
        max_len = int(seq_lens.max())
        num_segments = -(-max_len // size)
        # [B, N * S]; what lies beyond a row's length is never used
        width = min(num_segments * size, self.req_to_token.shape[1])
        slots = self.req_to_token[rows, :width].long()
        slots = torch.nn.functional.pad(slots, (0, num_segments * size - width))
        segment_begin = torch.arange(num_segments, device=rows.device) * size
        clustered = torch.tensor(
            [config.clustered_tokens(n) for n in seq_lens.tolist()], device=rows.device
        )
        wanted = (clustered.unsqueeze(-1) - segment_begin).clamp(0, size)
        place, extent = self.pool.find(rows, slots.view(len(rows), num_segments, size), wanted)
        self._found = extent
        self.pool.last_used[place[place > 0]] = step

        # a budget that covers every clustered token makes the row one exact range
        is_sparse = (budget < clustered).unsqueeze(-1)
        place, extent = place * is_sparse, extent * is_sparse
        is_item = place > 0
        position = torch.arange(num_segments * size, device=rows.device)
        in_cluster = position < (segment_begin + extent).repeat_interleave(size, dim=-1)
        in_cluster &= position >= config.num_sink_tokens
        is_exact = ~in_cluster & (position < seq_lens.unsqueeze(-1))

        def indptr(counts: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()

        self.decode_plan = DecodePlan(
            item_indptr=indptr(is_item.sum(-1)),
            item_place=place[is_item].int(),
            exact_indptr=indptr(is_exact.sum(-1)),
            exact_slots=slots[is_exact].int(),
            token_budget=budget.int(),
            seq_lens=seq_lens.int(),
        )

    def end_step(self) -> PendingFeedback:
        """Copy the step's results towards the host; to be called after the forward is launched."""
        plan, self._next_plan = self._next_plan, None
        return PendingFeedback(
            plan,
            self._activities,
            self._built,
            self._found,
            self.pool.last_used.clone(),
            self.counters,
        )

    def apply_feedback(self, pending: PendingFeedback) -> None:
        """Take in a step's results; waits until they have arrived."""
        feedback = StepFeedback(pending.built, pending.found.tolist(), pending.last_used.tolist())
        self.planner.apply_feedback(pending.plan, feedback)
        rows = zip(pending.plan.rows, pending.activities, pending.counters.tolist(), strict=True)
        for row, activity, counters in rows:
            for sums in (activity, self.totals):
                sums.add_step(counters, len(self.layers))
            request = self.planner.request_of(row)
            if request is not None:
                activity.segments_built = request.segments_built
                activity.segments_shared = request.segments_shared
        self.totals.segments_built = self.planner.stats.segments_built
        self.totals.segments_shared = self.planner.stats.segments_shared

    # ------------------------------------------------------------------------------ the rest

    def pool_layer(self, index: int) -> PoolLayer:
        pool = self.pool
        return PoolLayer(
            pool.key_centroids[index],
            pool.value_centroids[index],
            pool.cluster_sizes[index],
            pool.key_variance[index],
            pool.members[index],
            pool.member_begin[index],
            pool.segment_slots,
        )

    def clear(self) -> None:
        """SGLang's KV pool was cleared."""
        self.pool.clear()
        self.planner.clear()

    def check_integrity(self) -> None:
        self.planner.check_integrity()
        self.pool.check_integrity()

    def report(self) -> dict[str, Any]:
        """Plain builtins for /server_info."""
        planner = self.planner
        return {
            "enabled": True,
            "config": self.config.to_dict(),
            "pool": {
                "bytes": self.pool.nbytes,
                "places": self.pool.num_places - 1,
                "free": len(planner.free),
                "sealed": len(planner.sealed),
                "open": sum(bool(r.open_place) for r in planner.requests.values()),
            },
            "segments": dataclasses.asdict(planner.stats),
            "build_seconds": self.build_seconds,
            "totals": self.totals.to_dict(),
        }
