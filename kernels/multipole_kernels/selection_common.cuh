// What the parts of cluster_selection.cu share: constants and buffers.
//
// Given by the launcher: NUM_KV_HEADS, GROUP, HEAD_DIM, CLUSTERS, TILE_CLUSTERS, SEGMENT_SIZE,
// THREADS. A segment's CLUSTERS are weighed in tiles of TILE_CLUSTERS.

#pragma once

#include "warp_common.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int VECTOR = 4;  // clusters a thread looks at together
constexpr int SEGMENT_VECTORS = CLUSTERS / VECTOR;
constexpr int TILE_VECTORS = TILE_CLUSTERS / VECTOR;
constexpr int TILES = CLUSTERS / TILE_CLUSTERS;  // of a segment
constexpr int VECTORS_AT_ONCE = GROUP <= 4 ? 2 : 1;
// the first bins are 2^-7 of an octave wide and reach 32 octaves down
constexpr int BIN_BITS = 12;
constexpr int BINS = 1 << BIN_BITS;
constexpr int FIRST_SHIFT = 48;
constexpr int MAX_CANDIDATES = 256;
constexpr int CANDIDATE_THREADS = THREADS / MAX_CANDIDATES;
constexpr int LIST = 1024;  // clusters whose slots are written together
constexpr int CLUSTER_LANES = 16;
constexpr int PARTS_AT_ONCE = 4;  // of a lane

static_assert(THREADS % MAX_CANDIDATES == 0 && THREADS <= BINS / 4 && WARPS <= 32, "THREADS");
static_assert(TILE_CLUSTERS % VECTOR == 0 && CLUSTERS % TILE_CLUSTERS == 0, "tiles");
static_assert(HEAD_DIM % 4 == 0 && GROUP <= 16, "geometry");

struct Candidate {
  u64 order;
  u32 size;
};

struct ListedCluster {
  u32 first_token;  // in the slot list
  u32 place;
  u32 members;  // begin << 16 | size
};

struct Shared {
  union {
    alignas(16) u32 histogram[BINS];
    ListedCluster list[LIST];
    float4 partial[THREADS];
  };
  Candidate candidates[MAX_CANDIDATES];
  float per_group[GROUP];
  u32 warp_clusters[WARPS];
  u32 warp_tokens[WARPS];
  u64 end;  // the first order number that is not selected
  u32 bin;
  u32 tokens_before;
  u32 num_candidates;
  u32 total_tokens;
};

struct Arguments {
  const int* item_indptr;            // [num_rows + 1]
  const int* item_place;             // [max_items]
  const int* token_budget;           // [num_rows]
  const int* chunk_indptr;           // [num_rows + 1]
  const u16* cluster_sizes;          // [P, NUM_KV_HEADS, CLUSTERS]
  const u16* member_begin;           // [P, NUM_KV_HEADS, CLUSTERS]
  const u16* members;                // [P, NUM_KV_HEADS, SEGMENT_SIZE]
  const int* segment_slots;          // [P, SEGMENT_SIZE]
  const u16* cluster_weight;         // [max_items * TILES, NUM_KV_HEADS, GROUP, TILE_CLUSTERS] fp16
  const float* weight_shift;         // [max_items * TILES, NUM_KV_HEADS, GROUP]
  const float* part_max;             // [max_chunks, NUM_KV_HEADS, GROUP]
  const float* part_sum;             // [max_chunks, NUM_KV_HEADS, GROUP]
  const float* part_acc;             // [max_chunks, NUM_KV_HEADS, GROUP, HEAD_DIM]
  float* merged_max;                 // [num_rows, NUM_KV_HEADS, GROUP]
  float* merged_sum;                 // [num_rows, NUM_KV_HEADS, GROUP]
  float* merged_acc;                 // [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM]
  u32* long_row_ranks;               // [max_items, NUM_KV_HEADS, CLUSTERS], of long rows
  int* selected_clusters;            // [num_rows, NUM_KV_HEADS, cluster_capacity]
  int* selected_slots;               // [num_rows, NUM_KV_HEADS, slot_capacity]
  int* num_selected_clusters;        // [num_rows, NUM_KV_HEADS]
  int* num_selected_tokens;
  int* num_clustered_tokens;
  int num_row_heads;
  int resident_capacity;             // clusters
  int cluster_capacity;
  int slot_capacity;
  int budget_capacity;
};

__device__ __forceinline__ float float_of_half(u32 bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)bits));
  return y;
}
