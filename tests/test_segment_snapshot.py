"""The snapshot kernels against the same rules in PyTorch (TorchPath)."""

from __future__ import annotations

import pytest
import torch

from sglang_multipole.config import MultipoleConfig
from tests.test_cluster_pool import SMALL, Host

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_snapshot(host: Host, max_items: int = 64, max_rows: int = 6):
    from multipole_kernels.segment_snapshot import PoolIndex, SegmentSnapshot

    pool = host.runtime.pool
    index = PoolIndex(
        pool.segment_slots.to(DEVICE),
        pool.segment_slot_generation.to(DEVICE),
        pool.segment_extent.to(DEVICE),
        pool.last_used.to(DEVICE),
        pool.segment_of_slot.to(DEVICE),
        pool.slot_generation.to(DEVICE),
        pool.open_place.to(DEVICE),
    )
    snapshot = SegmentSnapshot(max_rows, 9, max_items, 6000, torch.device(DEVICE))
    for tensor in (*vars(snapshot.plan).values(), snapshot.found_extent, snapshot.found_place):
        tensor.fill_(-7)
    return index, snapshot


def take(host: Host, snapshot_and_index, rows, seq_lens, budgets, step=99):
    index, snapshot = snapshot_and_index
    config = host.runtime.config
    snapshot.plan.token_budget[: len(budgets)] = torch.tensor(budgets, dtype=torch.int32)
    snapshot.take(
        index,
        host.req_to_token.to(DEVICE),
        torch.tensor(rows, device=DEVICE),
        torch.tensor(seq_lens, device=DEVICE),
        step,
        min_context=config.min_context,
        recluster_interval=config.recluster_interval,
        num_sink_tokens=config.num_sink_tokens,
    )
    return snapshot


def assert_same_plan(plan, expected, num_rows: int) -> None:
    items, exact = int(expected.item_indptr[-1]), int(expected.exact_indptr[-1])
    assert plan.item_indptr[: num_rows + 1].tolist() == expected.item_indptr.tolist()
    assert plan.exact_indptr[: num_rows + 1].tolist() == expected.exact_indptr.tolist()
    assert plan.item_place[:items].tolist() == expected.item_place.tolist()
    assert plan.exact_slots[:exact].tolist() == expected.exact_slots.tolist()


@pytest.fixture
def host() -> Host:
    """Rows below the gate, sparse, sharing a prefix, and one whose budget covers it."""
    host = Host(SMALL)
    host.add("long", 1, 900)
    host.add("short", 2, 40)
    host.step()
    host.add("fork", 3, 720, shared_with="long", prefix=650)
    host.add("middle", 5, 200)
    for _ in range(5):
        host.step()
    return host


def test_matches_pytorch_on_a_ragged_batch(host):
    rows = [row for row, _ in host.rows.values()]
    lengths = [length for _, length in host.rows.values()]
    budgets = [40, 40, 40, 10000]
    index, snapshot = make_snapshot(host)
    take(host, (index, snapshot), rows, lengths, budgets)
    last_used = index.last_used.tolist()
    host.path.begin(torch.tensor(rows), torch.tensor(lengths), budgets, 99)
    assert_same_plan(snapshot.plan, host.path.plan, len(rows))
    found = host.path.results(len(rows)).read()[0]
    width = len(found[0])
    assert snapshot.found_extent[: len(rows), :width].tolist() == found.tolist()
    assert last_used == host.runtime.pool.last_used.tolist()


def test_a_slot_handed_out_again_is_exact(host):
    host.runtime.pool.invalidate_slots(host.req_to_token[1, 300:301].long())
    snapshot = take(host, make_snapshot(host), [1], [905], [40])
    assert snapshot.found_extent[0, :4].tolist() == [128, 128, 0, 128]
    host.path.begin(torch.tensor([1]), torch.tensor([905]), [40], 99)
    assert_same_plan(snapshot.plan, host.path.plan, 1)


def test_rows_of_padding_have_nothing_to_attend_to(host):
    snapshot = take(host, make_snapshot(host), [1, 0, 0], [905, 0, 0], [40, 0, 0])
    items, exact = snapshot.plan.item_indptr.tolist(), snapshot.plan.exact_indptr.tolist()
    assert items[1] == items[2] == items[3] > 0
    assert exact[1] == exact[2] == exact[3] > 0


def test_a_row_without_room_for_its_items_is_exact(host):
    snapshot = take(host, make_snapshot(host, max_items=9), [1, 3], [905, 725], [40, 40])
    assert snapshot.plan.item_indptr[:3].tolist() == [0, 7, 7]
    exact = snapshot.plan.exact_indptr.tolist()
    assert exact[2] - exact[1] == 725
    slots = snapshot.plan.exact_slots[exact[1] : exact[2]]
    assert slots.tolist() == host.req_to_token[3, :725].tolist()


def test_segments_that_are_no_power_of_two_are_compared_whole():
    config = MultipoleConfig.from_dict(SMALL.to_dict() | {"segment_size": 192})
    host = Host(config)
    host.add("a", 1, 700)
    host.step()
    host.runtime.pool.invalidate_slots(host.req_to_token[1, 191:192].long())
    snapshot = take(host, make_snapshot(host), [1], [701], [40])
    assert snapshot.found_extent[0, :3].tolist() == [0, 192, 192]


def test_more_rows_than_the_buffers_hold_are_refused(host):
    with pytest.raises(ValueError, match="at most 2 rows fit"):
        take(host, make_snapshot(host, max_rows=2), [1, 2, 3], [1, 1, 1], [0, 0])
