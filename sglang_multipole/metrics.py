"""The Prometheus metrics `sglang:multipole_*`, with the labels of SGLang's own.

They live in the scheduler process and are made when SGLang's collector exists: prometheus_client
must not be imported before SGLang has chosen the folder in which the processes' values meet.
"""

from __future__ import annotations

import time
from typing import Any

from sglang_multipole.audit import AuditResult
from sglang_multipole.dense_reasons import REASONS
from sglang_multipole.runtime import MultipoleRuntime

PREFIX = "sglang:multipole_"
INTERVAL_SECONDS = 1.0  # between two updates under load
PLACE_STATES = ("free", "sealed", "open", "ordered")

# name: (documentation, where it is in the runtime's report)
_COUNTERS = {
    "sparse_steps": ("Decode steps of requests attended with clusters.", "totals"),
    "exact_tokens": (
        "Tokens attended exactly in decode steps, mean over layers and KV heads.",
        "totals",
    ),
    "context_tokens": ("Tokens in the context of decode steps.", "totals"),
    "segments_built": ("Sealed segments clustered.", "segments"),
    "segments_shared": ("Sealed segments found ready when a request began to decode.", "segments"),
    "segments_evicted": ("Sealed segments that made room for others.", "segments"),
    "open_builds": ("Clusterings of requests' open segments.", "segments"),
    "orders_without_place": ("Clusterings that found the cluster pool full.", "segments"),
}

# name: (documentation, upper bounds of the buckets)
_HISTOGRAMS = {
    "audit_relative_error": (
        "Relative error of one layer's attention output in audited decode steps.",
        (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    ),
    "audit_mass_covered": (
        "Share of the dense attention probability on exactly attended tokens in audited steps.",
        (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0),
    ),
}


class MultipoleMetrics:
    """Carries the runtime's counts over into Prometheus.

    Args:
        collector: SGLang's SchedulerMetricsCollector, whose labels and metric classes are used.
    """

    def __init__(self, collector: Any, runtime: MultipoleRuntime):
        import prometheus_client

        counter = getattr(collector, "_counter_cls", None) or prometheus_client.Counter
        gauge = getattr(collector, "_gauge_cls", None) or prometheus_client.Gauge
        histogram = getattr(collector, "_histogram_cls", None) or prometheus_client.Histogram
        self._runtime, self._labels = runtime, dict(collector.labels)
        self._next_update = 0.0
        self._exported: dict[Any, float] = {}

        def new_counter(name: str, documentation: str, *more: str) -> Any:
            return counter(
                name=f"{PREFIX}{name}_total",
                documentation=documentation,
                labelnames=[*self._labels, *more],
            )

        def new_gauge(name: str, documentation: str, *more: str) -> Any:
            return gauge(
                name=PREFIX + name,
                documentation=documentation,
                labelnames=[*self._labels, *more],
                multiprocess_mode="mostrecent",
            )

        self._counters = {name: new_counter(name, text) for name, (text, _) in _COUNTERS.items()}
        self._dense_steps = new_counter(
            "dense_steps", "Decode steps of requests attended exactly, by the reason why.", "reason"
        )
        # with labels at once, so that they are in /metrics before the first audit
        self._histograms = {
            name: histogram(
                name=PREFIX + name,
                documentation=text,
                labelnames=list(self._labels),
                buckets=buckets,
            ).labels(**self._labels)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._build_seconds = new_counter(
            "recluster_seconds", "Time the scheduler spent on ordering clusterings."
        )
        new_gauge("enabled", "1: decode attention is multipole attention.").labels(
            **self._labels
        ).set(1)
        self._pool_bytes = new_gauge("pool_bytes", "Device memory of the cluster pool.")
        self._workspace_bytes = new_gauge(
            "workspace_bytes", "Device memory of the decode kernels' buffers."
        )
        self._pool_places = new_gauge(
            "pool_places", "Places of the cluster pool, one segment each, by state.", "state"
        )
        self.update()

    def observe_audit(self, result: AuditResult) -> None:
        """Add an audited step's numbers, at once."""
        for name, value in (
            ("audit_relative_error", result.relative_error),
            ("audit_mass_covered", result.mass_covered),
        ):
            self._histograms[name].observe(value)

    def update_if_due(self) -> None:
        """Update unless the last time was less than INTERVAL_SECONDS ago."""
        if time.monotonic() >= self._next_update:
            self.update()

    def update(self) -> None:
        """Carry over everything."""
        self._next_update = time.monotonic() + INTERVAL_SECONDS
        report = self._runtime.report()
        for name, (_, group) in _COUNTERS.items():
            self._raise_to(self._counters[name], report[group][name])
        for reason in REASONS:
            self._raise_to(self._dense_steps, report["dense_steps"][reason], reason=reason)
        self._raise_to(self._build_seconds, report["build_seconds"])
        pool = report["pool"]
        self._pool_bytes.labels(**self._labels).set(pool["bytes"])
        self._workspace_bytes.labels(**self._labels).set(pool["workspace_bytes"])
        for state in PLACE_STATES:
            self._pool_places.labels(**self._labels, state=state).set(pool[state])

    def _raise_to(self, counter: Any, value: float, **more: str) -> None:
        # a counter can only be added to
        key = (counter, *more.values())
        counter.labels(**self._labels, **more).inc(value - self._exported.get(key, 0))
        self._exported[key] = value
