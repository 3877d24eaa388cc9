// A block's share of its row: which clusters and tokens, and where it keeps what it knows of them.

#pragma once

#include "team_messages.cuh"
#include "team_products.cuh"

// What one block does for its (row, KV head).
struct Share {
  const Arguments& a;
  Shared& shared;
  int block;  // of the team
  int row, kv_head, row_head;
  int item_begin;
  u32 row_clusters;
  u32 first_cluster, num_clusters;  // of the row's: this block's, in whole units
  int row_exact;                    // always-exact tokens
  int exact_begin, num_exact;       // this block's, in exact_slots
  const u16* q;                     // [GROUP, HEAD_DIM]
  // in shared memory, if resident; else in global memory
  bool resident;
  ClusterEntry* entries;  // [num_clusters]; else from the pool's tables
  int* places;            // [segments]; else from the plan
  float *scores, *long_scores;  // [num_clusters, HEAD_STRIDE], later weights
  u32 *ranks, *long_ranks;      // [num_clusters] distances
  float *spread, *long_spread;  // [segments, HEAD_STRIDE], from the block's first segment on

  __device__ __forceinline__ u32 nth_segment(u32 cluster) const {
    return (first_cluster + cluster) / CLUSTERS - first_cluster / CLUSTERS;
  }
  // segments that the block has clusters of
  __device__ __forceinline__ u32 num_segments() const {
    return num_clusters == 0 ? 0 : nth_segment(num_clusters - 1) + 1;
  }
  __device__ __forceinline__ int place_of_segment(u32 segment) const {
    if (resident) return places[segment];
    return a.item_place[item_begin + first_cluster / CLUSTERS + segment];
  }
  __device__ __forceinline__ int place(u32 cluster) const {
    return place_of_segment(nth_segment(cluster));
  }
  // of one of the block's clusters in the pool's tables
  __device__ __forceinline__ size_t table(u32 cluster) const {
    return ((size_t)place(cluster) * NUM_KV_HEADS + kv_head) * CLUSTERS +
           (first_cluster + cluster) % CLUSTERS;
  }
  __device__ __forceinline__ ClusterEntry entry(u32 cluster) const {
    if (resident) return entries[cluster];
    const size_t at = table(cluster);
    ClusterEntry loaded{a.key_variance[at], 1.0f, 1.0f,
                        (u32)a.member_begin[at] << 16 | a.cluster_sizes[at]};
    if constexpr (EIGHT_BITS) {
      loaded.key_scale = a.key_scale[at];
      loaded.value_scale = a.value_scale[at];
    }
    return loaded;
  }
  __device__ __forceinline__ OfHeads spread_of(u32 cluster) const {
    OfHeads of;
    const u32 segment = nth_segment(cluster);
    if (resident)
      of.load(spread + segment * HEAD_STRIDE);
    else
      of.load(long_spread + (size_t)segment * NUM_KV_HEADS * HEAD_STRIDE);
    return of;
  }
  __device__ __forceinline__ void set_spread(u32 segment, int group, float x) const {
    if (resident)
      spread[segment * HEAD_STRIDE + group] = x;
    else
      long_spread[(size_t)segment * NUM_KV_HEADS * HEAD_STRIDE + group] = x;
  }
  __device__ __forceinline__ OfHeads scores_of(u32 cluster) const {
    OfHeads of;
    if (resident)
      of.load(scores + cluster * HEAD_STRIDE);
    else
      of.load(long_scores + (size_t)cluster * HEAD_STRIDE);
    return of;
  }
  __device__ __forceinline__ void set_scores(u32 cluster, const OfHeads& of) const {
    if (resident)
      of.store(scores + cluster * HEAD_STRIDE);
    else
      of.store(long_scores + (size_t)cluster * HEAD_STRIDE);
  }
  // of two query heads
  __device__ __forceinline__ void set_scores(u32 cluster, int group, float x, float y) const {
    if (resident)
      *reinterpret_cast<float2*>(scores + cluster * HEAD_STRIDE + group) = {x, y};
    else
      *reinterpret_cast<float2*>(long_scores + (size_t)cluster * HEAD_STRIDE + group) = {x, y};
  }
  __device__ __forceinline__ float score(u32 cluster, int group) const {
    if (resident) return scores[cluster * HEAD_STRIDE + group];
    return long_scores[(size_t)cluster * HEAD_STRIDE + group];
  }
  __device__ __forceinline__ void set_rank(u32 cluster, u32 distance) const {
    if (resident)
      ranks[cluster] = distance;
    else
      long_ranks[cluster] = distance;
  }
  // of the KV head in slot 0
  __device__ __forceinline__ const u8* keys() const {
    return reinterpret_cast<const u8*>(a.k_cache + kv_head * HEAD_DIM);
  }
  __device__ __forceinline__ const u8* values() const {
    return reinterpret_cast<const u8*>(a.v_cache + kv_head * HEAD_DIM);
  }
  // Clusters of a warp are neighbours, so that lists of what warps find are in order.
  __device__ __forceinline__ u32 warp_clusters() const {
    return (num_clusters + THREADS - 1) / THREADS * 32;
  }
  __device__ __forceinline__ u64 order(u32 cluster) const {
    const u32 distance = resident ? ranks[cluster] : long_ranks[cluster];
    return (u64)distance << 32 | (first_cluster + cluster);
  }
};

