"""The pool, its planner and its builder against a dense oracle, without SGLang."""

from __future__ import annotations

import pytest
import torch

from multipole_kernels.torch_decode import EXACT_TOKENS
from sglang_multipole.activity import Activity
from sglang_multipole.cluster_pool import ClusterPool, PoolShape
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.runtime import MultipoleRuntime
from sglang_multipole.segment_builder import BuildOrder, SegmentBuilder
from sglang_multipole.segment_planner import DecodeRow
from sglang_multipole.torch_clustering import TorchClustering
from sglang_multipole.torch_path import TorchPath

NUM_SLOTS, NUM_ROWS, HEADS, GROUP, DIM = 4000, 8, 2, 3, 16
SMALL = MultipoleConfig(
    segment_size=128,
    recluster_interval=32,
    tokens_per_cluster=4,
    num_sink_tokens=3,
    token_budget=40,
    min_context=64,
)


class Host:
    """A KV pool with one layer and requests that grow, in place of SGLang."""

    def __init__(
        self,
        config: MultipoleConfig,
        num_places: int = 64,
        dim: int = DIM,
        dtype: torch.dtype = torch.float32,
    ):
        generator = torch.Generator().manual_seed(7)
        self.generator, self.dim = generator, dim
        keys = torch.randn(NUM_SLOTS, HEADS, dim, generator=generator).to(dtype)
        values = torch.randn(NUM_SLOTS, HEADS, dim, generator=generator).to(dtype)
        self.req_to_token = torch.zeros(NUM_ROWS, 2048, dtype=torch.int32)
        shape = PoolShape(1, HEADS, dim, NUM_SLOTS, NUM_ROWS, dtype, "cpu")
        self.layer = KVLayer(keys, values, None, None)
        pool = ClusterPool(config, shape, num_places)
        clustering = TorchClustering(pool, [self.layer], self.req_to_token)
        builder = SegmentBuilder(pool, clustering, self.req_to_token)
        self.path = TorchPath(pool, [self.layer], self.req_to_token)
        self.runtime = MultipoleRuntime(config, pool, builder, self.path)
        self.free = torch.randperm(NUM_SLOTS - 1, generator=generator) + 1
        self.rows: dict[str, tuple[int, int]] = {}
        self.activities: dict[str, Activity] = {}
        self.row_generation = 1
        self.budgets: dict[str, int] = {}  # of requests with another budget than the config's

    def alloc(self, count: int) -> torch.Tensor:
        slots, self.free = self.free[:count], self.free[count:]
        self.runtime.pool.invalidate_slots(slots)
        for buffer in (self.layer.key_buffer, self.layer.value_buffer):
            new = torch.randn(count, HEADS, self.dim, generator=self.generator)
            buffer[slots] = new.to(buffer.dtype)
        return slots

    def add(self, rid: str, row: int, length: int, shared_with: str | None = None, prefix: int = 0):
        if shared_with is not None:
            source, _ = self.rows[shared_with]
            self.req_to_token[row, :prefix] = self.req_to_token[source, :prefix]
        self.req_to_token[row, prefix:length] = self.alloc(length - prefix).int()
        self.rows[rid] = (row, length)
        self.activities[rid] = Activity()

    def step(self) -> torch.Tensor:
        """One decode step of all requests; returns the outputs [B, H * G, D]."""
        for rid, (row, length) in self.rows.items():
            self.req_to_token[row, length : length + 1] = self.alloc(1).int()
            self.rows[rid] = (row, length + 1)
        budget = self.runtime.config.token_budget
        rows = [
            DecodeRow(rid, row, n, self.budgets.get(rid, budget), self.row_generation)
            for rid, (row, n) in self.rows.items()
        ]
        self.runtime.plan_step(rows, [self.activities[rid] for rid in self.rows])
        indices = torch.tensor([row.row for row in rows])
        is_sparse = self.runtime.begin_step(indices, torch.tensor([row.seq_len for row in rows]))
        q = torch.randn(len(rows), HEADS * GROUP, self.dim, generator=self.generator)
        q = q.to(self.layer.key_buffer.dtype)
        out = torch.full_like(q, torch.nan)
        self.q = q
        if is_sparse:
            self.path.attend(0, q, self.dim**-0.5, out)
        else:
            out = self.dense()
        self.runtime.apply_feedback(self.runtime.end_step())
        self.runtime.check_integrity()
        return out

    def dense(self) -> torch.Tensor:
        """Dense attention of the last step's queries."""
        outs = []
        for index, (row, length) in enumerate(self.rows.values()):
            slots = self.req_to_token[row, :length].long()
            keys = self.layer.key_buffer[slots].transpose(0, 1)
            values = self.layer.value_buffer[slots].transpose(0, 1)
            q = self.q[index].view(HEADS, GROUP, self.dim)
            weight = (q @ keys.mT * self.dim**-0.5).softmax(-1)
            outs.append((weight @ values).reshape(HEADS * GROUP, self.dim))
        return torch.stack(outs)


