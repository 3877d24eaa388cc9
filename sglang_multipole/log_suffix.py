"""Adds what multipole attention read to the end of SGLang's "Decode batch" log line."""

from __future__ import annotations

import logging

from sglang_multipole.runtime import MultipoleRuntime

LOGGER_NAME = "sglang.srt.managers.scheduler_components.metrics_reporter"
LINE_START = "Decode batch"


class DecodeLogSuffix(logging.Filter):
    """A filter that lets every record through and appends to those of decode batches.

    The share read counts tokens attended exactly since the line before; centroids come on top.
    """

    def __init__(self, runtime: MultipoleRuntime):
        super().__init__()
        self._runtime = runtime
        self._exact = self._context = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str) and record.msg.startswith(LINE_START):
            # scripts parse the line from its start: append, never reorder
            record.msg += f", multipole: {self._summary()}"
        return True

    def _summary(self) -> str:
        totals, step = self._runtime.totals, self._runtime.last_step
        exact, context = totals.exact_tokens - self._exact, totals.context_tokens - self._context
        self._exact, self._context = totals.exact_tokens, totals.context_tokens
        share = 100 * exact / context if context else 100.0
        return f"sparse {step.num_sparse}/{step.num_rows} req, read {share:.1f} %"


def install(runtime: MultipoleRuntime) -> None:
    """Add the suffix to SGLang's logger of this process, in the place of an earlier one."""
    logger = logging.getLogger(LOGGER_NAME)
    for old in [f for f in logger.filters if isinstance(f, DecodeLogSuffix)]:
        logger.removeFilter(old)
    logger.addFilter(DecodeLogSuffix(runtime))
