// The first steps of a team's block: its share of the row, scores of its clusters, the row's lse.
//
//   score  = q . key_centroid * sm_scale
//   spread = sum over f of pair_weight_f * (q_f^2 + q_(f + D/2)^2) * sm_scale^2, of a segment
//   tail   = score + min(spread * key_variance, max_logit_variance) / 2 + log(size)
//
// all times log2(e). lse is over all tails and the logits of the always-exact tokens.

#pragma once

#include "team_share.cuh"

// What a cluster's tail is above its score: 0.5 log2(e) min(spread * variance, max) + log2(size).
struct AboveScore {
  float variance, max_variance, log2_size;

  __device__ __forceinline__ AboveScore(const Share& share, const ClusterEntry& entry)
      : variance(entry.variance),
        max_variance(share.a.max_logit_variance),
        log2_size(__log2f((float)entry.size())) {}
  __device__ __forceinline__ float operator()(float spread) const {
    return 0.5f * LOG2_E * fminf(spread * variance, max_variance) + log2_size;
  }
};

// Spread of each of the block's segments.
__device__ void spread_of_segments(const Share& share) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 num_segments = share.num_segments();
  // from the last warp but one on: the last has always-exact tokens, the first have more clusters
#pragma unroll 1
  for (u32 segment = (2 * WARPS - 2 - warp) % WARPS; segment < num_segments; segment += WARPS) {
    const size_t head = (size_t)share.place_of_segment(segment) * NUM_KV_HEADS + share.kv_head;
    const float* weights = share.a.pair_weight + head * (HEAD_DIM / 2);
    float sums[HEAD_SUMS] = {};
#pragma unroll
    for (int group = 0; group < GROUP; ++group)
#pragma unroll
      for (int pair = lane; pair < HEAD_DIM / 2; pair += 32) {
        const u16* q = share.q + group * HEAD_DIM + pair;
        const float x = float_of_element(q[0]) * share.a.sm_scale;
        const float y = float_of_element(q[HEAD_DIM / 2]) * share.a.sm_scale;
        sums[group] += weights[pair] * (x * x + y * y);
      }
    const float sum = warp_sums(sums, lane);
    const int group = lane / SUM_LANES;
    if (lane % SUM_LANES == 0 && group < GROUP) share.set_spread(segment, group, sum);
  }
}

// A lane's rows g and g + 8 of a unit of the block's key centroids.
__device__ __forceinline__ void load_unit(const Share& share, u32 unit,
                                          KeyRows<CENTROID_BYTES>& rows, int lane) {
  const u8* first = as_base(share.a.key_centroids + share.table(unit * UNIT) * CENTROID_ROW +
                            lane / 4 * CENTROID_ROW + rows.lane_offset(lane));
  rows.load(first, first + 8 * CENTROID_ROW);
}

// Products of the block's key centroids with the query heads, and the segments' spreads.
__device__ void score_clusters(const Share& share) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 num_units = share.num_clusters / UNIT;
  KeyRows<CENTROID_BYTES> rows, next;
  Query<KEY_CHUNK<CENTROID_BYTES>> q;
  if (warp < num_units) load_unit(share, warp, rows, lane);
  q.load(share.q, lane, EIGHT_BITS);
  load_entries(share);
  spread_of_segments(share);
#pragma unroll 1
  for (u32 unit = warp; unit < num_units; unit += WARPS) {
    if (unit + WARPS < num_units) load_unit(share, unit + WARPS, next, lane);
    float scores[HEAD_TILES][4];
    rows.score(q, scores);
    const u32 cluster = unit * UNIT + lane / 4;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
      const int head = tile * 8 + lane % 4 * 2;
      if (head < GROUP) {
        share.set_scores(cluster, head, scores[tile][0], scores[tile][1]);
        share.set_scores(cluster + 8, head, scores[tile][2], scores[tile][3]);
      }
    }
    rows = next;
  }
}

// The largest logit and the sum over the block's always-exact tokens, of each warp.
__device__ void exact_states(const Share& share) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Arguments& a = share.a;
  const float scale_log2 = a.sm_scale * LOG2_E;
  MaxAndSum state[HEAD_TILES][2];
#pragma unroll
  for (int tile = 0; tile < HEAD_TILES; ++tile)
    state[tile][0] = state[tile][1] = {minus_infinity(), 0.0f};
  Query<KEY_CHUNK<2>> q;
  // from the last warp on: the first ones have more clusters
  int first = (WARPS - 1 - warp) * UNIT;
  if (first >= share.num_exact) {
    if (lane < GROUP) share.shared.warp_state[WARPS + warp][lane] = {minus_infinity(), 0.0f};
    return;
  }
  q.load(share.q, lane, false);
