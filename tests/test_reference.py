"""The reference keeps its promises: every token once, exact at full budget, mean at none."""

from __future__ import annotations

import pytest
import torch

from multipole_kernels import reference

HEADS, GROUP, DIM = 2, 3, 16
SCALE = DIM**-0.5


def make_request(num_tokens: int, num_clusters: int, seed: int = 0, num_sinks: int = 3):
    """q, keys, values and clusters of one request with sinks in no cluster."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS * GROUP, DIM, generator=generator)
    keys = torch.randn(num_tokens, HEADS, DIM, generator=generator)
    values = torch.randn(num_tokens, HEADS, DIM, generator=generator)
    clustered_keys = keys[num_sinks:].transpose(0, 1)
    clustered_values = values[num_sinks:].transpose(0, 1)
    ids = reference.cluster_segment(clustered_keys, num_clusters, 32, 4, 0)
    all_ids = torch.cat([torch.full((HEADS, num_sinks), -1), ids], dim=-1)
    return q, keys, values, all_ids, *summarize(clustered_keys, clustered_values, ids, num_clusters)


def summarize(keys, values, ids, num_clusters: int):
    """The summary of one segment, with its pair weight repeated for each cluster."""
    *summary, pair_weight = reference.summarize_clusters(keys, values, ids, num_clusters)
    return *summary, pair_weight.unsqueeze(1).expand(-1, num_clusters, -1)


def dense(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    grouped = q.view(HEADS, GROUP, DIM)
    weight = (grouped @ keys.transpose(0, 1).mT * SCALE).softmax(-1)
    return (weight @ values.transpose(0, 1)).reshape(q.shape)


def attend(request, token_budget: int, max_logit_variance: float = 1.0):
    return reference.multipole_attention(*request, token_budget, SCALE, max_logit_variance)


def test_a_budget_of_all_tokens_equals_dense_attention():
    request = make_request(200, 12)
    out, lse, _ = attend(request, 200)
    torch.testing.assert_close(out, dense(*request[:3]))
    grouped = request[0].view(HEADS, GROUP, DIM)
    scores = grouped @ request[1].transpose(0, 1).mT * SCALE
    torch.testing.assert_close(lse, scores.logsumexp(-1).flatten())


def test_no_budget_equals_pure_centroid_attention():
    request = make_request(200, 12, num_sinks=0)
    out, _, selected = attend(request, 0, max_logit_variance=0.0)
    assert not selected.any()
    q, _, _, _, key_centroids, value_centroids, sizes, *_ = request
    grouped = q.view(HEADS, GROUP, DIM)
    weight = sizes[:, None] * (grouped @ key_centroids.mT * SCALE).exp()
    expected = (weight @ value_centroids) / weight.sum(-1, keepdim=True)
    torch.testing.assert_close(out, expected.reshape(q.shape))


@pytest.mark.parametrize("token_budget", [0, 1, 20, 64, 150, 199])
def test_every_token_is_counted_exactly_once(token_budget):
    """Equal keys give equal weights, so values of 1 and of the position give their means."""
    request = list(make_request(200, 12))
    keys = request[1] = torch.ones_like(request[1])
    position = torch.arange(200.0)
    values = request[2] = torch.stack([torch.ones(200), position], -1)[:, None].expand(
        -1, HEADS, -1
    )
    values = request[2] = torch.nn.functional.pad(values, (0, DIM - 2))
    ids = request[3][:, 3:]
    request[4:] = summarize(keys[3:].transpose(0, 1), values[3:].transpose(0, 1), ids, 12)
    out, lse, _ = attend(request, token_budget)
    torch.testing.assert_close(out[:, 0], torch.ones(HEADS * GROUP))
    torch.testing.assert_close(out[:, 1], torch.full((HEADS * GROUP,), position.mean().item()))
    mass = lse - (request[0] * SCALE).sum(-1)
    torch.testing.assert_close(mass.exp(), torch.full((HEADS * GROUP,), 200.0), rtol=1e-4, atol=0)


def test_the_budget_is_kept_by_whole_clusters():
    request = make_request(400, 25)
    sizes = request[6]
    for token_budget in (16, 50, 100, 300):
        _, _, selected = attend(request, token_budget)
        taken = (sizes * selected).sum(-1)
        # the best cluster is always taken, even if it is larger than the budget
        assert ((taken <= token_budget) | (selected.sum(-1) == 1)).all()
        assert (selected.sum(-1) >= 1).all()


def test_selection_takes_clusters_in_order_and_stops_at_the_first_that_does_not_fit():
    scores = torch.tensor([[[5.0, 4.0, 3.0, 2.0]]])
    sizes = torch.tensor([[4, 8, 100, 2]], dtype=torch.int32)
    tail = scores + sizes.float().log()
    empty = torch.full((1, 1), float("-inf"))
    for budget, expected in [
        (0, []),
        (1, [0]),
        (12, [0, 1]),
        (20, [0, 1]),  # the third does not fit, so the fourth is not tried
        (114, [0, 1, 2, 3]),
    ]:
        selected = reference.cluster_selection(scores, tail, empty, sizes, budget)
        assert selected[0].nonzero().flatten().tolist() == expected, budget


def test_ties_take_the_lower_index_and_empty_clusters_are_never_taken():
    scores = torch.zeros(1, 1, 4)
    sizes = torch.tensor([[0, 5, 5, 5]], dtype=torch.int32)
    tail = scores + sizes.float().log()
    selected = reference.cluster_selection(scores, tail, torch.zeros(1, 1), sizes, 10)
    assert selected[0].tolist() == [False, True, True, False]


def test_what_is_always_exact_decides_between_query_heads():
    """A query head whose mass lies in the recent tokens has little say in the selection."""
    scores = torch.tensor([[[2.0, 0.0], [0.0, 1.9]]])
    sizes = torch.tensor([[4, 4]], dtype=torch.int32)
    tail = scores + sizes.float().log()
    nothing = torch.full((1, 2), float("-inf"))
    first_is_busy = torch.tensor([[9.0, float("-inf")]])
    take = lambda lse: reference.cluster_selection(scores, tail, lse, sizes, 4)[0].tolist()  # noqa: E731
    assert take(nothing) == [True, False]
    assert take(first_is_busy) == [False, True]


@pytest.mark.parametrize("skew", [1.0, 0.01], ids=["even", "one-dense-spot"])
@pytest.mark.parametrize(
    ("num_tokens", "num_clusters"), [(1024, 64), (1014, 64), (118, 8), (128, 8)]
)
def test_clusters_hold_each_token_once_and_keep_the_size_cap(num_tokens, num_clusters, skew):
    features = torch.randn(2, 3, num_tokens, DIM, generator=torch.Generator().manual_seed(1))
    features[:, :, : num_tokens // 2] *= skew
    ids = reference.cluster_segment(features, num_clusters, 64, 4, 5)
    sizes = reference.cluster_sizes(ids, num_clusters)
    assert (sizes.sum(-1) == num_tokens).all()
    assert ((ids >= 0) & (ids < num_clusters)).all()
    assert sizes.max() <= 64


def test_counts_above_256_stay_whole_numbers():
    """bf16 cannot hold 257, which is where an implementation that counts in it goes wrong."""
    ids = torch.zeros(1, 777, dtype=torch.int64)
    assert reference.cluster_sizes(ids, 2).tolist() == [[777, 0]]


def test_one_more_lloyd_iteration_does_not_raise_the_distance():
    features = torch.randn(4, 512, DIM, generator=torch.Generator().manual_seed(2))

    def distance(num_lloyd_iters: int) -> float:
        ids = reference.cluster_segment(features, 32, 512 // 16, num_lloyd_iters, 0)
        means = reference.cluster_means(features, ids, 32).nan_to_num(0.0)
        members = means.gather(-2, ids.unsqueeze(-1).expand(features.shape))
        return (features - members).square().sum().item()

    # without the size cap in the way, which Lloyd's argument does not know
    distances = [distance(n) for n in range(5)]
    assert distances[4] < 0.95 * distances[0]
    assert all(b <= a * 1.02 for a, b in zip(distances, distances[1:], strict=False))


def test_clustering_is_a_function_of_the_tokens_and_their_place():
    features = torch.randn(2, 256, DIM, generator=torch.Generator().manual_seed(3))
    again = reference.cluster_segment(features.clone(), 16, 64, 4, 7)
    torch.manual_seed(99)
    torch.testing.assert_close(reference.cluster_segment(features, 16, 64, 4, 7), again)
    elsewhere = reference.cluster_segment(features, 16, 64, 4, 8)
    assert (elsewhere != again).any()


def test_distances_survive_keys_of_large_norm():
    """Keys of norm over 180 overflow half-precision squares; a common offset must not matter."""
    features = torch.randn(1, 256, DIM, generator=torch.Generator().manual_seed(4))
    near = reference.cluster_segment(features, 16, 64, 4, 0)
    far = reference.cluster_segment(features + 512.0, 16, 64, 4, 0)
    assert (near == far).float().mean() > 0.99


def test_unrotate_undoes_rope_and_its_scale():
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(2, 50, DIM, generator=generator)
    angle = torch.arange(50.0)[:, None] * 10000.0 ** -(torch.arange(6.0) / 6)
    for yarn_scale in (1.0, 1.13):
        cos, sin = angle.cos() * yarn_scale, angle.sin() * yarn_scale
        x, y, rest = keys[..., :6], keys[..., 6:12], keys[..., 12:]
        rotated = torch.cat([x * cos - y * sin, y * cos + x * sin, rest], -1)
        torch.testing.assert_close(reference.unrotate(rotated, cos, sin), keys)


def test_seeds_are_distinct_and_one_a_stratum():
    for num_tokens, num_clusters in [(1024, 64), (1014, 64), (118, 8), (64, 64)]:
        seeds = reference.seed_positions(num_tokens, num_clusters, 3)
        bounds = torch.arange(num_clusters + 1) * num_tokens // num_clusters
        assert ((bounds[:-1] <= seeds) & (seeds < bounds[1:])).all()


def test_far_seeds_find_the_content_that_no_placed_seed_hit():
    num_tokens, num_clusters = 512, 32
    num_placed = num_clusters * 5 // 8
    rare = [37, 201, 470]
    features = 0.01 * torch.randn(2, num_tokens, 8, generator=torch.Generator().manual_seed(0))
    for i, token in enumerate(rare):
        features[:, token, i] = 10.0
    placed = reference.seed_positions(num_tokens, num_placed, 0)
    assert not set(rare) & set(placed.tolist())

    seeds = reference.seed_tokens(features, num_clusters, 0)
    for head in seeds.tolist():
        assert head[:num_placed] == placed.tolist()
        assert set(rare) <= set(head[num_placed : num_placed + 4])
        assert len(set(head)) == num_clusters


@pytest.mark.parametrize(("num_tokens", "num_clusters"), [(1024, 64), (246, 15), (118, 8)])
def test_each_round_takes_the_worst_covered_token_of_each_stratum(num_tokens, num_clusters):
    features = torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(9))
    seeds = reference.seed_tokens(features, num_clusters, 3)
    per_round = num_clusters // 8
    num_placed = num_clusters - 3 * per_round
    assert torch.equal(seeds[:num_placed], reference.seed_positions(num_tokens, num_placed, 3))
    bounds = torch.arange(per_round + 1) * num_tokens // per_round
    for nth in range(3):
        so_far = num_placed + nth * per_round
        distance = torch.cdist(features, features[seeds[:so_far]]).amin(-1)
        for begin, end, seed in zip(bounds, bounds[1:], seeds[so_far:], strict=False):
            assert seed == begin + distance[begin:end].argmax()


def test_fewer_than_eight_clusters_have_placed_seeds():
    features = torch.randn(2, 100, DIM, generator=torch.Generator().manual_seed(10))
    segment_index = torch.tensor([1, 2])
    seeds = reference.seed_tokens(features, 7, segment_index)
    assert torch.equal(seeds, reference.seed_positions(100, 7, segment_index))


def test_the_farthest_token_of_a_stratum_is_the_first_of_equals():
    distance = torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0, 2.0, 2.0]])
    assert reference.farthest_per_stratum(distance, 2).tolist() == [[1, 5]]
    assert reference.farthest_per_stratum(distance, 3).tolist() == [[1, 2, 5]]


def test_the_second_order_term_brings_the_tail_nearer():
    """The mean of exp exceeds exp of the mean; the correction is judged against the true mass."""
    request = make_request(1000, 40, seed=6, num_sinks=0)
    truth = (request[0].view(HEADS, GROUP, DIM) @ request[1].transpose(0, 1).mT * SCALE).logsumexp(
        -1
    )
    _, without, _ = attend(request, 0, max_logit_variance=0.0)
    _, with_term, _ = attend(request, 0, max_logit_variance=1.0)
    error = lambda lse: (lse - truth.flatten()).abs().mean()  # noqa: E731
    assert (without <= truth.flatten() + 1e-4).all()
    assert error(with_term) < 0.5 * error(without)


def test_the_pair_weight_finds_the_dimensions_that_vary():
    """Keys that vary in one pair of dimensions only: the variance of the logits is the true one."""
    generator = torch.Generator().manual_seed(8)
    keys = torch.zeros(1, 500, DIM)
    keys[..., 2] = torch.randn(500, generator=generator)
    keys[..., 2 + DIM // 2] = keys[..., 2].flip(-1)
    ids = torch.zeros(1, 500, dtype=torch.int64)
    summary = reference.summarize_clusters(keys, keys, ids, 1)
    torch.testing.assert_close(summary.pair_weight.mean(-1), torch.ones(1))
    for axis, is_felt in [(2, True), (2 + DIM // 2, True), (3, False)]:
        q = torch.zeros(1, 1, DIM)
        q[..., axis] = 3.0
        variance = reference.logit_variance(
            q, summary.key_variance, summary.pair_weight.unsqueeze(1), SCALE
        )
        truth = (q @ keys.mT * SCALE).var(-1, correction=0, keepdim=True)
        assert (variance > 0.0).item() is is_felt
        torch.testing.assert_close(variance, truth, rtol=1e-4, atol=1e-6)


def test_equal_keys_have_an_even_pair_weight():
    summary = reference.summarize_clusters(
        torch.ones(1, 9, DIM), torch.ones(1, 9, DIM), torch.zeros(1, 9, dtype=torch.int64), 2
    )
    assert (summary.pair_weight == 1.0).all()
    assert not summary.key_variance.any()


@pytest.mark.parametrize(
    ("dtype", "largest_error"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 2**-4)]
)
def test_centroids_in_8_bits_are_near_what_they_were(dtype, largest_error):
    centroids = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(9))
    centroids[0, 3] = 0.0
    quantized, scale = reference.quantize_centroids(centroids, dtype)
    assert quantized.dtype == dtype
    assert quantized.float().abs().amax(-1).min() == 0.0
    error = (reference.dequantize_centroids(quantized, scale) - centroids).abs().amax(-1)
    assert (error <= largest_error * centroids.abs().amax(-1) * 1.0001).all()


def test_too_few_clusters_for_the_cap_are_refused():
    with pytest.raises(ValueError, match="1024 tokens need more than 16 clusters"):
        reference.cluster_segment(torch.zeros(1, 1024, DIM), 16, 64, 4, 0)


def test_a_request_without_clusters_is_dense():
    q, keys, values = make_request(50, 4)[:3]
    none = torch.zeros(HEADS, 0)
    out, _, selected = reference.multipole_attention(
        q,
        keys,
        values,
        torch.full((HEADS, 50), -1),
        torch.zeros(HEADS, 0, DIM),
        torch.zeros(HEADS, 0, DIM),
        none.int(),
        none,
        torch.zeros(HEADS, 0, DIM // 2),
        64,
        SCALE,
        1.0,
    )
    assert selected.shape == (HEADS, 0)
    torch.testing.assert_close(out, dense(q, keys, values))
