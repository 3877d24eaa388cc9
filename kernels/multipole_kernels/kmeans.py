"""k-means of each unit's features: seeds as reference.seed_tokens, then Lloyd iterations.

    id_t = argmax over k of x_t . c_k - |c_k|^2 / 2        (the nearest; a tie takes the first)
    c_k  = mean of the x_t with id_t = k                   (where it was, if it has none)

One program owns a unit, so that the sums are added up in one order, always. Features and centroids
are float16, products and sums float32. A sum is a product with a matrix of ones and zeros, exact in
float16; of the distances only a token's to its nearest seed is in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multipole_kernels import reference
from multipole_kernels.clustering_batch import (
    BLOCK_TOKENS,
    ClusteringBatch,
    ClusteringGeometry,
    load_order,
)

_HASH_0 = tl.constexpr(0x9E3779B9)
_HASH_1 = tl.constexpr(reference._HASH_1)
_HASH_2 = tl.constexpr(reference._HASH_2)
_FAR_ROUNDS = tl.constexpr(reference.FAR_ROUNDS)
_CLUSTERS_PER_FAR_SEED = tl.constexpr(reference.CLUSTERS_PER_FAR_SEED)

# fewest rows of a product's operand
_MIN_ROWS = tl.constexpr(16)
# tokens of each stratum that are compared at a time
_STRATUM_TOKENS = tl.constexpr(128)

# most numbers of the sums that are kept in registers beside the scores of a tile
_MAX_SUMS = 128 * 128


@triton.jit
def seed_positions(num_tokens, num_clusters, segment, BLOCK_CLUSTERS: tl.constexpr):
    """[BLOCK_CLUSTERS] int32, as reference.seed_positions; valid below num_clusters."""
    stratum = tl.arange(0, BLOCK_CLUSTERS)
    begin = stratum * num_tokens // num_clusters
    end = (stratum + 1) * num_tokens // num_clusters
    x = (stratum + 1).to(tl.uint32) + segment.to(tl.uint32) * _HASH_0
    x = (x ^ (x >> 16)) * _HASH_1
    x = (x ^ (x >> 15)) * _HASH_2
    x = x ^ (x >> 15)
    return begin + (x % tl.maximum(end - begin, 1).to(tl.uint32)).to(tl.int32)


@triton.jit
def half_square(centroids, is_candidate):
    """[K] float32, |c|^2 / 2 of centroids [K, D]; infinite for one that no token may take."""
    wide = centroids.to(tl.float32)
    return tl.where(is_candidate, 0.5 * tl.sum(wide * wide, 1), float("inf"))


@triton.jit
def nearest(features, centroids, half_squares):
    """[T] int32: each token's nearest centroid; features [T, D], centroids [K, D], fp16."""
    NUM_CLUSTERS: tl.constexpr = centroids.shape[0]
    score = tl.dot(features, tl.trans(centroids)) - half_squares[None, :]
    is_best = score == tl.max(score, 1)[:, None]
    ids = tl.where(is_best, tl.arange(0, NUM_CLUSTERS)[None, :], NUM_CLUSTERS)
    # features that are no numbers are near to nothing
    return tl.minimum(tl.min(ids, 1), NUM_CLUSTERS - 1)


