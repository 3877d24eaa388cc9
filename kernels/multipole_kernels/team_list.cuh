// The list of a row's selected clusters and of their tokens' KV slots, each block its own clusters'.

#pragma once

#include "team_selection.cuh"

// How the row's selected tokens are dealt: each block takes as many, the last ones fewer.
struct Deal {
  u32 num_tokens, of_block, reciprocal;

  __device__ __forceinline__ explicit Deal(u32 num_tokens)
      : num_tokens(num_tokens),
        of_block(max(1, (num_tokens + TEAM - 1) / TEAM)),
        // rounded up: exact for all products below 2^32
        reciprocal(of_block == 1 ? 0 : 0xffffffffu / of_block + 1) {}
  __device__ __forceinline__ u32 first(int block) const {
    return min(num_tokens, block * of_block);
  }
  __device__ __forceinline__ int block_of(u32 token) const {
    return of_block == 1 ? token : __umulhi(token, reciprocal);
  }
  // whether slots are told, or read from global memory
  __device__ __forceinline__ bool is_told() const { return of_block <= BLOCK_SLOTS; }
};

// The slot of the row's nth selected token: into the list, and to the block that attends to it.
__device__ __forceinline__ void put_slot(const Share& share, int* slots, const Deal& deal, u32 nth,
                                         int slot) {
  slots[nth] = slot;
  prefetch_row(row_of_slot(share.keys(), slot, share.a.stride_slot));
  prefetch_row(row_of_slot(share.values(), slot, share.a.stride_slot));
  if (!deal.is_told()) return;
  const int to = deal.block_of(nth);
  tell(Remote(share.shared, &share.shared.slots[nth - to * deal.of_block], SLOTS, to), (u32)slot);
}

// Write the slots of the listed clusters' tokens: each set of lanes takes CLUSTERS_AT_ONCE clusters,
// each lane TOKENS_PER_LANE tokens of each.
//
// Loads are not predicated but repeat a valid one, so that all of a kind are in flight together.
template <int CLUSTERS_AT_ONCE, int TOKENS_PER_LANE>
__device__ void write_slots(const Share& share, int num_listed, int* slots, const Deal& deal) {
  constexpr int SETS = THREADS / CLUSTER_LANES;
  const int set = threadIdx.x / CLUSTER_LANES, lane = threadIdx.x % CLUSTER_LANES;
#pragma unroll 1
  for (int first = set; first < num_listed; first += CLUSTERS_AT_ONCE * SETS) {
    const u16* members[CLUSTERS_AT_ONCE];
    const int* segment_slots[CLUSTERS_AT_ONCE];
    int first_token[CLUSTERS_AT_ONCE], size[CLUSTERS_AT_ONCE], largest = 0;
#pragma unroll
    for (int nth = 0; nth < CLUSTERS_AT_ONCE; ++nth) {
      const ListedCluster cluster = share.shared.list[min(first + nth * SETS, num_listed - 1)];
      const size_t head = (size_t)cluster.place * NUM_KV_HEADS + share.kv_head;
      members[nth] = share.a.members + head * SEGMENT_SIZE + (cluster.members >> 16);
      segment_slots[nth] = share.a.segment_slots + (size_t)cluster.place * SEGMENT_SIZE;
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
          // behind the list its last cluster comes again
          if (token < size[nth] && first + nth * SETS < num_listed)
            put_slot(share, slots, deal, first_token[nth] + token, slot[nth][i]);
        }
    }
  }
}

// List the block's clusters below `end` and their tokens, LIST clusters at a time.
//
// Returns the row's selected tokens.
__device__ u32 list_selected(const Share& share, u64 end) {
  Shared& shared = share.shared;
  const Arguments& a = share.a;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 of_lane_clusters = lane < WARPS ? shared.warp_clusters[lane] : 0;
  const u32 of_lane_tokens = lane < WARPS ? shared.warp_tokens[lane] : 0;
  const u32 num_listed = warp_sum(of_lane_clusters);
  u32 clusters_of_block = 0, tokens_of_block = 0;
  if (lane < TEAM) {
    clusters_of_block = shared.counts[lane].clusters + shared.accepted_clusters[lane];
    tokens_of_block = shared.counts[lane].tokens + shared.accepted_tokens[lane];
  }
  const u32 row_clusters = warp_sum(clusters_of_block), row_tokens = warp_sum(tokens_of_block);
  const u32 first_of_block = warp_sum(lane < share.block ? clusters_of_block : 0);
  const u32 token_of_block = warp_sum(lane < share.block ? tokens_of_block : 0);
  const u32 first_of_warp = warp_sum(lane < warp ? of_lane_clusters : 0);
  const u32 token_of_warp = token_of_block + warp_sum(lane < warp ? of_lane_tokens : 0);
  if (share.block == 0 && threadIdx.x == 0) {
    a.num_selected_clusters[share.row_head] = row_clusters;
    a.num_selected_tokens[share.row_head] = row_tokens;
    a.num_clustered_tokens[share.row_head] = shared.row_tokens;
  }

  int* clusters = a.selected_clusters + (size_t)share.row_head * a.cluster_capacity + first_of_block;
  int* slots = a.selected_slots + (size_t)share.row_head * a.slot_capacity;
  const u32 warp_begin = warp * share.warp_clusters();
  const u32 warp_end = min(warp_begin + share.warp_clusters(), share.num_clusters);
  const Deal deal(row_tokens);
#pragma unroll 1
  for (u32 list_begin = 0; list_begin < num_listed; list_begin += LIST) {
    u32 nth = first_of_warp, token = token_of_warp;
#pragma unroll 1
    for (u32 first = warp_begin; first < warp_end; first += 32) {
      const u32 cluster = first + lane;
      bool selected = false;
      if (cluster < warp_end) {
        selected = share.order(cluster) < end;
      }
      const u32 bits = __ballot_sync(FULL_WARP, selected);
      if (bits == 0) continue;
      const u32 members = selected ? share.entry(cluster).members : 0;
      const u32 size = members & 0xffff;
      const u32 inclusive = inclusive_warp_sum(size, lane);
      const u32 in_list = nth + __popc(bits & ((1u << lane) - 1)) - list_begin;
      if (selected && in_list < LIST) {
        clusters[list_begin + in_list] = share.first_cluster + cluster;
        shared.list[in_list] = ListedCluster{token + inclusive - size, (u32)share.place(cluster), members};
      }
      nth += __popc(bits);
      token += __shfl_sync(FULL_WARP, inclusive, 31);
    }
    __syncthreads();
    const int listed = min(num_listed - list_begin, (u32)LIST);
    write_slots<(TEAM >= 8 ? 1 : 2), 2>(share, listed, slots, deal);
    __syncthreads();
  }
  return row_tokens;
}