#pragma unroll 1
  for (; first < share.num_exact; first += THREADS / 2) {
    const int token = first + lane / 4;
    const int* slots = a.exact_slots + share.exact_begin;
    const int row_slots[2] = {slots[min(token, share.num_exact - 1)],
                              slots[min(token + 8, share.num_exact - 1)]};
    KeyRows<2> rows;
    const u8* keys = share.keys() + rows.lane_offset(lane);
    rows.load(as_base(row_of_slot(keys, row_slots[0], a.stride_slot)),
              as_base(row_of_slot(keys, row_slots[1], a.stride_slot)));
    // for later
    if (lane % 4 < 2)
      prefetch_row(row_of_slot(share.values(), lane % 4 == 0 ? row_slots[0] : row_slots[1],
                               a.stride_slot));
    float scores[HEAD_TILES][4];
    rows.score(q, scores);
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile)
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        MaxAndSum& of_head = state[tile][head];
        if (token < share.num_exact)
          of_head = merged(of_head, {scores[tile][head] * scale_log2, 1.0f});
        if (token + 8 < share.num_exact)
          of_head = merged(of_head, {scores[tile][2 + head] * scale_log2, 1.0f});
      }
  }
#pragma unroll
  for (int tile = 0; tile < HEAD_TILES; ++tile)
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      const MaxAndSum of_head = state[tile][head];
      float max = of_head.max;
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2)
        max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, distance));
      float sum = of_head.sum * power_of_2(of_head.max - finite_or_zero(max));
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2)
        sum += __shfl_xor_sync(FULL_WARP, sum, distance);
      const int group = tile * 8 + lane % 4 * 2 + head;
      if (lane < 4 && group < GROUP) share.shared.warp_state[WARPS + warp][group] = {max, sum};
    }
}

// Scores from products, and the largest tail and the sum over each warp's clusters.
__device__ void tail_states(const Share& share) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Arguments& a = share.a;
  const float scale_log2 = a.sm_scale * LOG2_E * UNPACK_SCALE;
  const u32 begin = warp * share.warp_clusters();
  const u32 end = min(begin + share.warp_clusters(), share.num_clusters);
  MaxAndSum state[GROUP];
#pragma unroll
  for (int group = 0; group < GROUP; ++group) state[group] = {minus_infinity(), 0.0f};
  u32 tokens = 0;
#pragma unroll 1
  for (u32 cluster = begin + lane; cluster < end; cluster += 32) {
    const ClusterEntry entry = share.entry(cluster);
    const AboveScore above(share, entry);
    const float scale = scale_log2 * entry.key_scale;
    OfHeads scores = share.scores_of(cluster);
    const OfHeads spread = share.spread_of(cluster);
    tokens += entry.size();
#pragma unroll
    for (int group = 0; group < GROUP; ++group) {
      scores.head[group] *= scale;
      state[group] = merged(state[group], {scores.head[group] + above(spread.head[group]), 1.0f});
    }
    share.set_scores(cluster, scores);
  }
  float sums[HEAD_SUMS] = {};
#pragma unroll
  for (int group = 0; group < GROUP; ++group) {
    const float max = warp_max(state[group].max);
    sums[group] = state[group].sum * power_of_2(state[group].max - finite_or_zero(max));
    if (lane == 0) share.shared.warp_state[warp][group].max = max;
  }
  const float sum = warp_sums(sums, lane);
  const int group = lane / SUM_LANES;
  if (lane % SUM_LANES == 0 && group < GROUP) share.shared.warp_state[warp][group].sum = sum;
  tokens = warp_sum(tokens);
  if (lane == 0) atomicAdd(&share.shared.block_tokens, tokens);
}

// Each block's states to all, and the row's lse from all.
__device__ void exchange_lse(const Share& share) {
  Shared& shared = share.shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll 1
  for (int group = warp; group < GROUP; group += WARPS) {
    // the warps' tails, then their always-exact tokens
    MaxAndSum state = {minus_infinity(), 0.0f};
    if (lane < 2 * WARPS) state = shared.warp_state[lane][group];
    const float tail_max = warp_max(lane < WARPS ? state.max : minus_infinity());
    const float max = warp_max(state.max);
    const float sum = warp_sum(state.sum * power_of_2(state.max - finite_or_zero(max)));
    if (lane < TEAM)
      tell(Remote(shared, &shared.head_state[share.block][group], STATES, lane),
           uint4{__float_as_uint(tail_max), __float_as_uint(max), __float_as_uint(sum),
                 shared.block_tokens});
  }
  wait_for(shared, STATES);
#pragma unroll 1
  for (int group = warp; group < GROUP; group += WARPS) {
    const HeadState state = shared.head_state[lane % TEAM][group];
    const float tail_max = warp_max(state.tail_max), max = warp_max(state.max);
    const bool counts = lane < TEAM;
    const float sum =
        warp_sum(counts ? state.sum * power_of_2(state.max - finite_or_zero(max)) : 0.0f);
    const u32 tokens = warp_sum(counts ? state.tokens : 0);
    if (lane == 0) {
      shared.tail_max[group] = tail_max;
      shared.lse_log2[group] = max + __log2f(sum);
      if (group == 0) shared.row_tokens = tokens;
    }
  }
  __syncthreads();
}
