"""cluster_selection against its reference: the prefix rule, ties, and rows of every length."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from multipole_kernels import reference
from multipole_kernels.cluster_selection import cluster_selection
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer
from multipole_kernels.launch_config import LaunchConfig, launch_config
from tests.decode_case import make_case, reference_inputs, selected_flags

SMALL = LaunchConfig(num_sms=4, coarse_block_tokens=32, exact_block_tokens=32)
# a row of five segments is too long for shared memory
SMALL_LONG = dataclasses.replace(SMALL, select_resident_clusters=32)
CONFIGS = [
    pytest.param(SMALL, id="resident"),
    pytest.param(SMALL_LONG, id="long", marks=pytest.mark.gpu),
]


def select(case):
    case.decode()
    return selected_flags(case, 0)


def expected(case):
    return reference.multipole_attention(**reference_inputs(case, 0, torch.float32))[2]


@pytest.mark.kernel
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("budget", [0, 1, 40, 300, 5000])
def test_takes_the_same_clusters_as_the_reference(config, budget):
    case = make_case([1290], [budget], num_kv_heads=1, config=config, seed=budget)
    torch.testing.assert_close(select(case), expected(case), rtol=0, atol=0)


@pytest.mark.kernel
@pytest.mark.parametrize("config", CONFIGS)
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


@pytest.mark.kernel
def test_lists_the_slots_of_the_selected_clusters_tokens():
    case = make_case([900], [120])
    flags = select(case)
    cluster_ids = reference_inputs(case, 0, torch.float32)["cluster_ids"]
    for head in range(case.workspace.num_kv_heads):
        count = int(case.workspace.num_selected_tokens[0, head])
        listed = case.workspace.selected_slots[0, head, :count].long()
        in_selected = flags[head][cluster_ids[head].clamp(min=0)] & (cluster_ids[head] >= 0)
        assert sorted(listed.tolist()) == sorted(case.rows[0].slots[in_selected].tolist())


@pytest.mark.kernel
def test_a_budget_above_the_workspaces_capacity_is_cut():
    case = make_case([900], [64])
    case.plan.token_budget.fill_(1 << 20)
    select(case)
    assert (case.workspace.num_selected_tokens <= 64 + case.workspace.max_cluster_size).all()


# ------------------------------------------------------- the kernel against its PyTorch counterpart


@dataclasses.dataclass
class Inputs:
    pool_layer: PoolLayer
    plan: DecodePlan
    workspace: DecodeWorkspace
    num_rows: int


def make_inputs(
    segments: list[int],
    budgets: list[int],
    weights,
    *,
    num_kv_heads: int,
    group: int,
    clusters: int = 128,
    mean_size: int = 16,
    head_dim: int = 128,
    config: LaunchConfig = SMALL,
    seed: int = 0,
) -> Inputs:
    """What coarse attention leaves, made up, in host memory.

    The denominators are powers of two, so that ranks are the same numbers on every machine.

    Args:
        segments: of each row.
        weights: (shape, generator) -> float32 weights between 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    num_items, segment_size = sum(segments), clusters * mean_size
    num_places = num_items + 1
    heads = (num_kv_heads, clusters)

    def random_int(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    # a third of the clusters is empty
    sizes = random_int(2 * mean_size, num_places, *heads) - mean_size // 2
    sizes = (sizes.clamp(min=0)).to(torch.int16)
    begin = (sizes.cumsum(-1) - sizes).to(torch.int16)
    no_centroids = torch.zeros(0)
    pool_layer = PoolLayer(
        **{
            field.name: no_centroids
            for field in dataclasses.fields(PoolLayer)
            if field.default is dataclasses.MISSING
        }
        | {
            "cluster_sizes": sizes,
            "member_begin": begin,
            "members": random_int(segment_size, num_places, num_kv_heads, segment_size).short(),
            "segment_slots": random_int(1 << 30, num_places, segment_size).int(),
        }
    )
    indptr = torch.tensor([0, *segments]).cumsum(0).int()
    plan = DecodePlan(
        item_indptr=indptr,
        item_place=(1 + torch.randperm(num_items, generator=generator)).int(),
        exact_indptr=torch.zeros_like(indptr),
        exact_slots=torch.zeros(1, dtype=torch.int32),
        token_budget=torch.tensor(budgets, dtype=torch.int32),
    )
    workspace = DecodeWorkspace(
        max_rows=len(segments),
        max_items=max(num_items, 1),
        max_items_per_row=max(segments),
        budget_capacity=max(max(budgets), 1),
        num_kv_heads=num_kv_heads,
        gqa_group_size=group,
        head_dim=head_dim,
        clusters_per_segment=clusters,
        max_cluster_size=8 * mean_size,
        device="cpu",
        config=config,
    )
    workspace.cluster_weight.copy_(weights(workspace.cluster_weight.shape, generator))
    shape = workspace.weight_shift_log2.shape
    workspace.weight_shift_log2.copy_(random_int(6, *shape) - 6)
    # one part a row of weight 2^m, and one that attended to nothing
    workspace.chunk_indptr.copy_(2 * torch.arange(len(segments) + 1))
    parts = workspace.part_max_log2[: 2 * len(segments)]
    parts.copy_(random_int(4, *parts.shape))
    parts[1::2] = -torch.inf
    workspace.part_sum[: 2 * len(segments) : 2] = 1.0
    acc = workspace.part_acc[: 2 * len(segments)]
    acc.copy_(torch.randn(acc.shape, generator=generator))
    return Inputs(pool_layer, plan, workspace, len(segments))


def on_gpu(inputs: Inputs) -> Inputs:
    """The same inputs on the GPU, what the selection writes filled with -1 or NaN."""
    moved = copy.copy(inputs)
    for name in ("pool_layer", "plan", "workspace"):
        owner = copy.copy(getattr(inputs, name))
        for field, value in vars(owner).items():
            if isinstance(value, torch.Tensor):
                setattr(owner, field, value.cuda())
        setattr(moved, name, owner)
    for name in ("selected_clusters", "selected_slots", "num_selected_tokens"):
        getattr(moved.workspace, name).fill_(-1)
    moved.workspace.coarse_acc.fill_(torch.nan)
    overlap = launch_config(torch.device("cuda")).overlap_launches
    moved.workspace.config = dataclasses.replace(inputs.workspace.config, overlap_launches=overlap)
    return moved


def run(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The selection's outputs by name, on the host; lists cut to their lengths."""
    workspace = inputs.workspace
    cluster_selection(inputs.num_rows, inputs.pool_layer, inputs.plan, workspace)
    results = {
        name: getattr(workspace, name).cpu()
        for name in (
            "num_selected_clusters",
            "num_selected_tokens",
            "num_clustered_tokens",
            "coarse_max_log2",
            "coarse_sum",
            "coarse_acc",
        )
    }
    for name, length in (
        ("selected_clusters", "num_selected_clusters"),
        ("selected_slots", "num_selected_tokens"),
    ):
        lists, lengths = getattr(workspace, name).cpu(), results[length]
        results[name] = torch.cat(
            [
                lists[row, head, : int(lengths[row, head])]
                for row in range(inputs.num_rows)
                for head in range(workspace.num_kv_heads)
            ]
        )
    return results


def assert_same(inputs: Inputs) -> None:
    wanted, got = run(inputs), run(on_gpu(inputs))
    for name, value in wanted.items():
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if name == "coarse_acc" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def spread(octaves: float):
    """Weights over many octaves, as attention's."""
    return lambda shape, generator: torch.rand(shape, generator=generator).mul(-octaves).exp2()


def tied(values: int):
    """Weights of few different values."""
    return lambda shape, generator: (
        torch.randint(0, values, shape, generator=generator) / max(values - 1, 1)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(spread(2.0), id="alike"),
        pytest.param(spread(14.0), id="peaked"),
        pytest.param(spread(60.0), id="most-weights-0"),
        pytest.param(tied(1), id="all-0"),
        pytest.param(tied(3), id="few-values"),
    ],
)
@pytest.mark.parametrize("resident", [8192, 512])
@pytest.mark.parametrize("threads", [256, 512, 1024])
def test_selects_what_pytorch_selects_in_a_ragged_batch(weights, resident, threads):
    config = dataclasses.replace(SMALL, select_resident_clusters=resident, select_threads=threads)
    inputs = make_inputs(
        [16, 0, 3, 64, 5, 64, 1, 40],
        [512, 512, 100000, 1024, 0, 6554, 1, 30],
        weights,
        num_kv_heads=2,
        group=4,
        config=config,
        seed=threads + resident,
    )
    assert_same(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "head_dim", "clusters"),
    [
        pytest.param(1, 64, 16, id="one-head"),
        pytest.param(5, 96, 64, id="nothing-a-power-of-two"),
        pytest.param(16, 256, 128, id="largest"),
        pytest.param(4, 128, 256, id="two-tiles-a-segment"),
    ],
)
def test_selects_what_pytorch_selects_in_other_geometries(group, head_dim, clusters):
    inputs = make_inputs(
        [30, 2],
        [700, 40],
        spread(8.0),
        num_kv_heads=3,
        group=group,
        head_dim=head_dim,
        clusters=clusters,
    )
    assert_same(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [spread(10.0), tied(2)], ids=["spread", "tied"])
@pytest.mark.parametrize("budget", [1024, 100_000])
def test_selects_what_pytorch_selects_in_a_row_of_a_million_tokens(weights, budget):
    assert_same(make_inputs([512], [budget], weights, num_kv_heads=1, group=4))
