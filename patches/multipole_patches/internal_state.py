"""Show the extension's state in `/server_info`.

Why: an operator must be able to ask a live server whether multipole attention is active.
Versions: 0.5.17.
Removed by: an upstream registry of internal-state providers.
"""

from __future__ import annotations

from typing import Any

from sglang_multipole.attach import runtime_of

TARGET = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
TYPE = "after"


def hook(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    runtime = runtime_of(scheduler.tp_worker.model_runner)
    if runtime is not None:
        result.internal_state["multipole"] = runtime.report()
