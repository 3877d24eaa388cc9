"""The audit's numbers are those of dense attention, and only what was sparse is audited."""

from __future__ import annotations

from types import SimpleNamespace

import prometheus_client
import pytest
import torch

from sglang_multipole import attach, audit
from sglang_multipole.audit import AuditedRow
from sglang_multipole.config import ConfigError, MultipoleConfig
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.reporting import Reporting
from sglang_multipole.segment_planner import SWITCHED_OFF, DecodeRow, StepPlan
from sglang_multipole.torch_path import TorchPath
from tests.test_cluster_pool import GROUP, HEADS, NUM_SLOTS, SMALL, Host
from tests.test_metrics import make_collector

INTERVAL = 3
CONFIG = MultipoleConfig.from_dict(SMALL.to_dict() | {"audit_interval": INTERVAL})


def audited_host(**sizes) -> Host:
    """A host whose only layer is audited."""
    host = Host(CONFIG, **sizes)
    host.runtime.audit = attach.make_audit(CONFIG, [host.layer], host.req_to_token)
    host.runtime.path = host.path = TorchPath(
        host.runtime.pool, [host.layer], host.req_to_token, audit_layer=0
    )
    return host


def test_the_error_is_that_of_the_step_and_every_third_is_audited():
    host = audited_host()
    host.add("a", 1, 300)
    results = []
    for _ in range(4 * INTERVAL):
        out = host.step()
        if host.runtime.last_audit is None:
            continue
        dense = host.dense()
        result = host.runtime.last_audit
        expected = float((out[0] - dense[0]).norm() / dense[0].norm())
        assert result.relative_error == pytest.approx(expected, rel=1e-4)
        assert (result.rid, result.layer) == ("a", 0)
        assert result.context_tokens == host.rows["a"][1]
        results.append(result)
    assert len(results) == 4
    report = host.runtime.report()["audit"]
    errors = [result.relative_error for result in results]
    assert report["audits"] == 4
    assert report["relative_error"] == pytest.approx(sum(errors) / 4)
    assert report["largest_relative_error"] == max(errors)
    assert 0 < report["mass_covered"] < 1


def test_the_covered_mass_is_the_probability_of_the_tokens_attended_exactly():
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 60, HEADS, 8, generator=generator)
    q = torch.randn(HEADS * GROUP, 8, generator=generator)
    slots = torch.randperm(60, generator=generator)[:50]
    exact, selected = slots[:7], slots[10:30].view(HEADS, 10)
    is_exact = torch.arange(7) < 5
    is_selected = torch.arange(10) < torch.tensor([[10], [4]])
    row = AuditedRow(q, torch.zeros_like(q), exact, is_exact, selected, is_selected, sm_scale=0.3)
    error, mass = audit.compare(row, KVLayer(keys, values, None, None), slots).tolist()
    shares = []
    for index in range(HEADS * GROUP):
        head = index // GROUP
        probability = (keys[slots, head] @ q[index] * 0.3).softmax(0)
        covered = {*exact[:5].tolist(), *selected[head][is_selected[head]].tolist()}
        is_covered = torch.tensor([slot in covered for slot in slots.tolist()])
        shares.append(float(probability[is_covered].sum()))
    assert mass == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    # an output of zeros is as far from the dense one as that is long
    assert error == pytest.approx(1.0)


def test_long_contexts_are_compared_in_chunks(monkeypatch):
    host = audited_host()
    host.add("a", 1, 300)
    results = []
    for chunk_tokens in (audit.CHUNK_TOKENS, 17):
        monkeypatch.setattr(audit, "CHUNK_TOKENS", chunk_tokens)
        while host.runtime.last_audit is None:
            host.step()
        row = host.path.audited(0, host.rows["a"][1])
        slots = host.req_to_token[1, : host.rows["a"][1]].long()
        results.append(audit.compare(row, host.layer, slots))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_larger_budget_covers_more_mass():
    masses = []
    for budget in (8, 64, 160):
        host = audited_host()
        host.add("a", 1, 300)
        host.budgets = {"a": budget}
        for _ in range(INTERVAL):
            host.step()
        masses.append(host.runtime.last_audit.mass_covered)
    assert masses == sorted(masses)
    assert masses[0] < masses[-1] < 1


def test_rows_that_are_dense_are_never_chosen():
    host = audited_host()
    host.add("short", 1, 20)
    host.add("off", 2, 300)
    host.budgets = {"off": SWITCHED_OFF}
    for _ in range(2 * INTERVAL):
        host.step()
        assert host.runtime.last_audit is None
    host.add("long", 3, 300)
    for _ in range(INTERVAL):
        host.step()
    assert host.runtime.last_audit.rid == "long"
    assert host.runtime.audit.totals.audits == 1


def test_a_row_whose_clusters_are_not_built_yet_does_not_count():
    host = audited_host(num_places=2)
    host.add("a", 1, 300)
    host.add("b", 2, 300)
    rids = set()
    for _ in range(4 * INTERVAL):
        host.step()
        if host.runtime.last_audit is not None:
            rids.add(host.runtime.last_audit.rid)
    # the pool has one place: one request is dense, and its error of zero is in no mean
    assert len(rids) == 1


