// A whole decode step of one layer in one launch: a team of blocks (a thread-block cluster) attends
// for each (row, KV head), and its blocks talk through each other's shared memory.
//
//   1. scores     of the block's clusters and always-exact tokens; the row's lse (team_scores.cuh)
//   2. selection  ranks; where the budget ends the list                         (team_selection.cuh)
//   3. list       the selected clusters and their tokens' slots                 (team_list.cuh)
//   4. output     the other clusters' value centroids, the tokens, the merge    (team_output.cuh)
//
// reference.multipole_attention is the definition. A share of up to resident_clusters clusters is
// held in shared memory; that of a longer row keeps its scores in global memory.

#include "team_output.cuh"

__device__ __forceinline__ Share share_of_block(const Arguments& a, Shared& shared, char* tables) {
  const int block = blockIdx.x % TEAM, row_head = blockIdx.x / TEAM;
  const int row = row_head / NUM_KV_HEADS, kv_head = row_head % NUM_KV_HEADS;
  const int item_begin = a.item_indptr[row], item_end = a.item_indptr[row + 1];
  const int exact_begin = a.exact_indptr[row], row_exact = a.exact_indptr[row + 1] - exact_begin;
  const u32 units = (item_end - item_begin) * (CLUSTERS / UNIT);
  const u32 first_unit = units * block / TEAM;
  const u32 num_clusters = (units * (block + 1) / TEAM - first_unit) * UNIT;
  const int first_exact = row_exact * block / TEAM;
  Share share{a,
              shared,
              block,
              row,
              kv_head,
              row_head,
              item_begin,
              units * UNIT,
              first_unit * UNIT,
              num_clusters,
              row_exact,
              exact_begin + first_exact,
              row_exact * (block + 1) / TEAM - first_exact,
              a.q + (size_t)row * a.stride_q_row + kv_head * PART};
  share.entries = reinterpret_cast<ClusterEntry*>(tables);
  share.scores = reinterpret_cast<float*>(share.entries + a.resident_clusters);
  share.ranks = reinterpret_cast<u32*>(share.scores + a.resident_clusters * HEAD_STRIDE);
  share.spread = reinterpret_cast<float*>(share.ranks + a.resident_clusters);
  share.places = reinterpret_cast<int*>(share.spread +
                                        (a.resident_clusters / CLUSTERS + 1) * HEAD_STRIDE);
  share.resident = !LONG_ROWS || num_clusters <= a.resident_clusters;
  if constexpr (!LONG_ROWS) return share;
  const size_t first = (size_t)item_begin * (NUM_KV_HEADS * CLUSTERS) +
                       (size_t)kv_head * (units * UNIT) + first_unit * UNIT;
  share.long_scores = a.long_scores + first * HEAD_STRIDE;
  share.long_ranks = a.long_ranks + first;
  const size_t item = item_begin + first_unit * UNIT / CLUSTERS;
  share.long_spread = a.long_spread + (item * NUM_KV_HEADS + kv_head) * HEAD_STRIDE;
  return share;
}

// Add to the row's counters once all its KV heads have arrived: see multipole_decode.
__device__ void count_row(const Share& share, u32 num_selected) {
  const Arguments& a = share.a;
  const u64 heads = atomicAdd(a.heads_arrived + share.row, 1ull << 32 | num_selected);
  if (heads >> 32 != NUM_KV_HEADS - 1) return;
  a.heads_arrived[share.row] = 0;
  const u32 clustered = share.row_clusters > 0 ? share.shared.row_tokens : 0;
  long long* counters = a.counters + (size_t)share.row * 4;
  if (share.row_clusters > 0)
    counters[0] += 1;
  else if (share.row_exact > 0)
    counters[1] += 1;
  counters[2] += share.row_exact + ((u32)heads + num_selected) / NUM_KV_HEADS;
  counters[3] += share.row_exact + clustered;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    team_decode(const __grid_constant__ Arguments a) {
  __shared__ Shared shared;
  extern __shared__ __align__(16) char tables[];
  begin_team(shared);
  wait_for_predecessor();
  const Share share = share_of_block(a, shared, tables);
  WarpState state;
#pragma unroll
  for (int tile = 0; tile < HEAD_TILES; ++tile) {
    state.heads[tile][0] = state.heads[tile][1] = {minus_infinity(), 0.0f};
#pragma unroll
    for (int dims = 0; dims < DIM_TILES; ++dims)
#pragma unroll
      for (int i = 0; i < 4; ++i) state.acc[tile][dims][i] = 0.0f;
  }
  wait_for_team();
  u32 num_selected = 0;
  if (share.row_clusters > 0) {
    if (share.resident)
#pragma unroll 1
      for (u32 segment = threadIdx.x; segment < share.num_segments(); segment += THREADS)
        share.places[segment] =
            a.item_place[share.item_begin + share.first_cluster / CLUSTERS + segment];
    __syncthreads();
    prefetch_centroids(share, SegmentShare(share), a.key_centroids);
    clear_histogram(shared);
    clear_candidates(shared);
    if (threadIdx.x < TEAM)
      shared.accepted_clusters[threadIdx.x] = shared.accepted_tokens[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
      shared.block_tokens = 0;
      shared.num_candidates = 0;
      shared.end = 0;
      shared.last_accepted_to = 0;
      expect(shared, STATES, STATES_BYTES);
      expect(shared, HISTOGRAM, HISTOGRAM_BYTES);
      expect(shared, COUNTS, COUNTS_BYTES);
    }
    exact_states(share);
    score_clusters(share);
    __syncthreads();
    const SegmentShare part(share);
    prefetch_centroids(share, part, a.value_centroids);
    prefetch_members(share, part);
    tail_states(share);
    exchange_lse(share);
    rank_clusters(share);
    __syncthreads();
    const u32 budget = min(a.token_budget[share.row], a.budget_capacity);
    const u64 end = find_end(share, budget);
    num_selected = list_selected(share, end);
    const Deal deal(num_selected);
    if (threadIdx.x == 0 && deal.is_told())
      expect(shared, SLOTS, 4 * (deal.first(share.block + 1) - deal.first(share.block)));
    finish_weights(share, end);
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile)
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        const int group = tile * 8 + threadIdx.x % 4 * 2 + head;
        if (group < GROUP) state.heads[tile][head].max = shared.tail_max[group];
      }
    __syncthreads();
    attend_to_centroids(share, state);
    if (deal.is_told())
      wait_for(shared, SLOTS);
    else
      team_sync();
  } else if (threadIdx.x == 0 && share.block == 0) {
    a.num_selected_clusters[share.row_head] = 0;
    a.num_selected_tokens[share.row_head] = 0;
    a.num_clustered_tokens[share.row_head] = 0;
  }
  if (threadIdx.x == 0) expect(shared, PARTS, PARTS_BYTES);
  attend_to_tokens(share, Tokens(share, Deal(num_selected)), state);
  // scores are done with, and the merge may use their place
  __syncthreads();
  write_output(share, state, reinterpret_cast<float*>(tables));
  if (a.count && share.block == 0 && threadIdx.x == 0) count_row(share, num_selected);
}
