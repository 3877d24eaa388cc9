"""What one model runner holds: the pool, its planner and builder, and a decode step's life.

Scheduler.run_batch            plan_step       host: kills and orders from token counts
backend.init_forward_metadata  begin_step      device: kills, builds, slices, snapshot, plan
backend.forward_decode         (per layer)     device: attention, counters; or SGLang's own
Scheduler.run_batch            end_step        device: feedback copied to the host
process_batch_result           apply_feedback  host: places, requests, counters
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from multipole_kernels.torch_decode import (
    CONTEXT_TOKENS,
    DENSE_STEPS,
    EXACT_TOKENS,
    NUM_COUNTERS,
    SPARSE_STEPS,
)
from sglang_multipole.activity import Activity
from sglang_multipole.audit import Audit, AuditedRow, AuditResult, PendingAudit
from sglang_multipole.cluster_pool import ClusterPool
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.dense_reasons import NOT_ANNOUNCED, REASONS, dense_reason
from sglang_multipole.segment_builder import SegmentBuilder
from sglang_multipole.segment_planner import (
    BatchLimits,
    DecodeRow,
    SegmentPlanner,
    StepFeedback,
    StepPlan,
)


class StepResults(Protocol):
    """What a step found and counted, on its way to the host."""

    def read(self) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
        """found [B, segments] tokens, counters [B][4], last_used [places]; waits for them."""


class DecodePath(Protocol):
    """A decode step on the device: TorchPath or TritonPath."""

    nbytes: int
    limits: BatchLimits

    def begin(
        self, rows: torch.Tensor, seq_lens: torch.Tensor, token_budgets: Sequence[int], step: int
    ) -> None: ...

    def attend(self, layer: int, q: torch.Tensor, sm_scale: float, out: torch.Tensor) -> None: ...

    def audited(self, index: int, seq_len: int) -> AuditedRow: ...

    def results(self, num_rows: int) -> StepResults: ...


@dataclasses.dataclass(frozen=True)
class PendingFeedback:
    """A step's results on their way to the host; see MultipoleRuntime.apply_feedback."""

    plan: StepPlan
    activities: Sequence[Activity]
    built: list[bool]
    results: StepResults | None  # None: SGLang's dense attention, there is nothing to read
    started: float  # time.perf_counter() of its plan
    audit: PendingAudit | None


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """What a decode step did: its rows with their counters [B][4], summed over the layers."""

    rows: Sequence[DecodeRow]
    counters: Sequence[Sequence[int]]
    num_layers: int

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_sparse(self) -> int:
        return sum(counters[SPARSE_STEPS] == self.num_layers for counters in self.counters)


