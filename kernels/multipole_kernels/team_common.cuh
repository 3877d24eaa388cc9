// What the parts of team_decode.cu share: constants, buffers, small device functions.
//
// A team is a thread-block cluster: the TEAM blocks that attend for one (row, KV head) together, each
// for its share of the row's clusters of keys.
//
// Given by the launcher: NUM_KV_HEADS, GROUP, HEAD_DIM, CLUSTERS, SEGMENT_SIZE, TEAM, THREADS,
// BLOCKS_PER_SM, QUERY_IS_BF16, CENTROIDS (0: of the query's type, 1: int8, 2: float8 e4m3), LONG_ROWS
// (whether a block's share may be longer than shared memory holds).
//
// Between two launches a server reads a layer's weights, so that a launch finds its code in memory, not
// in a cache, and executes most of it once: loops are unrolled where loads are to be in flight together,
// and nowhere else.

#pragma once

#include "warp_common.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int UNIT = 16;  // clusters or tokens that are the rows of one product
constexpr int HEAD_TILES = (GROUP + 7) / 8;        // columns of a product are 8 query heads
constexpr int HEAD_STRIDE = GROUP + GROUP % 2;     // floats of one cluster's scores
// query heads of which each is summed by so many lanes
constexpr int HEAD_SUMS = GROUP <= 1 ? 1 : GROUP <= 2 ? 2 : GROUP <= 4 ? 4 : GROUP <= 8 ? 8 : 16;
constexpr int SUM_LANES = 32 / HEAD_SUMS;
constexpr bool EIGHT_BITS = CENTROIDS != 0;
constexpr int CENTROID_BYTES = EIGHT_BITS ? 1 : 2;
constexpr float LOG2_E = 1.4426950408889634f;
// by which the float16 product of a weight and an 8-bit value's scale is raised; see
// attention_state.py
constexpr float VALUE_FACTOR = 1024.0f;
// what float8 bits moved to float16's places are short of
constexpr float UNPACK_SCALE = CENTROIDS == 2 ? 256.0f : 1.0f;

constexpr int BIN_BITS = 8;
constexpr int BINS = 1 << BIN_BITS;
constexpr int FIRST_SHIFT = 32 + 20;  // the first bins are an eighth of an octave wide
constexpr int CANDIDATES = 128 / TEAM;  // of one block; all pairs of a team's are compared
constexpr int CANDIDATE_LANES = 16;
constexpr int LIST = 256;               // clusters whose slots are written together
constexpr int CLUSTER_LANES = 16;
constexpr int BLOCK_SLOTS = 1536;  // selected tokens that a block is told of

static_assert(TEAM >= 2 && TEAM <= 16 && (TEAM & (TEAM - 1)) == 0, "TEAM");
static_assert(THREADS >= BINS && 2 * WARPS <= 32 && THREADS % 32 == 0, "THREADS");
static_assert(CLUSTERS % UNIT == 0 && HEAD_DIM % 32 == 0 && GROUP >= 1 && GROUP <= 16, "geometry");
static_assert(SEGMENT_SIZE % 8 == 0, "members come in 16 bytes");
constexpr int PART = GROUP * HEAD_DIM;  // floats of an output
static_assert(PART % (2 * TEAM) == 0, "a block writes whole pairs of the output");
constexpr int SLICE = PART / TEAM;  // of which a block writes

