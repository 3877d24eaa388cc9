"""The decode step in one launch against the reference, in every shape of a team, on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from multipole_kernels import reference
from multipole_kernels.decode_buffers import DecodeWorkspace
from multipole_kernels.launch_config import LaunchConfig, Team, launch_config
from tests.decode_case import (
    assert_matches_reference,
    attention_given_selection,
    make_case,
    reference_inputs,
    selected_flags,
)
from tests.tolerance import assert_error_within

# sparse with an open segment; empty; below the gate; sparse up to a sealed segment's end
RAGGED = [700, 0, 150, 552]
BUDGETS = [96, 64, 64, 128]
# Qwen3-8B's
REAL = {
    "num_kv_heads": 8,
    "gqa_group_size": 4,
    "head_dim": 128,
    "segment_size": 2048,
    "clusters_per_segment": 128,
    "recent": 200,
}


@pytest.fixture
def config():
    """blocks -> a configuration in which every batch is attended to by teams of so many."""
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("thread-block clusters need compute capability 9.0")

    def with_team(blocks: int) -> LaunchConfig:
        teams = (Team(max_row_heads=1 << 30, blocks=blocks),)
        return dataclasses.replace(launch_config(device), teams=teams)

    return with_team


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("dtype", "centroid_dtype"),
    [
        pytest.param(torch.bfloat16, None, id="bf16"),
        pytest.param(torch.bfloat16, torch.int8, id="bf16-int8"),
        pytest.param(torch.float16, torch.float8_e4m3fn, id="fp16-fp8"),
    ],
)
def test_matches_reference_over_a_ragged_batch(config, blocks, dtype, centroid_dtype):
    case = make_case(
        RAGGED,
        BUDGETS,
        dtype=dtype,
        centroid_dtype=centroid_dtype,
        padding_rows=2,
        config=config(blocks),
    )
    out = case.decode()
    assert_matches_reference(case, out)
    assert torch.equal(case.decode(), out)


@pytest.mark.gpu
@pytest.mark.parametrize("centroid_dtype", [None, torch.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize(
    ("num_kv_heads", "gqa_group_size", "head_dim"),
    [
        pytest.param(1, 1, 64, id="one-head"),
        pytest.param(3, 5, 96, id="nothing-a-power-of-two"),
        pytest.param(1, 8, 128, id="largest"),
    ],
)
def test_matches_reference_over_geometries(
    config, num_kv_heads, gqa_group_size, head_dim, centroid_dtype
):
    case = make_case(
        [560, 90],
        [100, 64],
        num_kv_heads=num_kv_heads,
        gqa_group_size=gqa_group_size,
        head_dim=head_dim,
        centroid_dtype=centroid_dtype,
        config=config(8),
    )
    assert_matches_reference(case, case.decode())


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0, 1, 40, 300, 5000])
def test_takes_the_same_clusters_as_the_reference(config, budget):
    case = make_case([1290], [budget], num_kv_heads=1, config=config(4), seed=budget)
    assert_matches_reference(case, case.decode())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("length", "budget"), [pytest.param(1290, 150, id="few"), pytest.param(40000, 900, id="many")]
)
def test_a_tie_takes_the_lower_index(config, length, budget):
    """With many, more clusters are alike than a block can tell the others of."""
    case = make_case([length], [budget], num_kv_heads=1, config=config(8))
    pool = case.pool_layer
    pool.key_centroids[:] = pool.key_centroids[case.rows[0].places[0], 0, 0]
    case.decode()
    sizes = pool.cluster_sizes[case.rows[0].places].transpose(0, 1).flatten().int()
    taken = (sizes.cumsum(0) <= budget) & (sizes > 0)
    taken[(sizes > 0).nonzero()[0]] = True
    assert torch.equal(selected_flags(case, 0)[0], taken)


def assert_near_reference(case, out):
    """A selection may differ where two clusters rank alike; given it, the output may not."""
    for nth in range(len(case.rows)):
        flags = selected_flags(case, nth)
        _, _, expected = reference.multipole_attention(**reference_inputs(case, nth, torch.float32))
        assert (flags != expected).sum() <= 0.02 * expected.sum()
        baseline, _, _ = reference.multipole_attention(**reference_inputs(case, nth, case.q.dtype))
        truth = attention_given_selection(case, nth, flags)
        assert_error_within(f"row {nth}", out[nth], truth, baseline)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [2, 16])
@pytest.mark.parametrize("centroid_dtype", [None, torch.int8], ids=["bf16", "int8"])
def test_matches_reference_at_real_sizes(config, blocks, centroid_dtype):
    case = make_case(
        [20000, 5000, 9000],
        [512, 100, 4000],
        centroid_dtype=centroid_dtype,
        config=config(blocks),
        **REAL,
    )
    assert_near_reference(case, case.decode())


@pytest.mark.gpu
def test_slots_of_more_tokens_than_blocks_are_told_of(config):
    case = make_case([20000], [12000], config=config(2), **REAL)
    assert_near_reference(case, case.decode())
    assert (case.workspace.num_selected_tokens > 2 * 2048).all()


@pytest.mark.gpu
@pytest.mark.parametrize("centroid_dtype", [None, torch.int8], ids=["bf16", "int8"])
def test_a_row_too_long_for_shared_memory(config, centroid_dtype, monkeypatch):
    """The blocks hold one segment each; the rows are longer, one of them is not."""
    monkeypatch.setattr(
        DecodeWorkspace, "team_resident_clusters", lambda self, team: self.clusters_per_segment
    )
    case = make_case(
        [20000, 5000],
        [512, 100],
        centroid_dtype=centroid_dtype,
        config=config(2),
        **REAL,
    )
    assert case.workspace.team_long_scores.numel()
    assert_near_reference(case, case.decode())


@pytest.mark.gpu
def test_counters_and_lists_are_those_of_three_launches(config):
    team = make_case(RAGGED, BUDGETS, padding_rows=1, config=config(4))
    three = make_case(
        RAGGED, BUDGETS, padding_rows=1, config=dataclasses.replace(config(4), teams=())
    )
    counters = [torch.zeros(5, 4, dtype=torch.int64, device="cuda") for _ in range(2)]
    for _ in range(2):
        team.decode(counters[0])
        three.decode(counters[1])
    assert torch.equal(*counters)
    for name in ("num_selected_tokens", "num_selected_clusters", "num_clustered_tokens"):
        assert torch.equal(getattr(team.workspace, name), getattr(three.workspace, name))
    for row in range(len(RAGGED)):
        for head in range(team.workspace.num_kv_heads):
            count = int(team.workspace.num_selected_tokens[row, head])
            listed = [
                case.workspace.selected_slots[row, head, :count].sort().values
                for case in (team, three)
            ]
            assert torch.equal(*listed)


def test_the_shape_of_a_launch_follows_the_batch_and_the_longest_row():
    teams = (Team(8, 16), Team(32, 4, max_row_clusters=1024))

    def shapes(max_segments: int, budget: int) -> list[Team | None]:
        workspace = DecodeWorkspace(
            max_rows=64,
            max_items=max_segments,
            max_items_per_row=max_segments,
            budget_capacity=budget,
            num_kv_heads=8,
            gqa_group_size=4,
            head_dim=128,
            device="cpu",
            config=LaunchConfig(num_sms=132, teams=teams),
        )
        return [workspace.team(rows) for rows in (1, 2, 4, 5)]

    assert shapes(8, 64) == [teams[0], teams[1], teams[1], None]
    assert shapes(9, 64) == [teams[0], None, None, None]
    assert shapes(8, 1 << 16) == [None] * 4


@pytest.mark.parametrize(("gqa_group_size", "head_dim"), [(16, 128), (2, 256)])
def test_geometries_that_registers_do_not_hold_take_three_launches(gqa_group_size, head_dim):
    config = LaunchConfig(num_sms=132, teams=(Team(8, 16),))
    workspace = DecodeWorkspace(
        4, 4, 4, 64, 1, gqa_group_size, head_dim, device="cpu", config=config
    )
    assert workspace.team(1) is None
