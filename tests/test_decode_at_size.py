"""The decode step at a server's sizes: the launches that the configuration chooses, and others."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from multipole_kernels.launch_config import Team, launch_config
from tests.decode_case import DecodeCase, attention_given_selection, make_case, selected_flags
from tests.test_team_decode import assert_near_reference
from tests.tolerance import assert_error_within

pytestmark = pytest.mark.gpu

# a server's defaults for Qwen3's RoPE base
DEFAULTS = {
    "head_dim": 128,
    "segment_size": 4096,
    "clusters_per_segment": 256,
    "max_cluster_size": 128,
    "max_logit_variance": 2.0,
    "recent": 200,
    "padding_rows": 1,
}
LENGTHS = [9000, 4500, 13000, 200]
BUDGETS = [512, 1024, 2048, 300]
CENTROIDS = pytest.mark.parametrize("centroid_dtype", [None, torch.int8], ids=["bf16", "int8"])


def in_three_launches(case: DecodeCase) -> DecodeCase:
    workspace = case.workspace
    workspace.config = dataclasses.replace(workspace.config, teams=())
    return case


def assert_right_twice(case: DecodeCase) -> torch.Tensor:
    out = case.decode()
    assert_near_reference(case, out)
    assert (out[len(case.rows) :] == 0).all()
    assert torch.equal(case.decode(), out)
    return out


@CENTROIDS
@pytest.mark.parametrize(("num_kv_heads", "gqa_group_size"), [(8, 4), (4, 8)])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 33])
def test_batches_of_any_number_of_rows(batch, num_kv_heads, gqa_group_size, centroid_dtype):
    case = make_case(
        [LENGTHS[nth % len(LENGTHS)] for nth in range(batch)],
        [BUDGETS[nth % len(BUDGETS)] for nth in range(batch)],
        num_kv_heads=num_kv_heads,
        gqa_group_size=gqa_group_size,
        centroid_dtype=centroid_dtype,
        seed=batch,
        **DEFAULTS,
    )
    assert_right_twice(case)
    assert_right_twice(in_three_launches(case))


@CENTROIDS
def test_a_row_of_512_thousand_tokens(centroid_dtype):
    """In teams a block's share does not fit shared memory; in three launches no row's ranks do."""
    team = Team(max_row_heads=1 << 30, blocks=16, blocks_per_sm=2)
    config = dataclasses.replace(launch_config(torch.device("cuda")), teams=(team,))
    case = make_case(
        [1 << 19],
        [1024],
        num_kv_heads=2,
        gqa_group_size=4,
        centroid_dtype=centroid_dtype,
        config=config,
        **DEFAULTS,
    )
    if torch.cuda.get_device_capability()[0] >= 9:
        assert case.workspace.team_long_scores.numel()
        assert_right_twice(case)
    assert case.workspace.long_row_ranks.numel()
    assert_right_twice(in_three_launches(case))


@CENTROIDS
@pytest.mark.parametrize("launches", ["chosen", "three"])
def test_equal_scores_take_the_first_clusters(launches, centroid_dtype):
    case = make_case(
        [33000, 12500],
        [1024, 700],
        num_kv_heads=8,
        gqa_group_size=4,
        centroid_dtype=centroid_dtype,
        **DEFAULTS,
    )
    pool = case.pool_layer
    pool.key_centroids[:] = pool.key_centroids[case.rows[0].places[0], 0, 0]
    if pool.key_scale is not None:
        pool.key_scale[:] = pool.key_scale[case.rows[0].places[0], 0, 0]
    if launches == "three":
        in_three_launches(case)
    out = case.decode()
    for nth, row in enumerate(case.rows):
        # [H, clusters of the row]
        sizes = pool.cluster_sizes[row.places].transpose(0, 1).flatten(1).int()
        taken = (sizes.cumsum(-1) <= case.budgets[nth]) & (sizes > 0)
        assert torch.equal(selected_flags(case, nth), taken)
        truth = attention_given_selection(case, nth, taken)
        baseline = attention_given_selection(case, nth, taken, case.q.dtype)
        assert_error_within(f"row {nth}", out[nth], truth, baseline)


@pytest.mark.parametrize("teams", [(), (Team(max_row_heads=1 << 30, blocks=2),)], ids=["3", "1"])
def test_launches_that_overlap_give_the_bits_of_those_that_do_not(teams):
    """Beside other work, right behind each other, in a graph: nothing is read too early."""
    config = launch_config(torch.device("cuda"))
    if not config.overlap_launches:
        pytest.skip("the configuration of this GPU overlaps no launches")
    case = make_case(
        2 * LENGTHS,
        2 * BUDGETS,
        num_kv_heads=8,
        gqa_group_size=4,
        centroid_dtype=torch.int8,
        config=dataclasses.replace(config, teams=teams),
        **DEFAULTS,
    )
    queries = [case.q * factor for factor in (1.0, 0.7, 1.3)]
    case.q = torch.empty_like(case.q)
    outs = [torch.empty_like(case.q) for _ in range(36)]

    def run_layers(times_each: int) -> None:
        for nth, out in enumerate(outs):
            if nth % times_each == 0:
                case.q.copy_(queries[nth // times_each % len(queries)])
            case.decode(out=out)

    def assert_bits(run, times_each: int) -> None:
        for out in outs:
            out.fill_(torch.nan)
        run()
        torch.cuda.synchronize()
        for nth, out in enumerate(outs):
            assert torch.equal(out, expected[nth // times_each % len(queries)]), nth

    overlapped = case.workspace.config
    case.workspace.config = dataclasses.replace(overlapped, overlap_launches=False)
    run_layers(1)
    expected = [out.clone() for out in outs[: len(queries)]]
    case.workspace.config = overlapped
    graph = torch.cuda.CUDAGraph()
    run_layers(4)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run_layers(4)
    other = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    beside = torch.cuda.Stream()
    for has_work_beside in (False, True):
        for times_each in (1, 4):
            if has_work_beside:
                with torch.cuda.stream(beside):
                    for _ in range(20):
                        other @ other
            assert_bits(lambda n=times_each: run_layers(n), times_each)
        assert_bits(graph.replay, 4)
