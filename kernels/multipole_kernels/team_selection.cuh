// The selection of a row's best clusters by a team: the order number from which on none is taken.
//
// Each block counts the tokens of its clusters by bins of their order numbers and tells all the
// others; every block then finds the bin that passes the budget. The clusters in it, the candidates,
// are told to all, and each counts the tokens before it. A bin with too many (ties) is cut into bins
// in its turn, in the end by the cluster's number.

#pragma once

#include "team_scores.cuh"

__device__ __forceinline__ void clear_histogram(Shared& shared) {
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.histogram[bin] = 0;
}

// Ranks of the block's clusters and their histogram; scores become weights 2^(tail - tail_max).
__device__ void rank_clusters(const Share& share) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Shared& shared = share.shared;
  const u32 begin = warp * share.warp_clusters();
  const u32 end = min(begin + share.warp_clusters(), share.num_clusters);
  OfHeads lse, tail_max;
  lse.load(shared.lse_log2);
  tail_max.load(shared.tail_max);
#pragma unroll 1
  for (u32 cluster = begin + lane; cluster < end; cluster += 32) {
    const ClusterEntry entry = share.entry(cluster);
    const AboveScore above(share, entry);
    const u32 size = entry.size();
    const OfHeads spread = share.spread_of(cluster);
    OfHeads scores = share.scores_of(cluster);
    float rank = 0.0f;
#pragma unroll
    for (int group = 0; group < GROUP; ++group) {
      const float score = scores.head[group];
      rank += power_of_2(score - lse.head[group]);
      scores.head[group] = power_of_2(score + above(spread.head[group]) -
                                      finite_or_zero(tail_max.head[group]));
    }
    // ranks are not negative: their bits are ordered as they are
    const u32 distance = RANK_BITS_TOP - min(__float_as_uint(rank), RANK_BITS_TOP);
    const u32 bin = distance >> (FIRST_SHIFT - 32);
    if (size > 0 && bin < BINS) atomicAdd(&shared.histogram[bin], size);
    share.set_rank(cluster, size > 0 ? distance : EMPTY);
    share.set_scores(cluster, scores);
  }
}

// Tell all blocks the histogram; a count that 16 bits cannot hold passes every budget.
__device__ __forceinline__ void tell_histogram(const Share& share) {
  Shared& shared = share.shared;
#pragma unroll 1
  for (int nth = threadIdx.x; nth < TEAM * (BINS / 8); nth += THREADS) {
    const int to = nth / (BINS / 8), eight = nth % (BINS / 8);
    const uint4 low = reinterpret_cast<const uint4*>(shared.histogram)[2 * eight];
    const uint4 high = reinterpret_cast<const uint4*>(shared.histogram)[2 * eight + 1];
    const auto pack = [](u32 x, u32 y) { return min(x, 0xffffu) | min(y, 0xffffu) << 16; };
    tell(Remote(shared, &shared.bins[share.block][8 * eight], HISTOGRAM, to),
         uint4{pack(low.x, low.y), pack(low.z, low.w), pack(high.x, high.y),
               pack(high.z, high.w)});
  }
}

// shared.bin: the first bin at which more than budget tokens are counted, BINS if there is none;
// shared.tokens_before: tokens counted before it, tokens_before at the first.
__device__ void find_bin(Shared& shared, u32 tokens_before, u32 budget) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  u32 sum = 0;
  if (thread < BINS) {
#pragma unroll
    for (int block = 0; block < TEAM; ++block) sum += shared.bins[block][thread];
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
    shared.bin = thread;
    shared.tokens_before = before;
  } else if (thread == THREADS - 1 && before + sum <= budget) {
    shared.tokens_before = before + sum;
  }
  __syncthreads();
}

__device__ __forceinline__ void clear_candidates(Shared& shared) {
#pragma unroll 1
  for (int nth = threadIdx.x; nth < CANDIDATES * TEAM; nth += THREADS)
    reinterpret_cast<uint4*>(shared.candidates)[nth] = uint4{EMPTY, EMPTY, 0, 0},
    shared.accepted_to[nth] = 0;
}

// Count each warp's clusters below `low` and their tokens; tell all blocks those from low up to high.
//
// parity: of how often it has been called before.
__device__ void count_and_tell(const Share& share, u64 low, u64 high, u32 parity) {
  Shared& shared = share.shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 begin = warp * share.warp_clusters();
  const u32 end = min(begin + share.warp_clusters(), share.num_clusters);
  u32 clusters = 0, tokens = 0;
#pragma unroll 1
  for (u32 cluster = begin + lane; cluster < end; cluster += 32) {
    const u64 order = share.order(cluster);
    if (order >= high) continue;
    const u32 size = share.entry(cluster).size();
    if (order < low) {
      ++clusters;
      tokens += size;
    } else {
      const u32 nth = atomicAdd(&shared.num_candidates, 1);
      if (nth < CANDIDATES) shared.own_candidates[nth] = Candidate{order, size, 0};
    }
  }
  clusters = warp_sum(clusters);
  tokens = warp_sum(tokens);
  if (lane == 0) {
    shared.warp_clusters[warp] = clusters;
    shared.warp_tokens[warp] = tokens;
  }
  __syncthreads();
  const u32 num_told = min(shared.num_candidates, CANDIDATES) * TEAM;
#pragma unroll 1
  for (u32 nth = threadIdx.x; nth < num_told; nth += THREADS)
    tell(Remote(shared, &shared.candidates[nth / TEAM][share.block], CANDIDATE, nth % TEAM),
         *reinterpret_cast<const uint4*>(&shared.own_candidates[nth / TEAM]));
  if (warp == 0) {
    const u32 block_clusters = warp_sum(lane < WARPS ? shared.warp_clusters[lane] : 0);
    const u32 block_tokens = warp_sum(lane < WARPS ? shared.warp_tokens[lane] : 0);
    if (lane < TEAM)
      tell(Remote(shared, &shared.counts[share.block], COUNTS, lane),
           uint4{block_clusters, block_tokens, shared.num_candidates, 0});
    wait_for(shared, COUNTS, parity);
    const u32 of_block = lane < TEAM ? min(shared.counts[lane].candidates, CANDIDATES) : 0;
    const u32 candidates = warp_sum(of_block);
    if (lane == 0) {
      expect(shared, CANDIDATE, candidates * sizeof(Candidate));
      // for the next time
      expect(shared, COUNTS, COUNTS_BYTES);
    }
  }
  wait_for(shared, CANDIDATE, parity);
}