struct Arguments {
  const u16* q;                // [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM]
  const u16* k_cache;          // [num_slots, NUM_KV_HEADS, HEAD_DIM]
  const u16* v_cache;
  u16* out;                    // as q
  const u8* key_centroids;     // [P, NUM_KV_HEADS, CLUSTERS, HEAD_DIM]
  const u8* value_centroids;
  const float* key_scale;      // [P, NUM_KV_HEADS, CLUSTERS], with 8-bit centroids
  const float* value_scale;
  const u16* cluster_sizes;    // [P, NUM_KV_HEADS, CLUSTERS]
  const float* key_variance;   // [P, NUM_KV_HEADS, CLUSTERS]
  const float* pair_weight;    // [P, NUM_KV_HEADS, HEAD_DIM / 2]
  const u16* member_begin;     // [P, NUM_KV_HEADS, CLUSTERS]
  const u16* members;          // [P, NUM_KV_HEADS, SEGMENT_SIZE]
  const int* segment_slots;    // [P, SEGMENT_SIZE]
  const int* item_indptr;      // [num_rows + 1]
  const int* item_place;       // [max_items]
  const int* exact_indptr;     // [num_rows + 1]
  const int* exact_slots;      // [max_exact]
  const int* token_budget;     // [num_rows]
  float* long_scores;          // [max_items, NUM_KV_HEADS, CLUSTERS, HEAD_STRIDE], of long rows
  u32* long_ranks;             // [max_items, NUM_KV_HEADS, CLUSTERS], of long rows
  float* long_spread;          // [max_items, NUM_KV_HEADS, HEAD_STRIDE], of long rows
  int* selected_clusters;      // [num_rows, NUM_KV_HEADS, cluster_capacity]
  int* selected_slots;         // [num_rows, NUM_KV_HEADS, slot_capacity]
  int* num_selected_clusters;  // [num_rows, NUM_KV_HEADS]
  int* num_selected_tokens;
  int* num_clustered_tokens;
  u64* heads_arrived;          // [num_rows], 0 between launches
  long long* counters;         // [num_rows, 4], if count
  float sm_scale;
  float max_logit_variance;
  int resident_clusters;       // of a block, in its shared memory; a multiple of CLUSTERS
  int cluster_capacity;
  int slot_capacity;
  int budget_capacity;
  int stride_q_row;            // elements
  int stride_out_row;
  int stride_slot;
  int count;
};

// The largest base-2 logit and the sum of 2^(logit - it).
struct MaxAndSum {
  float max, sum;
};

struct Candidate {
  u64 order;
  u32 size, unused;
};

// What a block tells its team of its clusters before the bin, and how many candidates it tells.
struct Counts {
  u32 clusters, tokens, candidates, unused;
};

// What a block tells of a query head: of its tails, and of them and its always-exact tokens.
struct HeadState {
  float tail_max, max, sum;
  u32 tokens;  // clustered
};

// What the steps need of a cluster.
struct ClusterEntry {
  float variance, key_scale, value_scale;
  u32 members;  // begin << 16 | size
  __device__ __forceinline__ u32 size() const { return members & 0xffff; }
};

struct ListedCluster {
  u32 first_token;  // in the slot list
  u32 place;
  u32 members;  // begin << 16 | size
};

// What blocks tell each other, by kind; each kind has a barrier that counts the bytes.
enum Message { STATES, HISTOGRAM, COUNTS, CANDIDATE, SLOTS, PARTS, MESSAGES };
constexpr u32 STATES_BYTES = TEAM * GROUP * sizeof(HeadState);
constexpr u32 HISTOGRAM_BYTES = TEAM * BINS * 2;
constexpr u32 COUNTS_BYTES = TEAM * sizeof(Counts);
constexpr u32 PARTS_BYTES = TEAM * (SLICE * 4 + GROUP * sizeof(MaxAndSum));

// Arrays of TEAM are told by the team's blocks, each its own.
struct Shared {
  alignas(16) u16 bins[TEAM][BINS];
  alignas(16) Candidate candidates[CANDIDATES][TEAM];
  alignas(16) Counts counts[TEAM];
  alignas(16) HeadState head_state[TEAM][GROUP];
  alignas(16) float part[TEAM][SLICE];
  MaxAndSum part_state[TEAM][GROUP];
  int slots[BLOCK_SLOTS];  // of the block's selected tokens
  alignas(16) u32 histogram[BINS];
  u64 told[MESSAGES];
  alignas(16) Candidate own_candidates[CANDIDATES];
  u32 accepted_to[CANDIDATES * TEAM];  // tokens up to and with a candidate that fits
  ListedCluster list[LIST];
  MaxAndSum warp_state[2 * WARPS][GROUP];
  alignas(16) float lse_log2[HEAD_STRIDE];
  alignas(16) float tail_max[HEAD_STRIDE];
  float unselected_sum[WARPS][GROUP];
  u32 warp_clusters[WARPS];
  u32 warp_tokens[WARPS];
  u32 accepted_clusters[TEAM];
  u32 accepted_tokens[TEAM];
  u64 end;  // the first order number that is not selected
  u32 last_accepted_to;
  u32 bin;
  u32 tokens_before;
  u32 num_candidates;
  u32 block_tokens;
  u32 row_tokens;
};