class MultipoleRuntime:
    """Everything multipole attention keeps for one model runner."""

    def __init__(
        self,
        config: MultipoleConfig,
        pool: ClusterPool,
        builder: SegmentBuilder,
        path: DecodePath,
        audit: Audit | None = None,
    ):
        self.config, self.pool, self.builder, self.path = config, pool, builder, path
        self.audit = audit
        self.last_audit: AuditResult | None = None  # of the last step, if it was audited
        self.planner = SegmentPlanner(
            config,
            pool.num_places,
            limits=path.limits,
            num_slices=builder.clustering.num_slices(),
        )
        self.totals = Activity()
        self.dense_steps = dict.fromkeys(REASONS, 0)
        self.build_seconds = 0.0
        # wall time of decode steps, from the step before or from its own plan
        self.num_steps, self.step_seconds = 0, 0.0
        self.last_step = StepOutcome((), (), pool.shape.num_layers)
        self.reporting: Any = None  # sglang_multipole.reporting.Reporting
        # by kind of graph; sglang_multipole.graph_runner.GraphUsage
        self.graphs: dict[str, Any] = {}
        self._step_ended = 0.0
        self._step_started = 0.0
        self._plan: StepPlan | None = None
        self._activities: Sequence[Activity] = ()
        self._built: list[bool] = []

    # ------------------------------------------------------------------ a decode step, in order

    def plan_step(self, rows: Sequence[DecodeRow], activities: Sequence[Activity]) -> None:
        """Orders for the next decode step; activities[i] is added to by what row i's step does."""
        self._step_started = time.perf_counter()
        self._plan, self._activities = self.planner.plan(rows), activities

    @property
    def has_plan(self) -> bool:
        """Whether the next forward was announced by plan_step; a warm-up's was not."""
        return self._plan is not None

    def count_unannounced(self, num_rows: int) -> None:
        """A forward of num_rows rows without a plan is attended densely."""
        self.dense_steps[NOT_ANNOUNCED] += num_rows

    def begin_step(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> bool:
        """Kills, builds and slices of later builds, then the snapshot of the batch.

        Args:
            rows: [B] int64, rows of req_to_token; may have padding behind the plan's rows.
            seq_lens: [B], the new token included.

        Returns:
            Whether rows may have clusters: false means that nothing was laid out, and that the
            caller attends densely.
        """
        plan = self._plan
        if plan.kills:
            # from pinned memory, or the host would wait for the step before
            kills = torch.tensor(plan.kills, pin_memory=rows.is_cuda)
            self.pool.kill(kills.to(rows.device, non_blocking=True))
        self.builder.cancel(plan.cancelled)
        self._built = []
        if not plan.is_sparse:
            return False
        if plan.orders or plan.slices:
            started = time.perf_counter()
            self._built = self.builder.execute(plan.orders)
            for order, num_slices in plan.slices:
                self.builder.advance(order, num_slices)
            self.build_seconds += time.perf_counter() - started
        self.path.begin(rows, seq_lens, [row.token_budget for row in plan.rows], plan.step)
        if self.audit is not None:
            self.audit.begin(plan)
        return True

    def begin_unplanned(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """The snapshot of a batch that no scheduler iteration announced, as graph capture's.

        Builds nothing; what it finds is as true as ever.
        """
        self.path.begin(rows, seq_lens, [self.config.token_budget] * len(rows), 0)

    def end_step(self) -> PendingFeedback:
        """Send the step's results to the host; after the forward was launched, on its stream."""
        plan, self._plan = self._plan, None
        audit = None
        if self.audit is not None and self.audit.index is not None:
            index = self.audit.index
            audit = self.audit.end(plan, self.path.audited(index, plan.rows[index].seq_len))
        # last: whoever has these has the audit's numbers too
        results = self.path.results(len(plan.rows)) if plan.is_sparse else None
        return PendingFeedback(
            plan, self._activities, self._built, results, self._step_started, audit
        )

    def apply_feedback(self, pending: PendingFeedback) -> None:
        """Take in a step's results; waits until they have arrived."""
        plan, num_layers = pending.plan, self.pool.shape.num_layers
        if pending.results is None:
            counters = _dense_counters(plan.rows, num_layers)
        else:
            found, counters, last_used = pending.results.read()
            self.planner.apply_feedback(plan, StepFeedback(pending.built, found, last_used))
        for row, activity, row_counters in zip(
            plan.rows, pending.activities, counters, strict=True
        ):
            for sums in (activity, self.totals):
                sums.add_step(row_counters, num_layers)
            if row_counters[DENSE_STEPS] == num_layers:
                self.dense_steps[dense_reason(row, plan, self.config)] += 1
            request = self.planner.request_of(row)
            if request is not None:
                activity.segments_built = request.segments_built
                activity.segments_shared = request.segments_shared
        self.totals.segments_built = self.planner.stats.segments_built
        self.totals.segments_shared = self.planner.stats.segments_shared
        self.last_step = StepOutcome(plan.rows, counters, num_layers)
        self.last_audit = None
        if pending.audit is not None:
            self.last_audit = pending.audit.result(counters, num_layers)
        if self.last_audit is not None:
            self.audit.totals.add(self.last_audit)
        now = time.perf_counter()
        self.num_steps += 1
        self.step_seconds += now - max(self._step_ended, pending.started)
        self._step_ended = now

    # ------------------------------------------------------------------------------ the rest

    def clear(self) -> None:
        """SGLang's KV pool was cleared."""
        self.pool.clear()
        self.builder.clear()
        self.planner.clear()

    def check_integrity(self) -> None:
        self.planner.check_integrity()
        self.pool.check_integrity()

    def pool_report(self) -> dict[str, int]:
        """Bytes of the pool, and its places by state."""
        planner = self.planner
        return {
            "bytes": self.pool.nbytes,
            "workspace_bytes": self.path.nbytes,
            "places": self.pool.num_places - 1,
            "free": len(planner.free),
            "sealed": len(planner.sealed),
            "open": sum(bool(r.open_place) for r in planner.requests.values()),
            "ordered": len(planner.in_order) + len(planner.early.places),
        }

    def _audit_report(self) -> dict[str, Any]:
        """Means over all audits, null before the first; empty without an audit."""
        if self.audit is None:
            return {}
        totals = self.audit.totals
        return {
            "layer": self.audit.layer,
            "audits": totals.audits,
            "relative_error": totals.relative_error / totals.audits if totals.audits else None,
            "largest_relative_error": totals.largest_relative_error if totals.audits else None,
            "mass_covered": totals.mass_covered / totals.audits if totals.audits else None,
        }

    def report(self) -> dict[str, Any]:
        """Plain builtins for /server_info."""
        return {
            "enabled": True,
            "config": self.config.to_dict(),
            "pool": self.pool_report(),
            "graphs": {kind: dataclasses.asdict(usage) for kind, usage in self.graphs.items()},
            "segments": dataclasses.asdict(self.planner.stats),
            "build_seconds": self.build_seconds,
            "totals": self.totals.to_dict(),
            "dense_steps": dict(self.dense_steps),
            "audit": self._audit_report(),
            "events": self.reporting.report() if self.reporting is not None else {},
        }


def _dense_counters(rows: Sequence[DecodeRow], num_layers: int) -> list[list[int]]:
    """What the attention code would count in a step that SGLang's dense attention does."""
    counters = []
    for row in rows:
        columns = [0] * NUM_COUNTERS
        columns[DENSE_STEPS] = num_layers
        columns[EXACT_TOKENS] = columns[CONTEXT_TOKENS] = row.seq_len * num_layers
        counters.append(columns)
    return counters