def test_rows_below_the_gate_are_dense_and_become_sparse_when_they_grow():
    host = Host(SMALL)
    host.add("a", 1, 60)
    for _ in range(3):
        torch.testing.assert_close(host.step(), host.dense())
    assert host.activities["a"].to_dict() == {
        "sparse_steps": 0,
        "dense_steps": 3,
        "exact_tokens": 61 + 62 + 63,
        "context_tokens": 61 + 62 + 63,
        "segments_built": 0,
        "segments_shared": 0,
    }
    for _ in range(60):
        host.step()
    # at 64 tokens 32 are under clusters, which the budget of 40 still covers; at 96, 64 are
    assert host.activities["a"].dense_steps == 95 - 60
    assert host.activities["a"].sparse_steps == 123 - 95


def test_a_budget_of_all_tokens_equals_dense():
    host = Host(MultipoleConfig.from_dict(SMALL.to_dict() | {"token_budget": 100000}))
    host.add("a", 1, 700)
    torch.testing.assert_close(host.step(), host.dense())
    assert host.activities["a"].sparse_steps == 0


def test_a_budget_just_short_of_all_tokens_is_nearly_dense():
    host = Host(MultipoleConfig.from_dict(SMALL.to_dict() | {"token_budget": 600}))
    host.add("a", 1, 700)
    out, dense = host.step(), host.dense()
    assert host.activities["a"].sparse_steps == 1
    assert (out - dense).norm() / dense.norm() < 0.15


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_centroids_in_8_bits_change_the_answer_by_their_rounding_only(dtype):
    outs = []
    for centroid_dtype in (dtype, "auto"):
        changes = {"centroid_dtype": centroid_dtype, "token_budget": 200}
        host = Host(MultipoleConfig.from_dict(SMALL.to_dict() | changes))
        host.add("a", 1, 700)
        outs.append(host.step())
    assert host.runtime.pool.key_scale is None
    error = (outs[0] - outs[1]).norm() / outs[1].norm()
    assert 0 < error < (0.02 if dtype == "int8" else 0.08)


def test_a_ragged_batch_equals_its_rows_one_by_one():
    host = Host(SMALL)
    for row, length in enumerate((700, 40, 200, 131), start=1):
        host.add(f"request {row}", row, length)
    out = host.step()
    for index, (row, length) in enumerate(host.rows.values()):
        host.path.begin(torch.tensor([row]), torch.tensor([length]), [SMALL.token_budget], 9)
        alone = torch.full_like(out[:1], torch.nan)
        host.path.attend(0, host.q[index : index + 1], host.dim**-0.5, alone)
        torch.testing.assert_close(alone[0], out[index])


def test_forks_share_the_sealed_segments_of_their_prefix():
    host = Host(SMALL)
    host.add("a", 1, 700)
    host.step()
    assert host.activities["a"].segments_built == 5
    host.add("b", 2, 720, shared_with="a", prefix=690)
    host.step()
    assert host.activities["b"].segments_shared == 5
    assert host.activities["b"].segments_built == 0
    assert host.runtime.planner.stats.segments_built == 5


def test_forks_that_arrive_in_one_step_build_the_prefix_once():
    host = Host(SMALL)
    host.add("a", 1, 700)
    host.rows["b"] = (2, 700)
    host.req_to_token[2] = host.req_to_token[1]
    host.activities["b"] = Activity()
    host.step()
    assert host.runtime.planner.stats.segments_built == 5