@triton.jit
def load_centroids(centroids_ptr, first, end, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Centroids [ROWS, BLOCK_DIM] from `first` on and their half_square; none from `end` on."""
    row = first + tl.arange(0, ROWS)
    pointers = centroids_ptr + row[:, None] * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    centroids = tl.load(pointers, mask=row[:, None] < end, other=0.0)
    return centroids, half_square(centroids, row < end)


@triton.jit
def best_score(features, centroids, half_squares):
    """[T] float32, the largest x . c - |c|^2 / 2 of features [T, D] and centroids [K, D], fp16."""
    return tl.max(tl.dot(features, tl.trans(centroids)) - half_squares[None, :], 1)


@triton.jit
def half_length(features):
    """[T] float32, |x|^2 / 2 of features [T, D]."""
    wide = features.to(tl.float32)
    return 0.5 * tl.sum(wide * wide, 1)


@triton.jit
def farthest_per_stratum(distance_ptr, num_tokens, num_strata, BLOCK_STRATA: tl.constexpr):
    """[BLOCK_STRATA] int32, as reference.farthest_per_stratum; valid below num_strata."""
    stratum = tl.arange(0, BLOCK_STRATA)
    begin = stratum * num_tokens // num_strata
    end = tl.where(stratum < num_strata, (stratum + 1) * num_tokens // num_strata, begin)
    most = tl.full([BLOCK_STRATA], float("-inf"), tl.float32)
    farthest = begin
    longest = (num_tokens + num_strata - 1) // num_strata
    for offset in range(0, longest, _STRATUM_TOKENS):
        # [BLOCK_STRATA, _STRATUM_TOKENS]
        token = (begin + offset)[:, None] + tl.arange(0, _STRATUM_TOKENS)[None, :]
        is_inside = token < end[:, None]
        distance = tl.load(distance_ptr + token, mask=is_inside, other=float("-inf"))
        most_here = tl.max(distance, 1)
        # a distance that is no number equals nothing: its token is passed over
        is_most = is_inside & (distance == most_here[:, None])
        first = tl.min(tl.where(is_most, token, num_tokens), 1)
        is_farther = (most_here > most) & (first < num_tokens)
        farthest = tl.where(is_farther, first, farthest)
        most = tl.where(is_farther, most_here, most)
    return farthest


@triton.jit
def _store_far_seeds(
    features_ptr,
    centroids_ptr,
    distance_ptr,
    num_tokens,
    num_seeds,
    num_strata,
    BLOCK_STRATA: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Append the farthest token of each stratum to the num_seeds centroids there are."""
    # what other threads stored
    tl.debug_barrier()
    tokens = farthest_per_stratum(distance_ptr, num_tokens, num_strata, BLOCK_STRATA)
    stratum, offs_dim = tl.arange(0, BLOCK_STRATA), tl.arange(0, BLOCK_DIM)
    is_one = (stratum < num_strata)[:, None]
    seeds = tl.load(
        features_ptr + tokens[:, None] * BLOCK_DIM + offs_dim[None, :], mask=is_one, other=0.0
    )
    centroid_ptrs = centroids_ptr + (num_seeds + stratum)[:, None] * BLOCK_DIM + offs_dim[None, :]
    tl.store(centroid_ptrs, seeds, mask=is_one)
    tl.debug_barrier()


@triton.jit
def _find_far_seeds(
    features_ptr,
    centroids_ptr,
    distance_ptr,
    num_tokens,
    num_seeds,
    num_strata,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CLUSTERS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Append _FAR_ROUNDS times num_strata seeds to the num_seeds that are placed.

    A token's distance is kept as half its square. At most three quarters of BLOCK_CLUSTERS seeds
    are placed, so these are two products, and the rounds after them one narrow one each.
    """
    BLOCK_STRATA: tl.constexpr = max(BLOCK_CLUSTERS // _CLUSTERS_PER_FAR_SEED, _MIN_ROWS)
    HALF: tl.constexpr = BLOCK_CLUSTERS // 2
    QUARTER: tl.constexpr = max(BLOCK_CLUSTERS // 4, _MIN_ROWS)
    offs_token = tl.arange(0, BLOCK_TOKENS)
    feature_ptrs = features_ptr + offs_token[:, None] * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    # what other threads stored
    tl.debug_barrier()
    some, some_half = load_centroids(centroids_ptr, 0, num_seeds, HALF, BLOCK_DIM)
    others, others_half = load_centroids(centroids_ptr, HALF, num_seeds, QUARTER, BLOCK_DIM)
    for begin in tl.range(0, num_tokens, BLOCK_TOKENS, num_stages=NUM_STAGES):
        features = tl.load(feature_ptrs + begin * BLOCK_DIM)
        score = best_score(features, some, some_half)
        score = tl.maximum(score, best_score(features, others, others_half))
        tl.store(distance_ptr + begin + offs_token, half_length(features) - score)
    for _ in range(_FAR_ROUNDS - 1):
        _store_far_seeds(
            features_ptr,
            centroids_ptr,
            distance_ptr,
            num_tokens,
            num_seeds,
            num_strata,
            BLOCK_STRATA,
            BLOCK_DIM,
        )
        end = num_seeds + num_strata
        far, far_half = load_centroids(centroids_ptr, num_seeds, end, BLOCK_STRATA, BLOCK_DIM)
        for begin in tl.range(0, num_tokens, BLOCK_TOKENS, num_stages=NUM_STAGES):
            features = tl.load(feature_ptrs + begin * BLOCK_DIM)
            distance = half_length(features) - best_score(features, far, far_half)
            distance_ptrs = distance_ptr + begin + offs_token
            tl.store(distance_ptrs, tl.minimum(distance, tl.load(distance_ptrs)))
        num_seeds = end
    _store_far_seeds(
        features_ptr,
        centroids_ptr,
        distance_ptr,
        num_tokens,
        num_seeds,
        num_strata,
        BLOCK_STRATA,
        BLOCK_DIM,
    )


@triton.jit
def _assign(
    features_ptr,
    cluster_ids_ptr,
    centroids,
    half_squares,
    num_tokens,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Store the ids of a unit's tokens; those of the last tile's padding mean nothing."""
    offs_token = tl.arange(0, BLOCK_TOKENS)
    feature_ptrs = features_ptr + offs_token[:, None] * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    for begin in tl.range(0, num_tokens, BLOCK_TOKENS, num_stages=NUM_STAGES):
        ids = nearest(tl.load(feature_ptrs + begin * BLOCK_DIM), centroids, half_squares)
        tl.store(cluster_ids_ptr + begin + offs_token, ids.to(tl.int16))


@triton.jit
def _store_means(centroid_ptrs, sums, counts):
    """Move centroids [K, D] to the means; one without tokens stays where it was."""
    centroids = tl.load(centroid_ptrs)
    means = (sums / tl.maximum(counts, 1).to(tl.float32)[:, None]).to(tl.float16)
    centroids = tl.where(counts[:, None] > 0, means, centroids)
    # all have read before any writes
    tl.debug_barrier()
    tl.store(centroid_ptrs, centroids)


@triton.jit(do_not_specialize=["num_layers", "num_iters", "first_pass", "end_pass"])
def _kmeans_kernel(
    orders_ptr,
    features_ptr,  # [U, PADDED_TOKENS, BLOCK_DIM] fp16
    centroids_ptr,  # [U, BLOCK_CLUSTERS, BLOCK_DIM] fp16
    cluster_ids_ptr,  # [U, PADDED_TOKENS] int16
    distance_ptr,  # [U, PADDED_TOKENS] fp32
    num_layers,
    num_iters,
    first_pass,
    end_pass,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    TOKENS_PER_CLUSTER: tl.constexpr,
    PADDED_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CLUSTERS: tl.constexpr,
    SUM_CLUSTERS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program takes one unit, passes [first_pass, end_pass) of the seeds, iterations and ids.

    What goes from pass to pass is in memory, so that a launch may do some of them.

    If the sums of all clusters fit the registers beside the scores, an iteration goes once over
    the features; else ids are stored, and the sums of SUM_CLUSTERS clusters at a time go over them
    again each.
    """
    unit = tl.program_id(0).to(tl.int64)
    _, segment, _, _, num_tokens, num_clusters = load_order(
        orders_ptr, unit // NUM_KV_HEADS // num_layers, NUM_SINKS, TOKENS_PER_CLUSTER
    )
    offs_dim = tl.arange(0, BLOCK_DIM)
    offs_token = tl.arange(0, BLOCK_TOKENS)
    offs_cluster = tl.arange(0, BLOCK_CLUSTERS)
    is_cluster = offs_cluster < num_clusters
    features_ptr += unit * PADDED_TOKENS * BLOCK_DIM
    cluster_ids_ptr += unit * PADDED_TOKENS
    centroids_ptr += unit * BLOCK_CLUSTERS * BLOCK_DIM
    # [BLOCK_CLUSTERS, BLOCK_DIM]
    centroid_ptrs = centroids_ptr + offs_cluster[:, None] * BLOCK_DIM + offs_dim[None, :]
    if first_pass == 0:
        num_strata = num_clusters // _CLUSTERS_PER_FAR_SEED
        num_placed = num_clusters - _FAR_ROUNDS * num_strata
        seeds = seed_positions(num_tokens, num_placed, segment, BLOCK_CLUSTERS)
        centroids = tl.load(
            features_ptr + seeds[:, None] * BLOCK_DIM + offs_dim[None, :],
            mask=(offs_cluster < num_placed)[:, None],
            other=0.0,
        )
        tl.store(centroid_ptrs, centroids)
        if num_strata > 0:
            _find_far_seeds(
                features_ptr,
                centroids_ptr,
                distance_ptr + unit * PADDED_TOKENS,
                num_tokens,
                num_placed,
                num_strata,
                BLOCK_TOKENS,
                BLOCK_CLUSTERS,
                BLOCK_DIM,
                NUM_STAGES,
            )
    # [BLOCK_TOKENS, BLOCK_DIM]
    feature_ptrs = features_ptr + offs_token[:, None] * BLOCK_DIM + offs_dim[None, :]
    for _ in range(tl.maximum(first_pass, 1), tl.minimum(end_pass, num_iters + 1)):
        # what other threads stored
        tl.debug_barrier()
        centroids = tl.load(centroid_ptrs)
        half_squares = half_square(centroids, is_cluster)
        if SUM_CLUSTERS == BLOCK_CLUSTERS:
            # transposed, so that is_member has the scores' layout, which is stored by wide stores
            sums = tl.zeros([BLOCK_DIM, BLOCK_CLUSTERS], tl.float32)
            counts = tl.zeros([BLOCK_CLUSTERS], tl.int32)
            for begin in tl.range(0, num_tokens, BLOCK_TOKENS, num_stages=NUM_STAGES):
                features = tl.load(feature_ptrs + begin * BLOCK_DIM)
                ids = nearest(features, centroids, half_squares)
                # [BLOCK_TOKENS, BLOCK_CLUSTERS]; features that are no token's are 0
                is_member = ids[:, None] == offs_cluster[None, :]
                sums = tl.dot(tl.trans(features), is_member.to(tl.float16), sums)
                is_token = begin + offs_token < num_tokens
                counts += tl.histogram(ids, BLOCK_CLUSTERS, mask=is_token)
            # the centroids are read again rather than kept: registers are short in the loop
            tl.debug_barrier()
            _store_means(centroid_ptrs, tl.trans(sums), counts)
        else:
            _assign(
                features_ptr,
                cluster_ids_ptr,
                centroids,
                half_squares,
                num_tokens,
                BLOCK_TOKENS,
                BLOCK_DIM,
                NUM_STAGES,
            )
            tl.debug_barrier()
            for first in range(0, BLOCK_CLUSTERS, SUM_CLUSTERS):
                offs_sum = tl.arange(0, SUM_CLUSTERS)
                sums = tl.zeros([SUM_CLUSTERS, BLOCK_DIM], tl.float32)
                counts = tl.zeros([SUM_CLUSTERS], tl.int32)
                for begin in tl.range(0, num_tokens, BLOCK_TOKENS, num_stages=NUM_STAGES):
                    features = tl.load(feature_ptrs + begin * BLOCK_DIM)
                    ids = tl.load(cluster_ids_ptr + begin + offs_token).to(tl.int32) - first
                    is_token = begin + offs_token < num_tokens
                    # [SUM_CLUSTERS, BLOCK_TOKENS]
                    is_member = ids[None, :] == offs_sum[:, None]
                    sums = tl.dot(is_member.to(tl.float16), features, sums)
                    is_one_of_these = is_token & (ids >= 0) & (ids < SUM_CLUSTERS)
                    counts += tl.histogram(ids, SUM_CLUSTERS, mask=is_one_of_these)
                sum_ptrs = centroids_ptr + (first + offs_sum[:, None]) * BLOCK_DIM
                _store_means(sum_ptrs + offs_dim[None, :], sums, counts)
    if end_pass > num_iters + 1:
        tl.debug_barrier()
        centroids = tl.load(centroid_ptrs)
        _assign(
            features_ptr,
            cluster_ids_ptr,
            centroids,
            half_square(centroids, is_cluster),
            num_tokens,
            BLOCK_TOKENS,
            BLOCK_DIM,
            NUM_STAGES,
        )


def num_passes(geometry: ClusteringGeometry) -> int:
    """Into so many launches k-means can be divided: the seeds, its iterations, and the ids."""
    return geometry.num_lloyd_iters + 2


def kmeans(batch: ClusteringBatch, passes: range | None = None) -> None:
    """Fill batch.centroids [U, K, D] and batch.cluster_ids [U, T] from batch.features.

    passes: some of range(num_passes), in order of launch; by default all in one.
    """
    passes = passes or range(num_passes(batch.geometry))
    geometry, clusters = batch.geometry, batch.block_clusters
    sum_clusters = min(clusters, _MAX_SUMS // geometry.block_dim)
    has_small_tiles = geometry.block_dim > 128 or sum_clusters < clusters
    _kmeans_kernel[(batch.num_units,)](
        features_ptr=batch.features,
        centroids_ptr=batch.centroids,
        cluster_ids_ptr=batch.cluster_ids,
        distance_ptr=batch.seed_distance,
        num_iters=geometry.num_lloyd_iters,
        first_pass=passes.start,
        end_pass=passes.stop,
        PADDED_TOKENS=batch.padded_tokens,
        BLOCK_TOKENS=BLOCK_TOKENS // 2 if has_small_tiles else BLOCK_TOKENS,
        BLOCK_CLUSTERS=clusters,
        SUM_CLUSTERS=sum_clusters,
        BLOCK_DIM=geometry.block_dim,
        NUM_STAGES=3 if geometry.block_dim <= 128 else 2,
        num_warps=8,
        **batch.order_arguments(),
    )