// A thread's part of the block's clusters: those from `from` up to `to` of one segment.
struct SegmentShare {
  u32 from, to;  // of the block's
  int place;
  u32 within;  // the segment, of `from`

  // The last threads have parts: the first ones have most to do.
  __device__ __forceinline__ SegmentShare(const Share& share) : from(0), to(0) {
    const u32 begin = share.first_cluster, end = begin + share.num_clusters;
    const u32 nth = THREADS - 1 - threadIdx.x, segment = begin / CLUSTERS + nth;
    if (nth >= share.num_segments()) return;
    from = max(begin, segment * CLUSTERS) - begin;
    to = min(end, (segment + 1) * CLUSTERS) - begin;
    place = share.place_of_segment(nth);
    within = (begin + from) % CLUSTERS;
  }
  __device__ __forceinline__ size_t head(const Share& share) const {
    return (size_t)place * NUM_KV_HEADS + share.kv_head;
  }
};

constexpr int CENTROID_ROW = HEAD_DIM * CENTROID_BYTES;  // bytes

// Bring the block's key or value centroids into L2.
__device__ __forceinline__ void prefetch_centroids(const Share& share, const SegmentShare& part,
                                                   const u8* centroids) {
  if (part.from < part.to)
    prefetch(centroids + (part.head(share) * CLUSTERS + part.within) * CENTROID_ROW,
             (part.to - part.from) * CENTROID_ROW);
}

// Bring into L2 what the list needs of the clusters: about their part of the segment's members, and of
// the slots.
__device__ __forceinline__ void prefetch_members(const Share& share, const SegmentShare& part) {
  constexpr int TOKENS = SEGMENT_SIZE / CLUSTERS;
  if (part.from >= part.to) return;
  const u32 first = part.within * TOKENS, count = (part.to - part.from) * TOKENS;
  prefetch(share.a.members + part.head(share) * SEGMENT_SIZE + first, count * 2);
  prefetch(share.a.segment_slots + (size_t)part.place * SEGMENT_SIZE + first, count * 4);
}

// Load the clusters' entries into shared memory, four clusters a thread.
__device__ __forceinline__ void load_entries(const Share& share) {
  if (!share.resident) return;
  const Arguments& a = share.a;
#pragma unroll 1
  for (u32 cluster = 4 * threadIdx.x; cluster < share.num_clusters; cluster += 4 * THREADS) {
    const size_t at = share.table(cluster);
    const float4 variance = *reinterpret_cast<const float4*>(a.key_variance + at);
    const uint2 size = *reinterpret_cast<const uint2*>(a.cluster_sizes + at);
    const uint2 begin = *reinterpret_cast<const uint2*>(a.member_begin + at);
    float4 key_scale = {1.0f, 1.0f, 1.0f, 1.0f}, value_scale = key_scale;
    if constexpr (EIGHT_BITS) {
      key_scale = *reinterpret_cast<const float4*>(a.key_scale + at);
      value_scale = *reinterpret_cast<const float4*>(a.value_scale + at);
    }
    ClusterEntry* entries = share.entries + cluster;
    entries[0] = {variance.x, key_scale.x, value_scale.x, bytes_of(size.x, begin.x, 0x5410)};
    entries[1] = {variance.y, key_scale.y, value_scale.y, bytes_of(size.x, begin.x, 0x7632)};
    entries[2] = {variance.z, key_scale.z, value_scale.z, bytes_of(size.y, begin.y, 0x5410)};
    entries[3] = {variance.w, key_scale.w, value_scale.w, bytes_of(size.y, begin.y, 0x7632)};
  }
}
