"""Plan a decode step before SGLang launches it, and fetch its results after.

Why: this is where the requests of the batch are known, between two scheduler iterations; the device
work itself is launched by the backend, on the forward stream.
Versions: 0.5.17.
Removed by: an upstream hook around a scheduler iteration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from sglang_multipole import sglang_compat
from sglang_multipole.activity import Activity, ActivityEntry
from sglang_multipole.attach import runtime_of

TARGET = "sglang.srt.managers.scheduler.Scheduler.run_batch"
TYPE = "around"


def hook(
    original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    runtime = runtime_of(scheduler.tp_worker.model_runner)
    if runtime is None or not batch.reqs:
        return original(scheduler, batch, *args, **kwargs)
    # also before prefill: a request that ends with it answers with zeros, not without an entry
    activities = [_activity(req) for req in batch.reqs]
    if not batch.forward_mode.is_decode():
        return original(scheduler, batch, *args, **kwargs)
    rows = sglang_compat.decode_rows(batch, runtime.config)
    runtime.plan_step(rows, activities)
    result = original(scheduler, batch, *args, **kwargs)
    # with overlap scheduling the forward was launched on a stream of its own
    with scheduler.forward_stream_ctx if scheduler.enable_overlap else contextlib.nullcontext():
        result._multipole = runtime.end_step()
    return result


def _activity(req: Any) -> Activity:
    if req.customized_info is None:
        req.customized_info = {}
    entry = req.customized_info.setdefault("multipole", ActivityEntry(Activity()))
    return entry.activity