def test_a_slot_that_is_handed_out_again_hides_its_segment():
    host = Host(SMALL)
    host.add("a", 1, 300)
    host.step()
    host.runtime.pool.invalidate_slots(host.req_to_token[1, 130:131].long())
    host.step()
    # segment 1 was rebuilt at the second step, which orders all segments once more
    assert host.runtime.planner.stats.segments_built == 3


@pytest.mark.parametrize("is_changed", [False, True])
def test_the_second_order_of_an_admission_builds_what_has_changed(is_changed):
    host = Host(SMALL)
    host.add("a", 1, 760)
    host.step()
    if is_changed:
        host.runtime.pool.invalidate_slots(host.req_to_token[1, 650:651].long())
    host.step()
    assert host.runtime.planner.stats.open_builds == 1 + is_changed
    assert host.runtime.planner.stats.segments_built == 5
    host.runtime.begin_unplanned(torch.tensor([1]), torch.tensor([762]))
    assert host.path.plan.item_indptr.tolist() == [0, 6]


def test_a_full_pool_is_exact_and_counted():
    host = Host(MultipoleConfig.from_dict(SMALL.to_dict() | {"token_budget": 0}), num_places=3)
    host.add("a", 1, 700)
    for _ in range(3):
        host.step()
    # the first two steps order what may be there already, which is no reason to evict
    assert host.runtime.planner.stats.orders_without_place == 3
    counts = host.activities["a"].to_dict()
    assert counts["sparse_steps"] == 3
    exact = [length - 2 * 128 + SMALL.num_sink_tokens for length in (701, 702, 703)]
    assert counts["exact_tokens"] == sum(exact)


def test_no_step_is_lost_to_segments_that_were_ordered_already():
    """A request orders all its segments twice; with few builds a step, the second order of the
    first ones once came before the first order of the others."""
    host = Host(MultipoleConfig.from_dict(SMALL.to_dict() | {"max_builds_per_step": 2}))
    host.add("a", 1, 900)
    built = []
    for _ in range(4):
        host.step()
        built.append(host.runtime.planner.stats.segments_built)
    assert built == [2, 4, 6, 6]


def test_a_long_prompt_does_not_keep_others_from_being_clustered():
    host = Host(MultipoleConfig.from_dict(SMALL.to_dict() | {"max_builds_per_step": 2}))
    host.add("long", 1, 1700)
    for row in (2, 3, 4):
        host.add(f"short-{row}", row, 300)
    # 13 segments and 3 x 2 at two a step
    for _ in range(10):
        host.step()
    assert host.runtime.planner.stats.segments_built == 19
    assert not any(request.missing for request in host.runtime.planner.requests.values())


def test_least_recently_used_segments_make_room():
    host = Host(SMALL, num_places=9)
    host.add("a", 1, 700)
    host.step()
    del host.rows["a"]
    host.add("b", 2, 700)
    for _ in range(12):
        host.step()
    assert host.runtime.planner.stats.segments_evicted > 0
    assert host.activities["b"].exact_tokens < 12 * 300
    del host.rows["b"]
    host.runtime.clear()
    host.runtime.check_integrity()
    assert len(host.runtime.planner.free) == 8


def test_more_requests_than_places_keep_the_places_they_have():
    """The others are dense and counted; a full pool once kept open segments from growing, and what
    was generated meanwhile was attended exactly for as long as the pool was full."""
    host = Host(SMALL, num_places=4)
    for row in range(1, 6):
        host.add(f"r{row}", row, 100)
    for _ in range(40):
        host.step()
    sparse = [f"r{row}" for row in (1, 2, 3)]
    assert all(host.activities[rid].dense_steps == 0 for rid in sparse)
    assert all(host.activities[rid].sparse_steps == 0 for rid in ("r4", "r5"))
    assert host.runtime.dense_steps["pool_full"] == 2 * 40
    # at 140 tokens 96 are clustered; as many have been since there were 128
    recent = 140 - 96
    exact = [counters[EXACT_TOKENS] for counters in host.runtime.last_step.counters]
    assert max(exact[:3]) <= SMALL.token_budget + SMALL.num_sink_tokens + recent
    # who ends makes room
    del host.rows["r2"]
    host.step()
    assert host.activities["r4"].sparse_steps == 1
    assert host.activities["r5"].sparse_steps == 0


