"""plan_chunks: every tile and exact token in exactly one chunk of its own row."""

from __future__ import annotations

import pytest
import torch

from multipole_kernels.decode_buffers import MAX_TILE_CLUSTERS, DecodePlan, DecodeWorkspace
from multipole_kernels.decode_plan import plan_chunks
from multipole_kernels.launch_config import LaunchConfig

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_plan(items, exact):
    def indptr(counts):
        return torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)

    unused = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return DecodePlan(indptr(items), unused, indptr(exact), unused, unused)


@pytest.mark.parametrize(
    ("items", "exact"),
    [
        pytest.param([0], [0], id="nothing"),
        pytest.param([1], [0], id="one-item"),
        pytest.param([128], [200], id="one-long-row"),
        pytest.param([0, 3, 0, 17, 0], [5000, 140, 0, 255, 1], id="ragged"),
        pytest.param([0, 0, 0], [1_000_000, 0, 7], id="a-million-exact-tokens"),
        pytest.param([1] * 64, [130] * 64, id="many-short-rows"),
    ],
)
@pytest.mark.parametrize("tiles", [1, 2])
def test_chunks_cover_each_row_once(items, exact, tiles):
    num_rows = len(items)
    workspace = DecodeWorkspace(
        max_rows=num_rows + 3,
        max_items=max(1, sum(items)),
        max_items_per_row=max(1, *items),
        budget_capacity=128,
        num_kv_heads=2,
        gqa_group_size=4,
        head_dim=64,
        clusters_per_segment=MAX_TILE_CLUSTERS * tiles,
        device=DEVICE,
    )
    plan = make_plan(items, exact)
    plan_chunks(plan, workspace, num_rows)

    bounds = workspace.chunk_indptr[: num_rows + 1].tolist()
    assert bounds[0] == 0
    assert bounds[-1] <= workspace.num_chunks(num_rows)
    part = workspace.chunk_part[: bounds[-1]].tolist()
    assert sorted(part) == list(range(bounds[-1]))
    # blocks start in the chunks' order: the longer kind first
    kinds = workspace.chunk_is_exact[: bounds[-1]].tolist()
    assert kinds in (sorted(kinds), sorted(kinds, reverse=True))
    chunk_of_part = torch.tensor(part, dtype=torch.long, device=DEVICE).argsort()
    for row in range(num_rows):
        chunks = chunk_of_part[bounds[row] : bounds[row + 1]]
        assert (workspace.chunk_row[chunks] == row).all()
        covered = {0: [], 1: []}
        for is_exact, begin, end in zip(
            workspace.chunk_is_exact[chunks].tolist(),
            workspace.chunk_begin[chunks].tolist(),
            workspace.chunk_end[chunks].tolist(),
            strict=True,
        ):
            assert begin < end
            covered[is_exact].append((begin, end))
        for is_exact, indptr in ((0, tiles * plan.item_indptr), (1, plan.exact_indptr)):
            position = int(indptr[row])
            for begin, end in covered[is_exact]:
                assert begin == position
                position = end
            assert position == int(indptr[row + 1])
            lengths = [end - begin for begin, end in covered[is_exact]]
            assert not lengths or max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("items", "exact", "centroid_bytes", "longest", "tile_chunks", "exact_chunks"),
    [
        pytest.param([8] * 16, 210, 1, 11, 48, 16, id="32K-x-16-int8"),
        pytest.param([32] * 16, 210, 1, 43, 48, 16, id="128K-x-16-int8"),
        pytest.param([32] * 16, 210, 2, 22, 96, 16, id="128K-x-16-bf16"),
        pytest.param([32] * 4, 210, 1, 12, 44, 4, id="128K-x-4-int8"),
        pytest.param([32], 210, 1, 3, 43, 2, id="128K-x-1-int8"),
        pytest.param([8] * 4, 210, 1, 4, 32, 8, id="32K-x-4-int8"),
        pytest.param([], 5000, 1, 0, 0, 40, id="only-exact-tokens"),
    ],
)
def test_chunks_have_the_length_that_was_measured_as_best(
    items, exact, centroid_bytes, longest, tile_chunks, exact_chunks
):
    """8 KV heads, segments of 4 tiles: coarse_chunks_h200.csv, decode_plans_h100.csv."""
    num_rows = max(1, len(items))
    workspace = DecodeWorkspace(
        max_rows=num_rows,
        max_items=max(1, sum(items)),
        max_items_per_row=max(1, *items, 1),
        budget_capacity=128,
        num_kv_heads=8,
        gqa_group_size=1,
        head_dim=64,
        clusters_per_segment=4 * MAX_TILE_CLUSTERS,
        config=LaunchConfig(num_sms=132),
        device=DEVICE,
    )
    plan_chunks(make_plan(items or [0], [exact] * num_rows), workspace, num_rows, centroid_bytes)
    chunks = int(workspace.chunk_indptr[num_rows])
    kinds = workspace.chunk_is_exact[:chunks]
    assert (int((kinds == 0).sum()), int((kinds == 1).sum())) == (tile_chunks, exact_chunks)
    lengths = (workspace.chunk_end - workspace.chunk_begin)[:chunks][kinds == 0]
    assert max(lengths.tolist(), default=0) == longest


def test_rejects_more_rows_than_the_workspace_has():
    workspace = DecodeWorkspace(1, 1, 1, 64, 1, 1, 64, device=DEVICE)
    with pytest.raises(ValueError, match="num_rows must be between 1 and 1, got 2"):
        plan_chunks(make_plan([0, 0], [0, 0]), workspace, 2)
