// The list of the selected clusters, in order, and of their tokens' KV slots.

#pragma once

#include "cluster_search.cuh"

// Write the slots of the listed clusters' tokens: each team of lanes takes CLUSTERS_AT_ONCE
// clusters, each lane TOKENS_PER_LANE tokens of each.
//
// Loads are not predicated but repeat a valid one, so that all of a kind are in flight together.
template <int CLUSTERS_AT_ONCE, int TOKENS_PER_LANE>
__device__ void write_slots(const Arguments& a, int kv_head, const ListedCluster* list,
                            int num_listed, int* slots) {
  constexpr int TEAMS = THREADS / CLUSTER_LANES;
  const int team = threadIdx.x / CLUSTER_LANES, lane = threadIdx.x % CLUSTER_LANES;
#pragma unroll 1
  for (int first = team; first < num_listed; first += CLUSTERS_AT_ONCE * TEAMS) {
    const u16* members[CLUSTERS_AT_ONCE];
    const int* segment_slots[CLUSTERS_AT_ONCE];
    int first_token[CLUSTERS_AT_ONCE], size[CLUSTERS_AT_ONCE], largest = 0;
#pragma unroll
    for (int nth = 0; nth < CLUSTERS_AT_ONCE; ++nth) {
      const ListedCluster cluster = list[min(first + nth * TEAMS, num_listed - 1)];
      const size_t head = (size_t)cluster.place * NUM_KV_HEADS + kv_head;
      members[nth] = a.members + head * SEGMENT_SIZE + (cluster.members >> 16);
      segment_slots[nth] = a.segment_slots + (size_t)cluster.place * SEGMENT_SIZE;
      first_token[nth] = cluster.first_token;
      size[nth] = cluster.members & 0xffff;
      largest = max(largest, size[nth]);
    }
#pragma unroll 1
    for (int begin = 0; begin < largest; begin += CLUSTER_LANES * TOKENS_PER_LANE) {
      u32 member[CLUSTERS_AT_ONCE][TOKENS_PER_LANE];
      int slot[CLUSTERS_AT_ONCE][TOKENS_PER_LANE];
#pragma unroll
      for (int nth = 0; nth < CLUSTERS_AT_ONCE; ++nth)
#pragma unroll
        for (int i = 0; i < TOKENS_PER_LANE; ++i)
          member[nth][i] = members[nth][min(begin + i * CLUSTER_LANES + lane, size[nth] - 1)];
#pragma unroll
      for (int nth = 0; nth < CLUSTERS_AT_ONCE; ++nth)
#pragma unroll
        for (int i = 0; i < TOKENS_PER_LANE; ++i)
          slot[nth][i] = segment_slots[nth][member[nth][i]];
#pragma unroll
      for (int nth = 0; nth < CLUSTERS_AT_ONCE; ++nth)
#pragma unroll
        for (int i = 0; i < TOKENS_PER_LANE; ++i) {
          const int token = begin + i * CLUSTER_LANES + lane;
          // behind the list its last cluster is written again, with the same slots
          if (token < size[nth]) slots[first_token[nth] + token] = slot[nth][i];
        }
    }
  }
}

// Step 4: the clusters below `end` and their slots, LIST clusters at a time.
template <bool RESIDENT>
__device__ void list_selected(const RowHead<RESIDENT>& row, Shared& shared, u64 end, int row_head) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Limit limit(end);
  const u32 of_lane_clusters = lane < WARPS ? shared.warp_clusters[lane] : 0;
  const u32 of_lane_tokens = lane < WARPS ? shared.warp_tokens[lane] : 0;
  const u32 num_clusters = warp_sum(of_lane_clusters), num_tokens = warp_sum(of_lane_tokens);
  const u32 clusters_before = warp_sum(lane < warp ? of_lane_clusters : 0);
  const u32 tokens_before = warp_sum(lane < warp ? of_lane_tokens : 0);
  if (thread == 0) {
    row.a.num_selected_clusters[row_head] = num_clusters;
    row.a.num_selected_tokens[row_head] = num_tokens;
    row.a.num_clustered_tokens[row_head] = shared.total_tokens;
  }

  int* clusters = row.a.selected_clusters + (size_t)row_head * row.a.cluster_capacity;
  int* slots = row.a.selected_slots + (size_t)row_head * row.a.slot_capacity;
  const int vectors_begin = warp * row.warp_vectors();
  const int vectors_end = min(vectors_begin + row.warp_vectors(), row.num_vectors);
  for (u32 list_begin = 0; list_begin < num_clusters; list_begin += LIST) {
    u32 nth = clusters_before, token = tokens_before;
#pragma unroll 1
    for (int first = vectors_begin; first < vectors_end; first += 32) {
      const int vector = first + lane;
      u32 bits = vector < vectors_end ? bits_below(limit, row.ranks_of(vector), vector) : 0;
      if (!__any_sync(FULL_WARP, bits)) continue;
      const Sizes sizes = bits ? row.sizes_of(vector) : Sizes{};
      // 128 clusters have less than 2^24 tokens
      const u32 packed = tokens_of(bits, sizes) << 8 | __popc(bits);
      const u32 inclusive = inclusive_warp_sum(packed, lane);
      u32 in_list = nth + ((inclusive - packed) & 0xff) - list_begin;
      u32 first_token = token + ((inclusive - packed) >> 8);
#pragma unroll 1
      for (; bits; bits &= bits - 1) {
        const int i = __ffs(bits) - 1;
        const u32 cluster = vector * VECTOR + i;
        if (in_list < LIST) {
          clusters[list_begin + in_list] = cluster;
          shared.list[in_list] = ListedCluster{first_token, (u32)row.place(cluster),
                                               row.begin(cluster) << 16 | sizes[i]};
        }
        ++in_list;
        first_token += sizes[i];
      }
      const u32 total = __shfl_sync(FULL_WARP, inclusive, 31);
      nth += total & 0xff;
      token += total >> 8;
    }
    __syncthreads();
    const int num_listed = min(num_clusters - list_begin, (u32)LIST);
    if (num_listed <= THREADS / CLUSTER_LANES)
      write_slots<1, 4>(row.a, row.kv_head, shared.list, num_listed, slots);
    else
      write_slots<4, 2>(row.a, row.kv_head, shared.list, num_listed, slots);
    __syncthreads();
  }
}
