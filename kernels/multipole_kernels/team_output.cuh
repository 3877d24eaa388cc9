// The last steps: value centroids of the clusters not selected, tokens, and the team's output.

#pragma once

#include "team_list.cuh"

// A warp's attention state: of head h of a tile, (max, sum) of column 2t + h, and acc in C's layout.
struct WarpState {
  MaxAndSum heads[HEAD_TILES][2];
  float acc[HEAD_TILES][DIM_TILES][4];
};

// Weights of the selected clusters to 0, those of the others summed, and times their values' scale.
__device__ void finish_weights(const Share& share, u64 end_of_selection) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 begin = warp * share.warp_clusters();
  const u32 end = min(begin + share.warp_clusters(), share.num_clusters);
  float sums[HEAD_SUMS] = {};
#pragma unroll 1
  for (u32 cluster = begin + lane; cluster < end; cluster += 32) {
    const bool selected = share.order(cluster) < end_of_selection;
    OfHeads weights = share.scores_of(cluster);
    float scale = 1.0f;
    if constexpr (EIGHT_BITS)
      scale = share.entry(cluster).value_scale * (VALUE_FACTOR * UNPACK_SCALE);
#pragma unroll
    for (int group = 0; group < GROUP; ++group) {
      const float weight = selected ? 0.0f : weights.head[group];
      sums[group] += weight;
      weights.head[group] = weight * scale;
    }
    share.set_scores(cluster, weights);
  }
  const float sum = warp_sums(sums, lane);
  const int group = lane / SUM_LANES;
  if (lane % SUM_LANES == 0 && group < GROUP) share.shared.unselected_sum[warp][group] = sum;
}

__device__ __forceinline__ void load_unit(const Share& share, u32 unit,
                                          ValueRows<CENTROID_BYTES>& rows, int lane) {
  constexpr int ROW = CENTROID_ROW;
  const u8* first = as_base(share.a.value_centroids + share.table(unit * UNIT) * ROW +
                            lane % 4 * 2 * ROW + rows.lane_offset(lane));
  rows.load({first, first + ROW, first + 8 * ROW, first + 9 * ROW});
}

// acc = the block's value centroids times their weights.
__device__ void attend_to_centroids(const Share& share, WarpState& state) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 num_units = share.num_clusters / UNIT;
  ValueRows<CENTROID_BYTES> rows, next;
  if (warp < num_units) load_unit(share, warp, rows, lane);
#pragma unroll 1
  for (u32 unit = warp; unit < num_units; unit += WARPS) {
    if (unit + WARPS < num_units) load_unit(share, unit + WARPS, next, lane);
    u32 weights[HEAD_TILES][2];
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
      const int head = tile * 8 + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 cluster = unit * UNIT + half * 8 + lane % 4 * 2;
        float first = 0.0f, second = 0.0f;
        if (head < GROUP) {
          first = share.score(cluster, head);
          second = share.score(cluster + 1, head);
        }
        weights[tile][half] =
            EIGHT_BITS ? pack_halves(first, second) : pack_elements(first, second);
      }
    }
    rows.add(weights, state.acc);
    rows = next;
  }
  if constexpr (EIGHT_BITS) {
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile)
#pragma unroll
      for (int dims = 0; dims < DIM_TILES; ++dims)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.acc[tile][dims][i] *= 1.0f / VALUE_FACTOR;
  }
}

// The block's always-exact tokens, and its part of the row's selected ones.
struct Tokens {
  const int *exact, *selected;
  int num_exact, num_tokens;

  __device__ __forceinline__ Tokens(const Share& share, const Deal& deal)
      : exact(share.a.exact_slots + share.exact_begin), num_exact(share.num_exact) {
    const u32 begin = deal.first(share.block);
    selected = share.a.selected_slots + (size_t)share.row_head * share.a.slot_capacity + begin;
    if (deal.is_told()) selected = share.shared.slots;
    num_tokens = num_exact + deal.first(share.block + 1) - begin;
  }
  // past the end, the last one's
  __device__ __forceinline__ int slot(int token) const {
    token = min(token, num_tokens - 1);
    return token < num_exact ? exact[token] : selected[token - num_exact];
  }
};

