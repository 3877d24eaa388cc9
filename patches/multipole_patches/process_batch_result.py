"""Take in a decode step's results before SGLang finishes and streams its requests.

Why: the counters must be in `meta_info` of the answer that this call may send, and places must
change hands at the same point on every rank. Which requests ended is known after it.
Versions: 0.5.17.
Removed by: an upstream hook around the processing of a batch's result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_multipole import sglang_compat
from sglang_multipole.attach import runtime_of

TARGET = "sglang.srt.managers.scheduler.Scheduler.process_batch_result"
TYPE = "around"


def hook(original: Callable[..., Any], scheduler: Any, batch: Any, result: Any) -> Any:
    pending = getattr(result, "_multipole", None)
    if pending is None:
        return original(scheduler, batch, result)
    runtime = runtime_of(scheduler.tp_worker.model_runner)
    runtime.apply_feedback(pending)
    returned = original(scheduler, batch, result)
    if runtime.reporting is not None:
        runtime.reporting.after_step(batch.reqs, sglang_compat.finished_requests(batch))
    return returned
