"""The clustering kernels against reference.cluster_segment and summarize_clusters."""

from __future__ import annotations

import itertools

import pytest
import torch

from multipole_kernels import reference
from multipole_kernels.clustering_batch import ClusteringBatch, ClusteringGeometry, make_orders
from multipole_kernels.kmeans import kmeans
from multipole_kernels.segment_clustering import supports
from tests.clustering_case import ClusteringCase, make_clustering_case

# (row, segment, extent, place): a first segment with its sinks, a later one, an open one
ORDERS = [(0, 0, 256, 3), (1, 2, 256, 5), (1, 3, 128, 7)]


def num_clusters(case: ClusteringCase, num_tokens: int) -> int:
    return -(-num_tokens // case.geometry.tokens_per_cluster)


def squared_distance(features: torch.Tensor, ids: torch.Tensor, clusters: int) -> torch.Tensor:
    """[H], what k-means makes small."""
    means = reference.cluster_means(features, ids, clusters).nan_to_num(0.0)
    nearest = means.gather(-2, ids.unsqueeze(-1).expand(features.shape))
    return (features - nearest).square().sum((-1, -2))


def reference_ids(
    case: ClusteringCase, layer: int, order, place: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and cluster ids of an order in one layer; place: seeds as in that segment."""
    features = case.features(layer, *order[:3])
    geometry = case.geometry
    ids = reference.cluster_segment(
        features,
        num_clusters(case, features.shape[1]),
        geometry.max_cluster_size,
        geometry.num_lloyd_iters,
        order[1] if place is None else place,
    )
    return features, ids


def assert_summary_matches(case: ClusteringCase, layer: int, order) -> None:
    """The stored summary is that of the stored members."""
    place, pool = order[3], case.pool
    ids = case.cluster_ids(layer, *order)
    clusters = num_clusters(case, ids.shape[1])
    _, slots = case.tokens(*order[:3])
    keys = case.keys[layer][slots].transpose(0, 1)
    values = case.values[layer][slots].transpose(0, 1)
    expected = reference.summarize_clusters(keys, values, ids, clusters)
    torch.testing.assert_close(
        pool.key_variance[layer, place, :, :clusters], expected.key_variance, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        pool.pair_weight[layer, place], expected.pair_weight, rtol=1e-4, atol=1e-5
    )
    for stored, scales, mean in (
        (pool.key_centroids, pool.key_scale, expected.key_centroids),
        (pool.value_centroids, pool.value_scale, expected.value_centroids),
    ):
        stored = stored[layer, place, :, :clusters]
        if scales is None:
            # a mean that lies between two numbers of the dtype may be rounded either way
            step = torch.finfo(stored.dtype).eps
            torch.testing.assert_close(stored.float(), mean, rtol=step, atol=1e-6)
            continue
        scale = scales[layer, place, :, :clusters]
        quantized, expected_scale = reference.quantize_centroids(mean, stored.dtype)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
        differs = stored.float() != quantized.float()
        assert differs.float().mean() < 1e-3
        actual = reference.dequantize_centroids(stored, scale)
        largest_step = 1.01 * scale.unsqueeze(-1) * (1.0 if stored.dtype == torch.int8 else 32.0)
        assert ((actual - mean).abs() <= largest_step).all()


def assert_same_payload(one: ClusteringCase, another: ClusteringCase, order) -> None:
    """All that is read of an order's place is the same bits."""
    row, segment, extent, place = order
    num_tokens = len(one.tokens(row, segment, extent)[0])
    for name, tensor in vars(one.pool).items():
        own, other = tensor[:, place], vars(another.pool)[name][:, place]
        if name == "members":
            own, other = own[..., :num_tokens], other[..., :num_tokens]
        elif name != "pair_weight":
            clusters = num_clusters(one, num_tokens)
            own, other = own[:, :, :clusters], other[:, :, :clusters]
        assert torch.equal(own, other), name


def assert_near_the_reference(case: ClusteringCase, orders) -> None:
    """What k-means makes small is as small as the reference's, head by head.

    A near tie decided the other way starts or leads k-means elsewhere, which moves what it reaches
    by percents, up or down: few heads may differ, and by no more than other seeds from each other.
    """
    ratios, ranges = [], []
    for order in orders:
        for layer in range(len(case.keys)):
            features, expected = reference_ids(case, layer, order)
            ids = case.cluster_ids(layer, *order)
            clusters = num_clusters(case, ids.shape[1])
            best = squared_distance(features, expected, clusters)
            ratios.append(squared_distance(features, ids, clusters) / best)
            elsewhere = [
                squared_distance(features, reference_ids(case, layer, order, place)[1], clusters)
                for place in range(order[1] + 100, order[1] + 108)
            ]
            elsewhere = torch.stack(elsewhere)
            ranges.append(elsewhere.amax(0) / elsewhere.amin(0))
            assert_summary_matches(case, layer, order)
    ratios, ranges = torch.cat(ratios), torch.cat(ranges)
    assert (ratios <= 1.001).float().mean() >= 2 / 3, ratios
    assert (ratios <= ranges).all(), (ratios, ranges)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"centroid_dtype": torch.int8, "num_layers": 1}, id="int8"),
        pytest.param(
            {
                "kv_dtype": torch.float16,
                "head_dim": 96,
                "rotary_half": 32,
                "layers_without_rope": (1,),
                "num_kv_heads": 1,
                "centroid_dtype": torch.float8_e4m3fn,
            },
            id="partial-rope-fp8",
        ),
        pytest.param({"head_dim": 256, "num_kv_heads": 1, "num_layers": 1}, id="largest-head"),
        pytest.param(
            {"rotary_half": 0, "layers_without_rope": (0, 1), "kv_dtype": torch.float32}, id="nope"
        ),
    ],
)
def test_matches_the_reference(shape):
    case = make_clustering_case(**shape)
    case.clustering.cluster(ORDERS)
    assert_near_the_reference(case, ORDERS)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("tokens_per_cluster", "segment", "extent"),
    [
        pytest.param(8, 0, 256, id="sinks"),
        pytest.param(8, 1, 512, id="64-clusters"),
        pytest.param(16, 1, 4096, id="256-clusters"),
        pytest.param(16, 1, 496, id="31-clusters"),
        pytest.param(16, 1, 240, id="a-stratum-longer-than-a-tile"),
        pytest.param(16, 1, 100, id="too-few-clusters-for-far-seeds"),
    ],
)
def test_seeds_are_the_references(tokens_per_cluster, segment, extent):
    """Of small whole numbers: distances, and their many ties, are exact in whatever order added."""
    case = make_clustering_case(
        num_layers=1,
        segment_size=4096,
        tokens_per_cluster=tokens_per_cluster,
        num_lloyd_iters=0,
        num_rows=1,
        num_places=1,
    )
    geometry = case.geometry
    orders = make_orders([(0, segment, extent, 0)], case.req_to_token.device)
    batch = ClusteringBatch(
        geometry,
        orders,
        case.clustering.layer_table,
        case.req_to_token,
        range(1),
        geometry.block_clusters(extent, segment),
    )
    num_tokens = len(case.tokens(0, segment, extent)[0])
    clusters = num_clusters(case, num_tokens)
    generator = torch.Generator().manual_seed(extent)
    features = torch.randint(-1, 2, (batch.num_units, num_tokens, 8), generator=generator)
    features = features.float().to(orders.device)
    batch.features.zero_()[:, :num_tokens, :8] = features
    kmeans(batch)
    seeds = reference.rows_at(features, reference.seed_tokens(features, clusters, segment))
    assert torch.equal(batch.centroids[:, :clusters, :8].float(), seeds)
    ids = reference.assign(features, seeds)
    assert torch.equal(batch.cluster_ids[:, :num_tokens].long(), ids)