// The state with the block's tokens added, UNIT tokens of a warp at a time.
__device__ void attend_to_tokens(const Share& share, const Tokens& tokens, WarpState& state) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Arguments& a = share.a;
  const float scale_log2 = a.sm_scale * LOG2_E;
  const u8* keys = share.keys() + KeyRows<2>::lane_offset(lane);
  const u8* values = share.values() + ValueRows<2>::lane_offset(lane);
  int first = warp * UNIT;
  if (first >= tokens.num_tokens) return;
  int slot = tokens.slot(first + lane % UNIT);
  Query<KEY_CHUNK<2>> q;
  q.load(share.q, lane, false);
#pragma unroll 1
  for (; first < tokens.num_tokens; first += THREADS / 2) {
    const auto row_in = [&](const u8* base, int token) {
      return as_base(row_of_slot(base, __shfl_sync(FULL_WARP, slot, token), a.stride_slot));
    };
    KeyRows<2> key_rows;
    key_rows.load(row_in(keys, lane / 4), row_in(keys, lane / 4 + 8));
    ValueRows<2> value_rows;
    const int column = lane % 4 * 2;
    value_rows.load({row_in(values, column), row_in(values, column + 1),
                     row_in(values, column + 8), row_in(values, column + 9)});
    slot = tokens.slot(first + THREADS / 2 + lane % UNIT);
    float scores[HEAD_TILES][4];
    key_rows.score(q, scores);
    u32 weights[HEAD_TILES][2];
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        float* of_head = scores[tile] + head;
        of_head[0] = first + lane / 4 < tokens.num_tokens ? of_head[0] * scale_log2
                                                          : minus_infinity();
        of_head[2] = first + lane / 4 + 8 < tokens.num_tokens ? of_head[2] * scale_log2
                                                              : minus_infinity();
        float max = fmaxf(of_head[0], of_head[2]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, distance));
        MaxAndSum& running = state.heads[tile][head];
        max = fmaxf(max, running.max);
        const float rescale = power_of_2(running.max - max);
        of_head[0] = power_of_2(of_head[0] - max);
        of_head[2] = power_of_2(of_head[2] - max);
        running = {max, running.sum * rescale + of_head[0] + of_head[2]};
#pragma unroll
        for (int dims = 0; dims < DIM_TILES; ++dims) {
          state.acc[tile][dims][head] *= rescale;
          state.acc[tile][dims][2 + head] *= rescale;
        }
      }
      weights[tile][0] = transposed(pack_elements(scores[tile][0], scores[tile][1]));
      weights[tile][1] = transposed(pack_elements(scores[tile][2], scores[tile][3]));
    }
    value_rows.add(weights, state.acc);
  }
  // a lane has summed its own rows
#pragma unroll
  for (int tile = 0; tile < HEAD_TILES; ++tile)
#pragma unroll
    for (int head = 0; head < 2; ++head)
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2)
        state.heads[tile][head].sum +=
            __shfl_xor_sync(FULL_WARP, state.heads[tile][head].sum, distance);
}

// Parts hold dimensions in the order of tiles and lanes, so that a warp's stores fill rows of banks.
constexpr int PART_STRIDE = HEAD_DIM + 8;  // floats of one query head of one warp's part

// Merge the warps' states, tell each block its slice of the output's sums, and write this block's.
//
// parts: [WARPS, GROUP, PART_STRIDE], shared memory.
__device__ void write_output(const Share& share, const WarpState& state, float* parts) {
  Shared& shared = share.shared;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int tile = 0; tile < HEAD_TILES; ++tile)
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      const int group = tile * 8 + lane % 4 * 2 + head;
      if (group >= GROUP) continue;
      if (lane < 4) shared.warp_state[warp][group] = state.heads[tile][head];
      float* part = parts + (warp * GROUP + group) * PART_STRIDE + lane / 4 * 2;