// The most candidates of a block.
__device__ __forceinline__ u32 most_candidates(const Shared& shared) {
  return __reduce_max_sync(FULL_WARP, shared.counts[threadIdx.x % TEAM].candidates);
}

// Which candidates fit: their counts by block, the block's own by warp, and the end in shared.end.
//
// most: candidates of a block; places beyond a block's own hold none. CANDIDATE_LANES count for one.
__device__ void accept_candidates(const Share& share, u32 most, u32 tokens_before, u32 budget) {
  constexpr int SETS = THREADS / CANDIDATE_LANES;
  Shared& shared = share.shared;
  const Candidate* candidates = &shared.candidates[0][0];
  const u32 num_places = most * TEAM, lane = threadIdx.x % CANDIDATE_LANES;
  const u32 lanes = ((1u << CANDIDATE_LANES) - 1) << (threadIdx.x % 32 - lane);
#pragma unroll 1
  for (u32 nth = threadIdx.x / CANDIDATE_LANES; nth < num_places; nth += SETS) {
    const Candidate mine = candidates[nth];
    if (mine.size == 0) continue;
    u32 before = 0;
#pragma unroll 1
    for (u32 other = lane; other < num_places; other += CANDIDATE_LANES)
      before += candidates[other].order < mine.order ? candidates[other].size : 0;
    before = __reduce_add_sync(lanes, before) + tokens_before;
    // the best is taken whatever its size, unless the budget is 0
    const bool fits = before + mine.size <= budget || (before == 0 && budget > 0);
    if (lane > 0 || !fits) continue;
    const u32 block = nth % TEAM, to = before + mine.size;
    shared.accepted_to[nth] = to;
    atomicMax(&shared.last_accepted_to, to);
    atomicAdd(&shared.accepted_clusters[block], 1);
    atomicAdd(&shared.accepted_tokens[block], mine.size);
    if (block == share.block) {
      const u32 of_warp = ((u32)mine.order - share.first_cluster) / share.warp_clusters();
      atomicAdd(&shared.warp_clusters[of_warp], 1);
      atomicAdd(&shared.warp_tokens[of_warp], mine.size);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (u32 nth = threadIdx.x; nth < num_places; nth += THREADS)
    if (shared.accepted_to[nth] > 0 && shared.accepted_to[nth] == shared.last_accepted_to)
      shared.end = candidates[nth].order + 1;
  __syncthreads();
}

// The first order number that is not selected.
//
// Leaves what is selected: by block in shared.counts and shared.accepted_*, by warp of this block in
// shared.warp_clusters and shared.warp_tokens.
__device__ u64 find_end(const Share& share, u32 budget) {
  Shared& shared = share.shared;
  const bool takes_all = shared.row_tokens <= budget;
  // behind every cluster that has tokens
  u64 low = takes_all ? (u64)(RANK_BITS_TOP + 1) << 32 : 0;
  int shift = FIRST_SHIFT;
  u32 tokens_before = 0, most = 0, told = 0, counted = 0;
#pragma unroll 1
  while (true) {
    u32 bin = 0;
    if (!takes_all) {
      tell_histogram(share);
      wait_for(shared, HISTOGRAM, told++ & 1);
      find_bin(shared, tokens_before, budget);
      tokens_before = shared.tokens_before;
      bin = shared.bin;
      low += (u64)bin << shift;
    }
    if (bin < BINS) {
      count_and_tell(share, low, takes_all ? low : low + (1ull << shift), counted++ & 1);
      if (takes_all) return low;
      most = most_candidates(shared);
      if (most <= CANDIDATES) break;
      shift = max(0, shift - BIN_BITS);
    } else {
      // no block tells its next histogram before all have read this one
      team_sync();
    }
    __syncthreads();
    if (threadIdx.x == 0) expect(shared, HISTOGRAM, HISTOGRAM_BYTES);
    clear_histogram(shared);
    clear_candidates(shared);
    __syncthreads();
#pragma unroll 1
    for (u32 cluster = threadIdx.x; cluster < share.num_clusters; cluster += THREADS) {
      const u64 order = share.order(cluster);
      if (order >= low && (order - low) >> shift < BINS)
        atomicAdd(&shared.histogram[(order - low) >> shift], share.entry(cluster).size());
    }
    __syncthreads();
  }
  accept_candidates(share, most, tokens_before, budget);
  return max(shared.end, low);
}