@pytest.mark.kernel
def test_the_size_cap_holds_and_every_token_is_in_one_cluster():
    case = make_clustering_case(num_layers=1, max_cluster_size=16)
    # a third of the tokens are all but equal
    case.keys[0][::3] = case.keys[0][:1] + 1e-2 * case.keys[0][::3]
    case.clustering.cluster(ORDERS)
    for order in ORDERS:
        ids = case.cluster_ids(0, *order)
        clusters = num_clusters(case, ids.shape[1])
        assert ((ids >= 0) & (ids < clusters)).all()
        assert reference.cluster_sizes(ids, clusters).max() <= 16
        features, expected = reference_ids(case, 0, order)
        distance = squared_distance(features, ids, clusters)
        assert distance.sum() <= 1.02 * squared_distance(features, expected, clusters).sum()
        members = case.pool.members[0, order[3]].long()
        begin = case.pool.member_begin[0, order[3]].long()
        sizes = case.pool.cluster_sizes[0, order[3]].long()
        assert torch.equal(begin, sizes.cumsum(-1) - sizes)
        for head in range(case.geometry.num_kv_heads):
            for first, size in zip(begin[head].tolist(), sizes[head].tolist(), strict=True):
                run = members[head, first : first + size]
                assert torch.equal(run, run.sort().values), "members are not in order of position"


