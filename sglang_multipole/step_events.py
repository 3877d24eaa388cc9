"""Makes events of what a scheduler process does: start, steps, segments, finished requests."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from multipole_kernels.torch_decode import CONTEXT_TOKENS, EXACT_TOKENS, SPARSE_STEPS
from sglang_multipole import sglang_compat
from sglang_multipole.events import EventPublisher
from sglang_multipole.runtime import MultipoleRuntime

MAX_REQUESTS = 32  # listed in one step event


class StepEvents:
    """Publishes a runtime's steps, summed up over the configuration's events_interval_ms.

    Args:
        model_name: as SGLang serves it. dp_rank: this process's data-parallel rank, or None.
    """

    def __init__(
        self,
        runtime: MultipoleRuntime,
        publisher: EventPublisher,
        model_name: str,
        dp_rank: int | None,
    ):
        self._runtime, self._publisher = runtime, publisher
        self._interval = runtime.config.events_interval_ms / 1000
        self._next = 0.0
        self._before = self._sums()
        publisher.publish(
            "start",
            version=sglang_compat.own_version(),
            sglang_version=sglang_compat.sglang_version(),
            pid=os.getpid(),
            dp_rank=dp_rank,
            model=model_name,
            config=runtime.config.to_dict(),
            pool=runtime.pool_report(),
        )

    def after_step(self, finished: Sequence[Any], new: Sequence[Any]) -> None:
        """A step's results are in; `finished` of its Reqs have ended, `new` of these just now."""
        gone = {req.rid for req in finished}
        # the last steps of a burst must not wait for the next burst
        is_last = len(gone) == self._runtime.last_step.num_rows
        if is_last or time.monotonic() >= self._next:
            self._publish_step(gone)
        for req in new:
            self._publisher.publish("request", **self._request(req))

    def _publish_step(self, gone: set[str]) -> None:
        self._next = time.monotonic() + self._interval
        before, now = self._before, self._sums()
        self._before = now
        grown = {name: now[name] - before[name] for name in now}
        dense = {n.removeprefix("dense:"): grown.pop(n) for n in now if n.startswith("dense:")}
        segments = {
            n.removeprefix("segments:"): grown.pop(n) for n in now if n.startswith("segments:")
        }
        build_ms = grown.pop("build_seconds") * 1000
        if any(segments.values()):
            self._publisher.publish("segments", **segments, recluster_ms=build_ms)
        rows = self._rows(gone)
        self._publisher.publish(
            "step",
            steps=grown["num_steps"],
            step_ms=grown["step_seconds"] * 1000 / max(grown["num_steps"], 1),
            sparse_steps=grown["sparse_steps"],
            dense_steps=dense,
            exact_tokens=grown["exact_tokens"],
            context_tokens=grown["context_tokens"],
            recluster_ms=build_ms,
            pool=self._runtime.pool_report(),
            num_requests=len(rows),
            num_sparse_requests=sum(row["sparse"] for row in rows),
            requests=rows[:MAX_REQUESTS],
        )

    def _rows(self, gone: set[str]) -> list[dict[str, Any]]:
        """The rows of the last step that are not gone, the longest first."""
        step = self._runtime.last_step
        pairs = zip(step.rows, step.counters, strict=True)
        rows = [pair for pair in pairs if pair[0].rid not in gone]
        rows.sort(key=lambda pair: -pair[0].seq_len)
        return [
            {
                "rid": row.rid,
                "context_tokens": round(counters[CONTEXT_TOKENS] / step.num_layers),
                "exact_tokens": round(counters[EXACT_TOKENS] / step.num_layers),
                "token_budget": None if row.is_switched_off else row.token_budget,
                "sparse": counters[SPARSE_STEPS] == step.num_layers,
            }
            for row, counters in rows
        ]

    def _request(self, req: Any) -> dict[str, Any]:
        entry = req.customized_info["multipole"]
        return {
            "rid": req.rid,
            "finish_reason": req.finished_reason.to_json().get("type"),
            "prompt_tokens": len(req.origin_input_ids),
            "completion_tokens": len(req.output_ids),
            "activity": entry.activity.to_dict(),
        }

    def _sums(self) -> dict[str, float]:
        runtime = self._runtime
        stats = runtime.planner.stats
        return {
            "num_steps": runtime.num_steps,
            "step_seconds": runtime.step_seconds,
            "sparse_steps": runtime.totals.sparse_steps,
            "exact_tokens": runtime.totals.exact_tokens,
            "context_tokens": runtime.totals.context_tokens,
            "build_seconds": runtime.build_seconds,
            **{f"dense:{reason}": count for reason, count in runtime.dense_steps.items()},
            "segments:built": stats.segments_built,
            "segments:shared": stats.segments_shared,
            "segments:evicted": stats.segments_evicted,
            "segments:open_builds": stats.open_builds,
        }