def test_a_request_that_shares_its_prefix_evicts_nothing():
    """A full pool's oldest segments are those of the prefix that comes back: once they made room
    for their own orders, and the prefix was clustered again."""
    host = Host(SMALL, num_places=11)
    host.add("a", 1, 700)
    host.step()
    del host.rows["a"]
    host.add("b", 2, 696)
    for _ in range(4):
        host.step()
    host.rows["a"] = (1, 701)
    host.add("c", 3, 695, shared_with="a", prefix=690)
    del host.rows["a"]
    for _ in range(3):
        host.step()
    assert host.activities["c"].segments_shared == 5
    assert host.activities["c"].dense_steps == 0
    assert host.runtime.planner.stats.segments_evicted == 0


def test_a_sealed_segment_is_not_mistaken_for_an_open_one_of_the_same_tokens():
    """A slot can name a place that was given to an open segment since; once its extent was not
    looked at, and the segment stayed exact for as long as the request lived."""
    host = Host(SMALL, num_places=4)
    host.add("a", 1, 200)
    host.step()
    pool = host.runtime.pool
    host.req_to_token[1, 201:256] = host.alloc(55).int()
    slots = host.req_to_token[1, 128:256].long()
    open_place = int(pool.open_place[1])
    pool.segment_of_slot[slots[-1]] = open_place
    order = BuildOrder(row=1, segment=1, extent=128, place=3)
    assert host.runtime.builder.execute([order]) == [True]


def test_a_request_that_comes_back_in_its_row_is_sparse_at_once():
    """SGLang can retract all requests at one moment; without a step between, the planner once took
    the returning request for the old one and ordered none of its segments."""
    host = Host(SMALL)
    host.add("a", 1, 700)
    for _ in range(3):
        host.step()
    host.add("a", 1, 703)
    host.row_generation = 2
    host.step()
    assert host.activities["a"].sparse_steps == 1
    assert host.runtime.planner.stats.segments_built == 10


def test_answers_do_not_depend_on_who_built_a_segment():
    """A segment grown by decode and one built from a prompt of the same tokens are the same."""
    grown, whole = Host(SMALL), Host(SMALL)
    grown.add("a", 1, 100)
    for _ in range(200):
        grown.step()
    whole.layer.key_buffer.copy_(grown.layer.key_buffer)
    whole.layer.value_buffer.copy_(grown.layer.value_buffer)
    whole.rows["a"] = grown.rows["a"]
    whole.activities["a"] = Activity()
    whole.req_to_token.copy_(grown.req_to_token)
    whole.free = grown.free.clone()
    whole.generator.set_state(grown.generator.get_state())
    torch.testing.assert_close(whole.step(), grown.step(), rtol=0, atol=0)


def test_a_batch_that_was_not_planned_builds_nothing_and_finds_what_is_there():
    """Warm-up and graph capture run forwards that no scheduler iteration announced."""
    host = Host(SMALL)
    host.add("a", 1, 300)
    host.step()
    host.runtime.begin_unplanned(torch.tensor([1]), torch.tensor([301]))
    assert host.path.plan.item_indptr.tolist() == [0, 2]
    host.runtime.begin_unplanned(torch.tensor([0]), torch.tensor([1]))
    assert host.path.plan.exact_slots.tolist() == [0]


def test_dense_attention_in_place_of_the_sparse_path_shows_in_the_counters(monkeypatch):
    """The proof of activity is worth nothing if a server that attends densely can pass it."""
    host = Host(SMALL)
    host.add("a", 1, 700)

    def dense_in_disguise(q, key_cache, value_cache, layer, plan, sm_scale, limit, out, counters):
        out.copy_(torch.zeros_like(q))

    monkeypatch.setattr("sglang_multipole.torch_path.multipole_decode", dense_in_disguise)
    host.step()
    counts = host.activities["a"].to_dict()
    assert counts["segments_built"] == 5
    assert counts["sparse_steps"] == counts["exact_tokens"] == counts["context_tokens"] == 0