@pytest.mark.kernel
def test_a_segment_is_the_same_bits_in_whatever_company():
    """Another rank, another request or another batch of orders must find the same clusters."""
    together = make_clustering_case(centroid_dtype=torch.int8, num_kv_heads=1)
    alone = make_clustering_case(centroid_dtype=torch.int8, num_kv_heads=1)
    together.clustering.cluster(ORDERS)
    for order in reversed(ORDERS):
        alone.clustering.cluster([order])
    for order in ORDERS:
        assert_same_payload(together, alone, order)


@pytest.mark.kernel
def test_a_segment_is_the_same_bits_in_slices():
    """A slice finds in memory what the one before has left, and nothing else."""
    orders = [(0, 0, 96, 3), (1, 3, 64, 7)]
    at_once, sliced = (
        make_clustering_case(centroid_dtype=torch.int8, num_layers=3) for _ in range(2)
    )
    at_once.clustering.cluster(orders)
    running = [sliced.clustering.slices(order) for order in orders]
    # by turns, so that each finds the others' slices between its own
    for _ in range(sliced.clustering.num_slices()):
        for slices in running:
            next(slices)
    assert all(next(slices, "ended") == "ended" for slices in running)
    for order in orders:
        assert_same_payload(at_once, sliced, order)


@pytest.mark.kernel
def test_unused_clusters_of_an_open_segment_are_empty():
    case = make_clustering_case(num_layers=1)
    case.clustering.cluster([(1, 1, 96, 4)])
    assert (case.pool.cluster_sizes[0, 4, :, 12:] == 0).all()


@pytest.mark.kernel
def test_equal_keys_have_no_variance_to_spread():
    case = make_clustering_case(num_layers=1, layers_without_rope=(0,), rotary_half=0)
    case.keys[0][:] = case.keys[0][:1]
    case.clustering.cluster([(0, 1, 256, 2)])
    assert (case.pool.pair_weight[0, 2] == 1).all()
    used = case.pool.cluster_sizes[0, 2] > 0
    assert (case.pool.key_variance[0, 2][used] == 0).all()


@pytest.mark.kernel
def test_more_clusters_than_sums_fit_take_several_passes(monkeypatch):
    monkeypatch.setattr("multipole_kernels.kmeans._MAX_SUMS", 16 * 64)
    case = make_clustering_case(num_layers=1)
    case.clustering.cluster(ORDERS[1:])
    assert_near_the_reference(case, ORDERS[1:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("segment_size", "head_dim"), [(2048, 128), (4096, 128), (2048, 256), (2048, 64)]
)
def test_matches_the_reference_at_real_sizes(segment_size, head_dim):
    case = make_clustering_case(
        num_kv_heads=4,
        head_dim=head_dim,
        segment_size=segment_size,
        tokens_per_cluster=16,
        max_cluster_size=128,
        centroid_dtype=torch.int8,
    )
    orders = [
        (0, 0, segment_size, 3),
        (1, 2, segment_size, 5),
        (1, 3, segment_size // 2, 7),
        (0, 3, 384, 2),
    ]
    case.clustering.cluster(orders)
    for layer, order in itertools.product(range(len(case.keys)), orders):
        ids = case.cluster_ids(layer, *order)
        assert reference.cluster_sizes(ids, num_clusters(case, ids.shape[1])).max() <= 128
    assert_near_the_reference(case, orders)


def test_shapes_that_the_kernels_do_not_take_are_told():
    def geometry(head_dim: int, segment_size: int) -> ClusteringGeometry:
        return ClusteringGeometry(8, head_dim, 32, torch.bfloat16, segment_size, 10, 16, 128, 4)

    assert supports(geometry(128, 4096), 256)
    assert supports(geometry(256, 2048), 128)
    assert not supports(geometry(256, 4096), 256)
    assert not supports(geometry(128, 8192), 512)
