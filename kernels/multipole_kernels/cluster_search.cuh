// The end of a selection: the order number from which on clusters do not fit the budget.
//
// Tokens are counted by bins of the order numbers. In the bin that passes the budget each cluster
// counts the tokens before it; a bin with too many clusters (ties) is cut into bins in its turn.

#pragma once

#include "cluster_rank.cuh"

// shared.bin: the first bin at which more than budget tokens are counted, BINS if there is none;
// shared.tokens_before: tokens counted before it, tokens_before at the first.
__device__ void find_bin(Shared& shared, u32 tokens_before, u32 budget) {
  constexpr int PER_THREAD = BINS / THREADS;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  u32 counts[PER_THREAD], sum = 0;
#pragma unroll
  for (int nth = 0; nth < PER_THREAD / 4; ++nth) {
    const uint4 four =
        reinterpret_cast<const uint4*>(shared.histogram)[thread * (PER_THREAD / 4) + nth];
    counts[4 * nth] = four.x;
    counts[4 * nth + 1] = four.y;
    counts[4 * nth + 2] = four.z;
    counts[4 * nth + 3] = four.w;
    sum += four.x + four.y + four.z + four.w;
  }
  const u32 inclusive = inclusive_warp_sum(sum, lane);
  if (lane == 31) shared.warp_tokens[warp] = inclusive;
  if (thread == 0) {
    shared.bin = BINS;
    shared.num_candidates = 0;
  }
  __syncthreads();
  u32 before = tokens_before + inclusive - sum;
  before += warp_sum(lane < warp ? shared.warp_tokens[lane] : 0);
  if (before <= budget && before + sum > budget) {
    int nth = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD - 1; ++i) {
      if (nth == i && before + counts[i] <= budget) {
        before += counts[i];
        ++nth;
      }
    }
    shared.bin = thread * PER_THREAD + nth;
    shared.tokens_before = before;
  } else if (thread == THREADS - 1 && before + sum <= budget) {
    shared.tokens_before = before + sum;
  }
  __syncthreads();
}

// A limit between order numbers; what lies below it comes first.
struct Limit {
  u32 rank, cluster;
  __device__ __forceinline__ explicit Limit(u64 order) : rank(order >> 32), cluster(order) {}
  __device__ __forceinline__ bool is_above(u32 of_rank, u32 of_cluster) const {
    return of_rank < rank || (of_rank == rank && of_cluster < cluster);
  }
};

// Which of a vector's clusters lie below a limit: a bit each.
__device__ __forceinline__ u32 bits_below(const Limit& limit, const uint4& ranks, int vector) {
  const u32 cluster = vector * VECTOR;
  return limit.is_above(ranks.x, cluster) | limit.is_above(ranks.y, cluster + 1) << 1 |
         limit.is_above(ranks.z, cluster + 2) << 2 | limit.is_above(ranks.w, cluster + 3) << 3;
}

__device__ __forceinline__ u32 tokens_of(u32 bits, const Sizes& sizes) {
  u32 tokens = 0;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) tokens += bits >> i & 1 ? sizes[i] : 0;
  return tokens;
}

// Count each warp's clusters below `low` and their tokens, and collect those from low up to `high`.
template <bool RESIDENT>
__device__ void count_and_collect(const RowHead<RESIDENT>& row, Shared& shared, u64 low, u64 high) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Limit low_limit(low), high_limit(high);
  const int begin = warp * row.warp_vectors();
  const int end = min(begin + row.warp_vectors(), row.num_vectors);
  u32 clusters = 0, tokens = 0;
#pragma unroll 1
  for (int vector = begin + lane; vector < end; vector += 32) {
    const uint4 ranks = row.ranks_of(vector);
    const u32 below_high = bits_below(high_limit, ranks, vector);
    if (below_high == 0) continue;
    const Sizes sizes = row.sizes_of(vector);
    const u32 below_low = bits_below(low_limit, ranks, vector);
    clusters += __popc(below_low);
    tokens += tokens_of(below_low, sizes);
#pragma unroll 1
    for (u32 bits = below_high & ~below_low; bits; bits &= bits - 1) {
      const int i = __ffs(bits) - 1;
      const u32 nth = atomicAdd(&shared.num_candidates, 1);
      if (nth < MAX_CANDIDATES) {
        const u32 cluster = vector * VECTOR + i;
        shared.candidates[nth] = Candidate{(u64)row.ranks[cluster] << 32 | cluster, sizes[i]};
      }
    }
  }
  clusters = warp_sum(clusters);
  tokens = warp_sum(tokens);
  if (lane == 0) {
    shared.warp_clusters[warp] = clusters;
    shared.warp_tokens[warp] = tokens;
  }
}

// Steps 2 and 3: the end of the selection in a row that has more tokens than the budget.
//
// Leaves in shared.warp_clusters and shared.warp_tokens what each warp's clusters select.
template <bool RESIDENT>
__device__ u64 find_end(const RowHead<RESIDENT>& row, Shared& shared, u32 budget) {
  const int thread = threadIdx.x;
  u64 low = 0;
  int shift = FIRST_SHIFT;
  u32 tokens_before = 0;
  while (true) {
    find_bin(shared, tokens_before, budget);
    tokens_before = shared.tokens_before;
    low += (u64)shared.bin << shift;
    if (shared.bin < BINS) {
      count_and_collect(row, shared, low, low + (1ull << shift));
      __syncthreads();
      if (shared.num_candidates <= MAX_CANDIDATES) break;
      shift -= BIN_BITS;
    }
    clear_histogram(shared);
    __syncthreads();
    for (u32 cluster = thread; cluster < row.num_vectors * VECTOR; cluster += THREADS) {
      const u64 order = (u64)row.ranks[cluster] << 32 | cluster;
      if (order >= low && (order - low) >> shift < BINS)
        atomicAdd(&shared.histogram[(order - low) >> shift], row.size(cluster));
    }
    __syncthreads();
  }

  const u32 num_candidates = shared.num_candidates;
  const u32 nth = thread / CANDIDATE_THREADS;
  const Candidate mine = nth < num_candidates ? shared.candidates[nth] : Candidate{0, 0};
  u32 before = 0;
#pragma unroll 4
  for (u32 other = thread % CANDIDATE_THREADS; other < num_candidates; other += CANDIDATE_THREADS) {
    const Candidate candidate = shared.candidates[other];
    before += candidate.order < mine.order ? candidate.size : 0;
  }
#pragma unroll
  for (int distance = 1; distance < CANDIDATE_THREADS; distance *= 2)
    before += __shfl_xor_sync(FULL_WARP, before, distance);
  before += tokens_before;
  // the best is taken whatever its size, unless the budget is 0
  const bool fits = before + mine.size <= budget || (before == 0 && budget > 0);
  if (nth < num_candidates && thread % CANDIDATE_THREADS == 0 && fits) {
    atomicMax(&shared.end, mine.order + 1);
    const int warp = (u32)mine.order / VECTOR / row.warp_vectors();
    atomicAdd(&shared.warp_clusters[warp], 1);
    atomicAdd(&shared.warp_tokens[warp], mine.size);
  }
  __syncthreads();
  return max(shared.end, low);
}
