"""Clusterings begun before they are wanted: what a step does of them, and that no answer tells."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_multipole.config import MultipoleConfig
from sglang_multipole.early_builds import EarlyBuilds
from sglang_multipole.runtime import MultipoleRuntime
from sglang_multipole.segment_builder import SegmentBuilder
from sglang_multipole.segment_planner import DecodeRow, SegmentPlanner
from tests.test_cluster_pool import SMALL, Host

NUM_SLICES = 24
INTERVAL = 127  # steps in which a clustering can be done


def steps_of(due_steps: dict[str, int]) -> list[list[tuple[str, int]]]:
    """What each step does of clusterings that are expected INTERVAL steps before they are due."""
    early, work = EarlyBuilds(NUM_SLICES), []
    for step in range(max(due_steps.values()) + 1):
        for row, (rid, due_step) in enumerate(due_steps.items()):
            if step == due_step:
                assert early.claim(rid, row, 128) is not None
            if step == due_step - INTERVAL:
                early.expect(rid, row, row, 128, due_step)
        slices = early.slices(step, lambda: 1)
        work.append([(list(due_steps)[order.row], count) for order, count in slices])
    return work


@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_rows_of_equal_length_share_the_steps_evenly(num_rows):
    due_steps = dict.fromkeys(map(str, range(num_rows)), 200)
    work = [sum(count for _, count in step) for step in steps_of(due_steps)]
    assert sum(work) == num_rows * NUM_SLICES
    assert max(work) == -(-num_rows * NUM_SLICES // INTERVAL)
    assert work[200] == 0, "the step that wants them does nothing"


def test_rows_of_any_length_are_done_in_time_and_one_after_another():
    chooser = random.Random(0)
    for _ in range(20):
        due_steps = {str(n): chooser.randrange(INTERVAL, 600) for n in range(12)}
        done = dict.fromkeys(due_steps, 0)
        for step, slices in enumerate(steps_of(due_steps)):
            for rid, count in slices:
                done[rid] += count
                assert step < due_steps[rid]
            assert sum(0 < count < NUM_SLICES for count in done.values()) <= 1
            # each alone needs one slice a step; twelve at once need two, and some are behind others
            assert sum(count for _, count in slices) <= 5
        assert set(done.values()) == {NUM_SLICES}


def test_nothing_is_done_as_long_as_one_slice_a_step_is_soon_enough():
    """A request of few tokens more ends before; what was done for it was for nothing."""
    work = steps_of({"a": 200})
    assert [step for step, slices in enumerate(work) if slices] == list(range(176, 200))


def test_what_has_no_place_is_left_to_the_step_that_wants_it():
    early = EarlyBuilds(NUM_SLICES)
    for nth, rid in enumerate("ab"):
        early.expect(rid, nth, 0, 128, due_step=10)
    places = iter([0, 7])
    assert {order.place for order, _ in early.slices(0, lambda: next(places))} == {7}
    assert early.slices(1, lambda: pytest.fail("asked again"))
    assert early.claim("a", 0, 128) is None
    assert early.claim("b", 0, 128).place == 7
    assert early.places == early.take_cancelled() == []


def test_what_is_due_last_makes_room():
    early = EarlyBuilds(NUM_SLICES)
    for nth, rid in enumerate("abc"):
        early.expect(rid, nth, 0, 128, due_step=3 + nth)
    places = iter([5, 6, 7])
    # all are late: nothing is left for another step
    early.slices(5, lambda: next(places))
    assert early.places == [5, 6, 7]
    assert early.drop_latest() == 7
    assert early.drop("a") == 5
    assert [order.place for order in early.take_cancelled()] == [7, 5]
    assert early.places == [6]
    # another extent than was expected: the row's length has jumped
    assert early.expect("b", 1, 0, 256, due_step=200) == 6


@pytest.mark.parametrize("num_slices", [1, 31])
def test_a_clustering_begins_once_its_tokens_are_in_the_kv_pool(num_slices):
    """A step's own token is written behind its slices."""
    planner = SegmentPlanner(SMALL, num_places=9, num_slices=num_slices)
    begun = {}
    for seq_len in range(150, 300):
        plan = planner.plan([DecodeRow("a", 1, seq_len, SMALL.token_budget)])
        for order, count in plan.slices:
            first, total = begun.get(order, (seq_len, 0))
            begun[order] = (first, total + count)
            assert order.segment * SMALL.segment_size + order.extent < seq_len
        if plan.orders and seq_len > 160:
            (order,) = plan.orders
            assert begun.pop(order) == (seq_len - num_slices, num_slices)
        planner.check_integrity()
    assert planner.stats.early_builds == 5


