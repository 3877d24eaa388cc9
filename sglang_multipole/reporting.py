"""What operators see of a scheduler process: metrics, the log line's suffix, events."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from sglang_multipole import events_endpoint, log_suffix
from sglang_multipole.events import EventPublisher
from sglang_multipole.metrics import MultipoleMetrics
from sglang_multipole.runtime import MultipoleRuntime
from sglang_multipole.startup_summary import startup_summary
from sglang_multipole.step_events import StepEvents

logger = logging.getLogger(__name__)


class Reporting:
    """Tells operators of the runtime's steps; once made, what the server is.

    Args:
        collector: SGLang's metrics collector, None when metrics are off in this process.
        is_logging_rank: of the ranks that do the same steps, this one logs and sends events.
        dp_rank: data-parallel rank, None without data parallelism.

    Raises:
        RuntimeError: the address for events cannot be had.
    """

    def __init__(
        self,
        runtime: MultipoleRuntime,
        collector: Any | None,
        is_logging_rank: bool,
        model_name: str,
        dp_rank: int | None,
    ):
        self._runtime = runtime
        self._metrics = MultipoleMetrics(collector, runtime) if collector is not None else None
        log_suffix.install(runtime)
        logger.info("%s", startup_summary(runtime, collector is not None))
        self.publisher: EventPublisher | None = None
        self._events: StepEvents | None = None
        endpoint = runtime.config.events_endpoint
        if endpoint and is_logging_rank:
            self.publisher = EventPublisher(events_endpoint.of_rank(endpoint, dp_rank))
            self._events = StepEvents(runtime, self.publisher, model_name, dp_rank)

    def after_step(self, reqs: Sequence[Any], finished: Sequence[Any]) -> None:
        """A decode step's results are in; `finished` are those of its Reqs that have ended.

        With overlap scheduling a request can be among the finished of two steps.
        """
        # the last step of a burst must not wait for the next burst
        is_last = len(finished) == len(reqs)
        audit = self._runtime.last_audit
        if audit is not None and self._metrics is not None:
            self._metrics.observe_audit(audit)
        if audit is not None and self.publisher is not None:
            self.publisher.publish("audit", **dataclasses.asdict(audit))
        if self._metrics is not None:
            self._metrics.update() if is_last else self._metrics.update_if_due()
        if self._events is not None:
            new = [req for req in finished if req.customized_info["multipole"].finish()]
            self._events.after_step(finished, new)

    def report(self) -> dict[str, Any]:
        """Plain builtins for /server_info."""
        if self.publisher is None:
            return {}
        return {"endpoint": self.publisher.endpoint, "dropped": self.publisher.dropped}
