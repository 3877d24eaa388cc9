"""The Prometheus metrics agree with the runtime's report and carry SGLang's labels."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest

from sglang_multipole import log_suffix
from sglang_multipole.dense_reasons import REASONS, dense_reason
from sglang_multipole.metrics import MultipoleMetrics
from sglang_multipole.segment_planner import SWITCHED_OFF, DecodeRow, StepPlan
from tests.test_cluster_pool import SMALL, Host

LABELS = {"model_name": "demo", "tp_rank": 0}


@pytest.fixture
def host():
    """A runtime with one request that is sparse and one below the gate."""
    host = Host(SMALL)
    host.add("long", 1, 200)
    host.add("short", 2, 20)
    return host


@pytest.fixture
def registry():
    return prometheus_client.CollectorRegistry()


@pytest.fixture
def collector(registry):
    return make_collector(registry, LABELS)


def make_collector(registry, labels):
    """SGLang's collector as far as the metrics look at it, with a registry of its own."""
    kinds = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    classes = {
        f"_{kind.__name__.lower()}_cls": functools.partial(kind, registry=registry)
        for kind in kinds
    }
    return SimpleNamespace(labels=labels, **classes)


def value(registry, name, **more):
    labels = {name: str(label) for name, label in (LABELS | more).items()}
    return registry.get_sample_value(f"sglang:multipole_{name}", labels)


def test_metrics_agree_with_the_report(host, registry, collector):
    metrics = MultipoleMetrics(collector, host.runtime)
    assert value(registry, "enabled") == 1
    assert value(registry, "sparse_steps_total") == 0
    for _ in range(3):
        host.step()
        metrics.update()
    report = host.runtime.report()
    assert report["totals"]["sparse_steps"] == 3
    for name in ("sparse_steps", "exact_tokens", "context_tokens"):
        assert value(registry, f"{name}_total") == report["totals"][name]
    for name in ("segments_built", "segments_shared", "segments_evicted", "open_builds"):
        assert value(registry, f"{name}_total") == report["segments"][name]
    assert value(registry, "recluster_seconds_total") == pytest.approx(report["build_seconds"])
    assert value(registry, "pool_bytes") == report["pool"]["bytes"]
    places = [value(registry, "pool_places", state=s) for s in ("free", "sealed", "open")]
    assert sum(places) == report["pool"]["places"]
    dense = {reason: value(registry, "dense_steps_total", reason=reason) for reason in REASONS}
    assert dense == report["dense_steps"]
    assert dense["below_min_context"] == report["totals"]["dense_steps"] == 3


def test_every_metric_is_in_the_documentation(host, registry, collector):
    MultipoleMetrics(collector, host.runtime)
    text = (Path(__file__).parent.parent / "docs" / "operating.md").read_text()
    names = {m.name.removeprefix("sglang:multipole_") for m in registry.collect()}
    assert len(names) > 10
    for name in names:
        assert f"`{name}`" in text or f"`{name}_total`" in text
    for word in (*REASONS, "free", "sealed", "open", "ordered"):
        assert f"`{word}`" in text


def test_updates_under_load_are_a_second_apart(host, registry, collector):
    metrics = MultipoleMetrics(collector, host.runtime)
    host.step()
    metrics.update_if_due()
    assert value(registry, "sparse_steps_total") == 0
    metrics.update()
    assert value(registry, "sparse_steps_total") == 1


@pytest.mark.parametrize(
    ("seq_len", "budget", "starved", "reason"),
    [
        (10, 8, (), "below_min_context"),
        (200, SWITCHED_OFF, (), "switched_off"),
        (200, 4096, (), "budget_covers"),
        (200, 8, ("a",), "pool_full"),
        (200, 8, ("b",), "not_built_yet"),
    ],
)
def test_a_dense_step_has_its_reason(seq_len, budget, starved, reason):
    row = DecodeRow("a", 1, seq_len, budget)
    plan = StepPlan(1, 1, [row], [], [], [], frozenset(starved))
    assert dense_reason(row, plan, SMALL) == reason


def test_a_full_pool_is_counted_as_the_reason():
    host = Host(SMALL, num_places=2)
    host.add("a", 1, 200)
    host.add("b", 2, 200)
    for _ in range(4):
        host.step()
    assert host.runtime.dense_steps["pool_full"] > 0


def test_the_suffix_ends_the_decode_line_and_no_other(host, caplog):
    host.step()
    logger = logging.getLogger(log_suffix.LOGGER_NAME)
    log_suffix.install(host.runtime)
    log_suffix.install(host.runtime)
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("Decode batch, #running-req: 2, #queue-req: 0")
        logger.info("Prefill batch, #new-seq: 1")
    for old in list(logger.filters):
        logger.removeFilter(old)
    decode, prefill = caplog.messages
    assert decode.startswith("Decode batch, #running-req: 2, #queue-req: 0, multipole: sparse 1/2")
    totals = host.runtime.totals
    share = 100 * totals.exact_tokens / totals.context_tokens
    assert decode.endswith(f" req, read {share:.1f} %")
    assert decode.count("multipole") == 1
    assert prefill == "Prefill batch, #new-seq: 1"
