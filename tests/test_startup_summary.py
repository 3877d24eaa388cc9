"""The block that a server logs when it is ready says what was asked for and what it cost."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from sglang_multipole import attach
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.reporting import Reporting
from sglang_multipole.startup_summary import startup_summary
from tests.test_cluster_pool import SMALL, Host


def test_configuration_memory_graphs_and_audit_are_in_one_block() -> None:
    values = {"audit_interval": 8, "events_endpoint": "ipc:///run/m", "max_token_budget": 90}
    host = Host(MultipoleConfig.from_dict(SMALL.to_dict() | values))
    host.runtime.audit = attach.make_audit(host.runtime.config, [host.layer] * 5, host.req_to_token)
    host.runtime.graphs = {"dense": SimpleNamespace(graphs=7, seconds=1.26, bytes=3 << 29)}
    text = startup_summary(host.runtime, has_metrics=True)
    kv_bytes = 2 * host.layer.key_buffer.nbytes
    for shown in (
        "budget: 40 tokens a step and KV head, of a request up to 90; exact below 64 tokens",
        f"{100 * host.runtime.pool.nbytes / kv_bytes:.1f} % of the KV pool",
        "63 segments of 128 tokens, 32 clusters each",
        "dense decode graphs: 7, captured in 1.3 s, 1.500 GiB",
        "audit: layer 2, every 8 decode steps",
        "to be seen at: /server_info, /metrics, ipc:///run/m",
    ):
        assert shown in text


def test_it_is_logged_once_when_reporting_begins(caplog: pytest.LogCaptureFixture) -> None:
    host = Host(SMALL)
    with caplog.at_level(logging.INFO, "sglang_multipole.reporting"):
        Reporting(host.runtime, None, True, "demo", None)
    (message,) = caplog.messages
    assert message == startup_summary(host.runtime, has_metrics=False)
    assert "decode buffers" not in message
    assert message.endswith("to be seen at: /server_info, no event stream")
