"""What operators see of a scheduler process: metrics, the log line's suffix, events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_multipole import log_suffix
from sglang_multipole.metrics import MultipoleMetrics
from sglang_multipole.runtime import MultipoleRuntime


class Reporting:
    """Tells operators of the runtime's steps.

    Args:
        collector: SGLang's metrics collector, None when metrics are off in this process.
    """

    def __init__(self, runtime: MultipoleRuntime, collector: Any | None):
        self._metrics = MultipoleMetrics(collector, runtime) if collector is not None else None
        log_suffix.install(runtime)

    def after_step(self, finished: Sequence[Any]) -> None:
        """A decode step's results are in; `finished` are its requests that ended with it."""
        if self._metrics is not None:
            # the last step of a burst must not wait for the next burst
            self._metrics.update() if finished else self._metrics.update_if_due()