def run(host: Host, num_steps: int) -> list[torch.Tensor]:
    return [host.step() for _ in range(num_steps)]


def use_kernels(host: Host) -> None:
    from sglang_multipole.triton_clustering import make_clustering

    pool = host.runtime.pool
    clustering = make_clustering(pool, [host.layer], host.req_to_token)
    builder = SegmentBuilder(pool, clustering, host.req_to_token)
    host.runtime = MultipoleRuntime(SMALL, pool, builder, host.path)


@pytest.mark.parametrize(
    ("has_kernels", "lengths", "num_wanted"),
    [
        # not early are those of admission: an open segment and the sealed before it, at two steps
        pytest.param(False, {"a": 215, "b": 140}, 5, id="pytorch"),
        pytest.param(True, {"a": 250}, 2, id="kernels", marks=pytest.mark.interpreted),
    ],
)
def test_answers_are_those_of_clusterings_at_once(has_kernels, lengths, num_wanted, monkeypatch):
    """Open segments and one that is sealed, bit by bit."""
    hosts = [Host(SMALL, dim=64, dtype=torch.float16) for _ in range(2)]
    for host in hosts:
        if has_kernels:
            use_kernels(host)
        for nth, (rid, length) in enumerate(lengths.items()):
            host.add(rid, 1 + nth, length)
    num_steps = 289 - max(lengths.values())
    early = run(hosts[0], num_steps)
    monkeypatch.setattr(SegmentPlanner, "_expect_next", lambda *_: None)
    assert all(map(torch.equal, early, run(hosts[1], num_steps)))
    first, second = (host.runtime.planner.stats for host in hosts)
    assert first.early_builds == num_wanted
    assert (first.open_builds, first.segments_built) == (second.open_builds, second.segments_built)
    assert second.early_builds == 0


def host_with_a_clustering_begun() -> Host:
    """A row of 222 tokens, whose clusters reach 160 and will reach 192 two steps from here."""
    host = Host(SMALL)
    host.add("a", 1, 215)
    run(host, 7)
    assert len(host.runtime.planner.early.places) == 1
    return host


def test_a_slot_that_gets_new_content_meanwhile_hides_the_segment():
    host = host_with_a_clustering_begun()
    host.runtime.pool.invalidate_slots(host.req_to_token[1, 150:151].long())
    run(host, 2)
    assert host.runtime.planner.stats.early_builds == 1
    host.runtime.begin_unplanned(torch.tensor([1]), torch.tensor([224]))
    assert host.path.plan.item_indptr.tolist() == [0, 1]
    # and it is missed, and clustered anew
    host.step()
    host.runtime.begin_unplanned(torch.tensor([1]), torch.tensor([225]))
    assert host.path.plan.item_indptr.tolist() == [0, 2]


def test_a_row_whose_slots_were_exchanged_meanwhile_does_not_find_the_segment():
    host = host_with_a_clustering_begun()
    exchanged = host.req_to_token[1, [150, 151]]
    host.req_to_token[1, [151, 150]] = exchanged
    run(host, 2)
    host.runtime.begin_unplanned(torch.tensor([1]), torch.tensor([224]))
    assert host.path.plan.item_indptr.tolist() == [0, 1]


@pytest.mark.parametrize("end", ["request", "pool"])
def test_what_was_begun_ends_with_its(end):
    host = host_with_a_clustering_begun()
    builder = host.runtime.builder
    assert builder.num_begun == 1
    if end == "request":
        del host.rows["a"]
        host.add("b", 2, 100)
        host.step()
    else:
        host.runtime.clear()
    assert builder.num_begun == 0
    host.runtime.check_integrity()
    assert host.runtime.planner.early.places == []


def test_an_order_of_now_takes_the_place_of_one_of_later():
    host = Host(MultipoleConfig.from_dict(SMALL.to_dict() | {"token_budget": 8}), num_places=4)
    host.add("a", 1, 215)
    run(host, 7)
    assert host.runtime.planner.free == []
    host.add("b", 2, 100)
    host.step()
    assert host.activities["b"].sparse_steps == 1
    run(host, 1)
    assert host.activities["a"].sparse_steps == 9
    assert host.runtime.planner.stats.early_builds == 0