def test_requests_take_turns():
    host = audited_host()
    for row, rid in enumerate("abc", 1):
        host.add(rid, row, 300)
    rids = []
    for _ in range(3 * INTERVAL):
        host.step()
        if host.runtime.last_audit is not None:
            rids.append(host.runtime.last_audit.rid)
    assert sorted(rids) == ["a", "b", "c"]


def test_metrics_and_events_tell_of_every_audit(tmp_path):
    registry = prometheus_client.CollectorRegistry()
    collector = make_collector(registry, {"model_name": "demo"})
    host = audited_host()
    host.runtime.reporting = Reporting(host.runtime, collector, True, "demo", None)
    published = []
    host.runtime.reporting.publisher = SimpleNamespace(
        publish=lambda event, **fields: published.append((event, fields))
    )
    host.add("a", 1, 300)
    for _ in range(2 * INTERVAL):
        host.step()
        host.runtime.reporting.after_step([object()], [])
    labels = {"model_name": "demo"}
    totals = host.runtime.audit.totals
    for name in ("relative_error", "mass_covered"):
        metric = f"sglang:multipole_audit_{name}"
        assert registry.get_sample_value(f"{metric}_count", labels) == totals.audits == 2
        total = registry.get_sample_value(f"{metric}_sum", labels)
        assert total == pytest.approx(getattr(totals, name))
        assert total == pytest.approx(sum(fields[name] for _, fields in published))
    assert [event for event, _ in published] == ["audit", "audit"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"audit_interval": -1}, "audit_interval must be a whole number of decode steps"),
        ({"audit_layer": -2}, "audit_layer must be a whole number of layers, -1 to 1024"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        MultipoleConfig.from_dict(values)


def test_the_middle_layer_is_the_default():
    layers = [Host(CONFIG).layer] * 7
    table = torch.zeros(2, 8, dtype=torch.int32)
    assert attach.make_audit(CONFIG, layers, table).layer == 3
    chosen = MultipoleConfig.from_dict(CONFIG.to_dict() | {"audit_layer": 6})
    assert attach.make_audit(chosen, layers, table).layer == 6
    assert attach.make_audit(MultipoleConfig(), layers, table) is None


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    keys, values = torch.randn(2, 4096, HEADS, 64, device="cuda", dtype=torch.float16)
    table = torch.arange(1, 4001, device="cuda", dtype=torch.int32).view(2, 2000)
    layer = KVLayer(keys, values, None, None)
    config = MultipoleConfig.from_dict(CONFIG.to_dict() | {"audit_interval": 1})
    under_test = attach.make_audit(config, [layer], table)
    plan = StepPlan(1, 1, [DecodeRow("a", 1, 2000, 40)], [], [], [])
    q = torch.randn(HEADS * GROUP, 64, device="cuda", dtype=torch.float16)
    out, exact = torch.zeros_like(q), table[1, :100]
    selected = table[1, 100:300].view(HEADS, 100)
    row = AuditedRow(q, out, exact, exact > 0, selected, selected > 0, 0.125)
    torch.cuda.set_sync_debug_mode("error")
    try:
        under_test.begin(plan)
        pending = under_test.end(plan, row)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    # an output of zeros is as far from the dense one as that is long
    assert pending.numbers[0].item() == pytest.approx(1.0, abs=1e-3)


def triton_host() -> Host:
    from sglang_multipole.step_buffers import StepBuffers, StepShape
    from sglang_multipole.triton_path import TritonPath

    host = audited_host(dim=64, dtype=torch.float16)
    shape = StepShape(4, 1024, NUM_SLOTS, HEADS, GROUP, host.dim)
    buffers = StepBuffers(CONFIG, shape, "cpu", "cpu")
    host.runtime.path = host.path = TritonPath(
        host.runtime.pool, [host.layer], host.req_to_token, buffers, audit_layer=0
    )
    return host


@pytest.mark.interpreted
def test_both_paths_are_audited_alike():
    host = triton_host()
    host.add("short", 1, 40)
    host.add("a", 2, 600)
    for _ in range(INTERVAL):
        host.step()
    assert host.runtime.last_audit.rid == "a"
    row, length = host.rows["a"]
    other = TorchPath(host.runtime.pool, [host.layer], host.req_to_token, audit_layer=0)
    rows = torch.tensor([1, row])
    lengths = torch.tensor([host.rows["short"][1], length])
    other.begin(rows, lengths, [CONFIG.token_budget] * 2, host.runtime.planner.step)
    other.attend(0, host.q, host.dim**-0.5, torch.empty_like(host.q))
    slots = host.req_to_token[row, :length].long()
    error, mass = audit.compare(other.audited(1, length), host.layer, slots).tolist()
    assert host.runtime.last_audit.relative_error == pytest.approx(error, abs=3e-3)
    assert host.runtime.last_audit.mass_covered == pytest.approx(mass, abs=3e-3)