#pragma unroll
      for (int dims = 0; dims < DIM_TILES; ++dims)
        *reinterpret_cast<float2*>(part + dims * 16) = {state.acc[tile][dims][head],
                                                        state.acc[tile][dims][2 + head]};
    }
  __syncthreads();
#pragma unroll 1
  for (int pair = thread; pair < PART / 2; pair += THREADS) {
    const int group = 2 * pair / HEAD_DIM;
    float max = minus_infinity();
#pragma unroll
    for (int other = 0; other < WARPS; ++other)
      max = fmaxf(max, shared.warp_state[other][group].max);
    const float shift = finite_or_zero(max);
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int other = 0; other < WARPS; ++other) {
      const float weight = power_of_2(shared.warp_state[other][group].max - shift);
      const float2 part = *reinterpret_cast<const float2*>(
          parts + (other * GROUP + group) * PART_STRIDE + 2 * pair % HEAD_DIM);
      sum.x += weight * part.x;
      sum.y += weight * part.y;
    }
    const int to = 2 * pair / SLICE;
    tell(Remote(shared, &shared.part[share.block][2 * pair % SLICE], PARTS, to), sum.x, sum.y);
  }
#pragma unroll 1
  for (int group = warp; group < GROUP; group += WARPS) {
    MaxAndSum of_warp = {minus_infinity(), 0.0f};
    float unselected = 0.0f;
    if (lane < WARPS) {
      of_warp = shared.warp_state[lane][group];
      if (share.row_clusters > 0) unselected = shared.unselected_sum[lane][group];
    }
    const float max = warp_max(of_warp.max), shift = finite_or_zero(max);
    float sum = of_warp.sum * power_of_2(of_warp.max - shift);
    if (share.row_clusters > 0) sum += unselected * power_of_2(shared.tail_max[group] - shift);
    sum = warp_sum(sum);
    if (lane < TEAM)
      tell(Remote(shared, &shared.part_state[share.block][group], PARTS, lane), max, sum);
  }
  wait_for(shared, PARTS);
  // TEAM neighbouring lanes have one pair of the slice, each of another block
#pragma unroll 1
  for (int first = 0; first < PART / 2; first += THREADS) {
    // lanes past the end repeat the last pair
    const int other = thread % TEAM, pair = min(first + thread, PART / 2 - 1) / TEAM;
    const int element = share.block * SLICE + 2 * pair, group = element / HEAD_DIM;
    const MaxAndSum of_block = shared.part_state[other][group];
    const float2 part = *reinterpret_cast<const float2*>(&shared.part[other][2 * pair]);
    float max = of_block.max;
#pragma unroll
    for (int distance = TEAM / 2; distance > 0; distance /= 2)
      max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, distance));
    const float weight = power_of_2(of_block.max - finite_or_zero(max));
    float total = weight * of_block.sum;
    float2 sum = {weight * part.x, weight * part.y};
#pragma unroll
    for (int distance = TEAM / 2; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(FULL_WARP, total, distance);
      sum.x += __shfl_xor_sync(FULL_WARP, sum.x, distance);
      sum.y += __shfl_xor_sync(FULL_WARP, sum.y, distance);
    }
    const float scale = 1.0f / (total > 0.0f ? total : 1.0f);
    const int dim = dim_of_tile(element % HEAD_DIM / 16, element % 16 / 2 * 4);
    u16* out = share.a.out + (size_t)share.row * share.a.stride_out_row +
               (share.kv_head * GROUP + group) * HEAD_DIM + dim;
    if (other == 0 && first + thread < PART / 2)
      *reinterpret_cast<u32*>(out) = pack_elements(sum.x * scale, sum.y * scale);
  }
}
