"""Begin to report when SGLang's own metrics reporter exists.

Why: SGLang's collector has the labels that every metric of this process must carry, and which
ranks report; the runtime has been built by then.
Versions: 0.5.17.
Removed by: an upstream registry of metrics providers.
"""

from __future__ import annotations

from typing import Any

from sglang_multipole.attach import runtime_of

TARGET = "sglang.srt.managers.scheduler.Scheduler.init_metrics_reporter"
TYPE = "after"


def hook(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    runtime = runtime_of(scheduler.tp_worker.model_runner)
    if runtime is None:
        return
    from sglang_multipole.reporting import Reporting

    reporter = scheduler.metrics_reporter
    collector = reporter.metrics_collector if reporter.current_scheduler_metrics_enabled else None
    runtime.reporting = Reporting(
        runtime,
        collector,
        reporter.is_stats_logging_rank,
        scheduler.server_args.served_model_name,
        reporter.dp_rank,
    )
