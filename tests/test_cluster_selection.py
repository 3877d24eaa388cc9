"""cluster_selection against its reference: the prefix rule, ties, and rows of every length."""

from __future__ import annotations

import pytest
import torch

from multipole_kernels import reference
from multipole_kernels.launch_config import LaunchConfig
from multipole_kernels.multipole_decode import multipole_decode
from tests.decode_case import make_case, reference_inputs, selected_flags

pytestmark = pytest.mark.kernel

# (segments in registers) so small that a row of five is read again in every trial
STREAMED = LaunchConfig(
    num_sms=4, coarse_block_tokens=32, exact_block_tokens=32, select_segments=(1, 2)
)
IN_REGISTERS = LaunchConfig(num_sms=4, coarse_block_tokens=32, exact_block_tokens=32)
PATHS = [pytest.param(IN_REGISTERS, id="in-registers"), pytest.param(STREAMED, id="streamed")]


def select(case):
    out = torch.empty_like(case.q)
    multipole_decode(
        case.q,
        case.k_cache,
        case.v_cache,
        case.pool_layer,
        case.plan,
        case.workspace,
        case.sm_scale,
        case.max_logit_variance,
        out,
    )
    return selected_flags(case, 0)


def expected(case):
    return reference.multipole_attention(**reference_inputs(case, 0, torch.float32))[2]


@pytest.mark.parametrize("config", PATHS)
@pytest.mark.parametrize("budget", [0, 1, 40, 300, 5000])
def test_takes_the_same_clusters_as_the_reference(config, budget):
    case = make_case([1290], [budget], num_kv_heads=1, config=config, seed=budget)
    torch.testing.assert_close(select(case), expected(case), rtol=0, atol=0)


@pytest.mark.parametrize("config", PATHS)
@pytest.mark.parametrize("budget", [20, 150])
def test_a_tie_takes_the_lower_index(config, budget):
    case = make_case([1290], [budget], num_kv_heads=1, config=config)
    pool = case.pool_layer
    # every cluster of every segment looks the same, so that only the index tells them apart
    pool.key_centroids[:] = pool.key_centroids[case.rows[0].places[0], 0, 0]
    flags = select(case)[0]
    sizes = pool.cluster_sizes[case.rows[0].places].transpose(0, 1).flatten().int()
    taken = (sizes.cumsum(0) <= budget) & (sizes > 0)
    taken[(sizes > 0).nonzero()[0]] = True
    assert torch.equal(flags, taken)


def test_lists_the_slots_of_the_selected_clusters_tokens():
    case = make_case([900], [120])
    flags = select(case)
    cluster_ids = reference_inputs(case, 0, torch.float32)["cluster_ids"]
    for head in range(case.workspace.num_kv_heads):
        count = int(case.workspace.num_selected_tokens[0, head])
        listed = case.workspace.selected_slots[0, head, :count].long()
        in_selected = flags[head][cluster_ids[head].clamp(min=0)] & (cluster_ids[head] >= 0)
        assert sorted(listed.tolist()) == sorted(case.rows[0].slots[in_selected].tolist())


def test_a_budget_above_the_workspaces_capacity_is_cut():
    case = make_case([900], [64])
    case.plan.token_budget.fill_(1 << 20)
    select(case)
    assert (case.workspace.num_selected_tokens <= 64 + case.workspace.max_cluster_size).all()
