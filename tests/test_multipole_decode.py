"""The decode step in three launches against reference.multipole_attention, over clustered keys.

The step in one launch, which a GPU would choose for batches as small as these: test_team_decode.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from multipole_kernels import reference
from multipole_kernels.decode_plan import plan_chunks
from tests.decode_case import (
    assert_matches_reference,
    make_case,
    reference_inputs,
    selected_flags,
)
from tests.tolerance import assert_error_within

pytestmark = pytest.mark.kernel

# sparse with an open segment; empty; below the gate; sparse up to a sealed segment's end
RAGGED = [700, 0, 150, 552]


def run(case, counters=None):
    case.workspace.config = dataclasses.replace(case.workspace.config, teams=())
    return case.decode(counters)


@pytest.mark.parametrize(
    ("dtype", "centroid_dtype"),
    [
        pytest.param(torch.bfloat16, None, id="bf16"),
        pytest.param(torch.float16, None, id="fp16"),
        pytest.param(torch.bfloat16, torch.int8, id="bf16-int8"),
        pytest.param(torch.float16, torch.float8_e4m3fn, id="fp16-fp8"),
    ],
)
def test_matches_reference_over_a_ragged_batch(dtype, centroid_dtype):
    case = make_case(
        RAGGED, [96, 64, 64, 128], dtype=dtype, centroid_dtype=centroid_dtype, padding_rows=2
    )
    assert_matches_reference(case, run(case))


@pytest.mark.parametrize(
    ("num_kv_heads", "gqa_group_size", "head_dim"),
    [
        pytest.param(1, 1, 64, id="one-head"),
        pytest.param(3, 5, 96, id="nothing-a-power-of-two"),
        pytest.param(1, 16, 128, id="largest-group"),
        pytest.param(2, 2, 256, id="largest-head"),
    ],
)
def test_matches_reference_over_geometries(num_kv_heads, gqa_group_size, head_dim):
    case = make_case(
        [560, 90],
        [100, 64],
        num_kv_heads=num_kv_heads,
        gqa_group_size=gqa_group_size,
        head_dim=head_dim,
    )
    assert_matches_reference(case, run(case))


@pytest.mark.parametrize("centroid_dtype", [None, torch.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize(
    ("segment_size", "clusters_per_segment"),
    [
        pytest.param(1024, 256, id="two-tiles-a-segment"),
        pytest.param(384, 48, id="not-a-power-of-two"),
    ],
)
def test_matches_reference_with_segments_of_several_tiles(
    segment_size, clusters_per_segment, centroid_dtype
):
    case = make_case(
        [1700, 150, 1100],
        [96, 64, 0],
        segment_size=segment_size,
        clusters_per_segment=clusters_per_segment,
        centroid_dtype=centroid_dtype,
    )
    assert case.workspace.tiles_per_segment > 1
    assert_matches_reference(case, run(case))


def test_a_budget_above_the_context_is_dense_attention():
    case = make_case([700], [1024])
    out = run(case)
    arguments = reference_inputs(case, 0, torch.float32)
    arguments["cluster_ids"].fill_(-1)  # in no cluster: every token attended exactly
    of_clusters = ("key_centroids", "value_centroids", "cluster_sizes", "key_variance")
    for name in (*of_clusters, "pair_weight"):
        arguments[name] = arguments[name][:, :0]
    truth, _, _ = reference.multipole_attention(**arguments)
    arguments |= {name: arguments[name].to(case.q.dtype) for name in ("q", "keys", "values")}
    baseline, _, _ = reference.multipole_attention(**arguments)
    assert selected_flags(case, 0).any()
    assert_error_within("out", out[0], truth, baseline)


def test_budget_0_is_centroid_attention():
    case = make_case([700], [0])
    out = run(case)
    assert not selected_flags(case, 0).any()
    assert_matches_reference(case, out)


def test_the_best_cluster_is_taken_even_above_the_budget():
    case = make_case([700], [1])
    out = run(case)
    assert (selected_flags(case, 0).sum(-1) == 1).all()
    assert_matches_reference(case, out)


def test_all_empty_rows_give_zero():
    case = make_case([0, 0], [64, 64], padding_rows=1)
    assert (run(case) == 0).all()


def test_same_input_gives_the_same_bits():
    case = make_case(RAGGED, [96, 64, 64, 128])
    assert torch.equal(run(case), run(case))


def test_order_of_slots_does_not_matter():
    """A row's result depends on what its slots hold, not on where they lie."""
    case = make_case([600], [64])
    out = run(case)
    moved = torch.randperm(len(case.k_cache), generator=torch.Generator().manual_seed(1))
    moved = moved.to(case.q.device)
    new_slot = torch.empty_like(moved)
    new_slot[moved] = torch.arange(len(moved), device=moved.device)
    case.k_cache, case.v_cache = case.k_cache[moved], case.v_cache[moved]
    case.plan.exact_slots.copy_(new_slot[case.plan.exact_slots.long()])
    case.pool_layer.segment_slots.copy_(new_slot[case.pool_layer.segment_slots.long()])
    assert torch.equal(run(case), out)


def test_counters_tell_sparse_steps_from_exact_ones():
    case = make_case(RAGGED, [96, 64, 64, 128], padding_rows=1)
    counters = torch.zeros(5, 4, dtype=torch.int64, device=case.q.device)
    run(case, counters)
    run(case, counters)
    selected = case.workspace.num_selected_tokens.sum(-1) // case.workspace.num_kv_heads
    exact = case.plan.exact_indptr.diff() + selected
    assert counters[:, 0].tolist() == [2, 0, 0, 2, 0]
    assert counters[:, 1].tolist() == [0, 0, 2, 0, 0]
    assert counters[:, 2].tolist() == (2 * exact).tolist()
    assert counters[:, 3].tolist() == [2 * length for length in [*RAGGED, 0]]


def test_a_smaller_batch_uses_the_same_workspace():
    case = make_case(RAGGED, [96, 64, 64, 128])
    whole = run(case)
    plan_chunks(case.plan, case.workspace, 1)
    case.q = case.q[:1]
    torch.testing.assert_close(run(case), whole[:1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("factor", [2.0**-8, 2.0**9])
def test_8_bit_values_of_any_magnitude(factor):
    """Weights times scales are float16: neither too small nor too large for it."""
    case = make_case([600], [64], centroid_dtype=torch.int8)
    case.v_cache *= factor
    case.pool_layer.value_scale *= factor
    assert_matches_reference(case, run(case))


@pytest.mark.parametrize(
    ("dims", "factor"),
    [
        pytest.param(slice(None), 4, id="all-dimensions"),
        pytest.param(slice(0, 1), 64, id="one-dimension"),
        pytest.param(slice(None), 0, id="zero"),
    ],
)
def test_8_bit_keys_with_queries_of_any_magnitude(dims, factor):
    """int8 keys are multiplied with queries in two terms: nothing that decides is lost in them."""
    case = make_case([600], [64], centroid_dtype=torch.int8)
    case.q[..., dims] *= factor
    assert_matches_reference(case, run(case))


def test_rejects_a_number_of_clusters_that_no_tile_divides():
    with pytest.raises(ValueError, match="must be a multiple of 16, got 40"):
        make_case([700], [64], segment_size=320, clusters_per_segment=40)


def test_rejects_centroids_of_another_dtype():
    case = make_case([600], [64])
    case.pool_layer.key_centroids = case.pool_layer.key_centroids.float()
    with pytest.raises(ValueError, match="centroids must both be q's dtype"):
        run(case)