static_assert(sizeof(Shared) <= 1024 * (36 + GROUP) + 4 * PART, "see team_resident_clusters");

// A number of each query head.
struct OfHeads {
  float head[HEAD_STRIDE];

  __device__ __forceinline__ void load(const float* from) {
    if constexpr (HEAD_STRIDE % 4 == 0) {
#pragma unroll
      for (int i = 0; i < HEAD_STRIDE; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        head[i] = four.x, head[i + 1] = four.y, head[i + 2] = four.z, head[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < HEAD_STRIDE; i += 2) {
        const float2 two = *reinterpret_cast<const float2*>(from + i);
        head[i] = two.x, head[i + 1] = two.y;
      }
    }
  }
  __device__ __forceinline__ void store(float* to) const {
    if constexpr (HEAD_STRIDE % 4 == 0) {
#pragma unroll
      for (int i = 0; i < HEAD_STRIDE; i += 4)
        *reinterpret_cast<float4*>(to + i) = {head[i], head[i + 1], head[i + 2], head[i + 3]};
    } else {
#pragma unroll
      for (int i = 0; i < HEAD_STRIDE; i += 2)
        *reinterpret_cast<float2*>(to + i) = {head[i], head[i + 1]};
    }
  }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x += __shfl_xor_sync(FULL_WARP, x, distance);
  return x;
}

// The sum over the warp of one of HEAD_SUMS numbers: a lane gets number lane / SUM_LANES.
//
// Each step halves what a lane still sums; the order of additions is warp_sum's.
__device__ __forceinline__ float warp_sums(float (&x)[HEAD_SUMS], int lane) {
#pragma unroll
  for (int half = HEAD_SUMS / 2; half > 0; half /= 2) {
    const int distance = half * SUM_LANES;
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float other = __shfl_xor_sync(FULL_WARP, upper ? x[i] : x[i + half], distance);
      x[i] = (upper ? x[i + half] : x[i]) + other;
    }
  }
#pragma unroll
  for (int distance = SUM_LANES / 2; distance > 0; distance /= 2)
    x[0] += __shfl_xor_sync(FULL_WARP, x[0], distance);
  return x[0];
}

__device__ __forceinline__ float warp_max(float x) {
  // as integers that are ordered as the floats are
  const u32 bits = __float_as_uint(x);
  const u32 ordered = bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
  const u32 max = __reduce_max_sync(FULL_WARP, ordered);
  return __uint_as_float(max ^ (max >> 31 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ MaxAndSum merged(MaxAndSum a, MaxAndSum b) {
  const float max = fmaxf(a.max, b.max), shift = finite_or_zero(max);
  return {max, a.sum * power_of_2(a.max - shift) + b.sum * power_of_2(b.max - shift)};
}

__device__ __forceinline__ float float_of_element(u16 bits) {
  float x;
#if QUERY_IS_BF16
  x = __uint_as_float((u32)bits << 16);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
#endif
  return x;
}

// two floats as two elements of the query's type, the first in the low half
__device__ __forceinline__ u32 pack_elements(float low, float high) {
  u32 packed;
#if QUERY_IS_BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
  return packed;
}

__device__ __forceinline__ u32 pack_halves(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// A slot's row in a layer's keys or values; base: of slot 0, stride in elements.
__device__ __forceinline__ const u8* row_of_slot(const u8* base, int slot, int stride) {
  return base + (u64)(u32)slot * (2 * (u32)stride);
}

// Bring a row of global memory into L2.
__device__ __forceinline__ void prefetch_row(const u8* row) {
#pragma unroll
  for (int at = 0; at < 2 * HEAD_DIM; at += 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + at));
}

// Bring bytes of global memory, a multiple of 16, into L2.
__device__ __forceinline__ void prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
