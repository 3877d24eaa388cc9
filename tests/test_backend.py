"""Which attention a decode step runs: the cluster path, or SGLang's dense backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_multipole.activity import Activity
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.segment_planner import BatchLimits, DecodeRow, SegmentPlanner
from tests.test_cluster_pool import SMALL, Host


class DenseBackend:
    """Notes what it is asked for."""

    needs_cpu_seq_lens = True

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.calls.append("eager")

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.calls.append("capture" if in_capture else "replay")

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.calls.append(max_bs)

    def forward_decode(self, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append("decode")
        return q


@pytest.fixture
def host() -> Host:
    return Host(SMALL)


@pytest.fixture
def backend(host: Host) -> Any:
    from sglang_multipole.backend import MultipoleAttnBackend

    runner = SimpleNamespace(token_to_kv_pool=None, req_to_token_pool=None)
    return MultipoleAttnBackend(runner, host.runtime, DenseBackend())


def forward_batch(*rows: tuple[int, int]) -> Any:
    return SimpleNamespace(
        req_pool_indices=torch.tensor([row for row, _ in rows]),
        seq_lens=torch.tensor([length for _, length in rows]),
    )


def plan(host: Host, *rows: tuple[int, int], budget: int = SMALL.token_budget) -> Any:
    """Announce a step of (row, length) rows; returns its batch."""
    planned = [DecodeRow(f"r{row}", row, length, budget, 1) for row, length in rows]
    host.runtime.plan_step(planned, [Activity() for _ in rows])
    return forward_batch(*rows)


@pytest.mark.parametrize(
    ("rows", "budget", "is_sparse"),
    [
        (((1, 63),), 0, False),  # below the gate of 64
        (((1, 64),), 0, True),
        (((1, 63), (2, 300)), 0, True),  # one row above it is enough
        (((1, 300), (2, 300)), 288, False),  # 256 clustered tokens, which the budget covers
        (((1, 320),), 287, True),
    ],
)
def test_a_step_is_dense_if_no_row_can_have_clusters(host, backend, rows, budget, is_sparse):
    for row, length in rows:
        host.req_to_token[row, :length] = host.alloc(length).int()
    backend.init_forward_metadata_out_graph(plan(host, *rows, budget=budget))
    assert backend.is_sparse is is_sparse
    assert backend.dense.calls == ([] if is_sparse else ["replay"])
    host.runtime.end_step()


def test_a_graph_is_captured_with_what_it_is_to_replay(backend):
    backend.is_sparse = True
    backend.init_forward_metadata_out_graph(forward_batch((0, 1)), in_capture=True)
    assert backend.dense.calls == []
    backend.is_sparse = False
    backend.init_forward_metadata_out_graph(forward_batch((0, 1)), in_capture=True)
    assert backend.dense.calls == ["capture"]
    assert backend.forward_decode("q", None, None, None, None) == "q"


def test_a_forward_that_was_not_announced_is_dense_and_counted(host, backend):
    backend.is_sparse = True
    backend.init_forward_metadata(forward_batch((0, 1)))
    assert backend.is_sparse is False
    backend.init_forward_metadata_out_graph(forward_batch((0, 1), (0, 1)))
    assert backend.is_sparse is False
    assert backend.dense.calls == ["eager", "replay"]
    # capture is no step
    backend.init_forward_metadata_out_graph(forward_batch((0, 1)), in_capture=True)
    assert host.runtime.dense_steps["not_announced"] == 3


def test_graphs_must_fit_the_decode_buffers(host, backend):
    host.path.limits = BatchLimits(rows=4, tokens=1000)
    backend.init_cuda_graph_state(4, 4)
    assert backend.dense.calls == [4]
    with pytest.raises(RuntimeError, match="hold 4 rows, and graphs of 8 rows"):
        backend.init_cuda_graph_state(8, 8)


@pytest.mark.parametrize("limits", [BatchLimits(rows=2), BatchLimits(tokens=3 * 700 - 1)])
def test_a_batch_beyond_the_buffers_is_dense_and_counted(host, limits):
    host.runtime.planner.limits = limits
    for row in (1, 2, 3):
        host.add(f"r{row}", row, 699)
    torch.testing.assert_close(host.step(), host.dense())
    assert host.runtime.dense_steps["batch_too_large"] == 3
    del host.rows["r3"]
    host.step()
    assert host.runtime.totals.sparse_steps == 2


def test_the_gate_is_that_of_the_batch():
    config = MultipoleConfig.from_dict(
        SMALL.to_dict() | {"min_context": {"1": 600, "2": 100}, "token_budget": 0}
    )
    planner = SegmentPlanner(config, 64)
    alone = [DecodeRow("a", 1, 400, 0)]
    assert not planner.plan(alone).is_sparse
    both = planner.plan([*alone, DecodeRow("b", 2, 90, 0)])
    assert both.is_sparse
    # the segments that were not ordered while the row was below the gate are ordered now
    assert [(order.row, order.segment) for order in both.orders] == [(1, 0), (1, 1), (1, 2)]
    assert not planner.plan(alone).is_sparse


def test_each_batch_size_is_captured_twice_and_replayed_by_kind(backend, monkeypatch):
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    from sglang_multipole.graph_runner import DENSE, SPARSE, GraphUsage, MultipoleDecodeGraphRunner

    captured = []
    monkeypatch.setattr(
        DecodeCudaGraphRunner,
        "capture_one_shape",
        lambda self, size, *_: captured.append((backend.is_sparse, self._make_graph_key(size))),
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000 - 100 * len(captured), 1000))
    # without SGLang's constructor, which needs a model
    runner = object.__new__(MultipoleDecodeGraphRunner)
    runner._multipole = backend
    runner._usage = usage = {SPARSE: GraphUsage(), DENSE: GraphUsage()}
    for size in (2, 1):
        runner.capture_one_shape(size, None)
    kinds = [(is_sparse, key.size, key.variant_label) for is_sparse, key in captured]
    assert kinds == [
        (False, 2, "dense"),
        (True, 2, "sparse"),
        (False, 1, "dense"),
        (True, 1, "sparse"),
    ]
    assert [(usage[kind].graphs, usage[kind].bytes) for kind in (SPARSE, DENSE)] == [(2, 200)] * 2
    backend.is_sparse = False
    assert runner._make_graph_key(2) == captured[0][1]
    assert runner._make_graph_key(2, None, "lora").variant_label == "lora dense"


@pytest.mark.parametrize(
    ("configured", "chosen", "device", "is_warned"),
    [
        ("auto", "fa3", "cuda", True),
        ("fa3", "flashinfer", "cuda", True),
        ("auto", "flashinfer", "cuda", False),
        ("triton", "fa3", "cuda", False),
        ("auto", "torch_native", "cpu", False),
    ],
)
def test_a_dense_backend_that_no_gpu_test_had_is_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    configured: str,
    chosen: str,
    device: str,
    is_warned: bool,
) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from sglang_multipole import backend

    host = Host(MultipoleConfig.from_dict(SMALL.to_dict() | {"dense_backend": configured}))
    monkeypatch.setattr(backend, "verify_applied", lambda names: None)
    monkeypatch.setattr(backend, "runtime_of", lambda runner: host.runtime)
    name = chosen if configured == "auto" else configured
    dense = DenseBackend()
    monkeypatch.setitem(ATTENTION_BACKENDS, name, lambda runner: dense)
    server_args = SimpleNamespace(get_attention_backends=lambda: (chosen, chosen))
    runner = SimpleNamespace(
        device=device, server_args=server_args, token_to_kv_pool=None, req_to_token_pool=None
    )
    with caplog.at_level("WARNING", "sglang_multipole.backend"):
        assert backend.create_backend(runner).dense is dense
    assert [f"dense attention by {name}," in message for message in caplog.messages] == (
        [True] if is_warned else []
    )
