// The rank of a cluster: the sum over the query heads g of exp(score_g - lse_g).
//
// lse_g is the log of the full denominator, over the row's coarse parts. The kept weights are
// exp(score - shift), so that a rank costs one multiplication a cluster and head.

#pragma once

#include "coarse_parts.cuh"

// The sizes of a vector's clusters.
struct Sizes {
  uint2 packed;
  __device__ __forceinline__ u32 operator[](int i) const {
    return (i < 2 ? packed.x : packed.y) >> (i % 2 * 16) & 0xffff;
  }
};

// One (row, KV head)'s clusters: their ranks, and the pool's tables of them.
template <bool RESIDENT>
struct RowHead {
  const Arguments& a;
  int kv_head, item_begin, num_vectors;
  u32* ranks;           // distances, in shared memory if RESIDENT, else in a.long_row_ranks
  // in shared memory, if RESIDENT
  u16 *sizes, *begins;
  int* places;

  // of a segment's clusters in the pool's tables
  __device__ __forceinline__ size_t table(int place) const {
    return ((size_t)place * NUM_KV_HEADS + kv_head) * CLUSTERS;
  }
  __device__ __forceinline__ int place(u32 cluster) const {
    return RESIDENT ? places[cluster / CLUSTERS] : a.item_place[item_begin + cluster / CLUSTERS];
  }
  __device__ __forceinline__ u32 size(u32 cluster) const {
    if constexpr (RESIDENT) return sizes[cluster];
    return a.cluster_sizes[table(place(cluster)) + cluster % CLUSTERS];
  }
  __device__ __forceinline__ u32 begin(u32 cluster) const {
    if constexpr (RESIDENT) return begins[cluster];
    return a.member_begin[table(place(cluster)) + cluster % CLUSTERS];
  }
  __device__ __forceinline__ Sizes sizes_of(int vector) const {
    if constexpr (RESIDENT) return Sizes{reinterpret_cast<const uint2*>(sizes)[vector]};
    const size_t at = table(place(vector * VECTOR)) / VECTOR + vector % SEGMENT_VECTORS;
    return Sizes{reinterpret_cast<const uint2*>(a.cluster_sizes)[at]};
  }
  __device__ __forceinline__ uint4 ranks_of(int vector) const {
    return reinterpret_cast<const uint4*>(ranks)[vector];
  }
  // The vectors of a warp are neighbours: lists of what warps find are in order.
  __device__ __forceinline__ int warp_vectors() const {
    return (num_vectors + THREADS - 1) / THREADS * 32;
  }
};

// VECTOR clusters as they lie in global memory.
struct Vector {
  int place;
  Sizes sizes;
  uint2 begins;         // VECTOR 16-bit numbers
  uint2 weight[GROUP];  // VECTOR fp16 each
  float shift[GROUP];

  template <bool RESIDENT>
  __device__ __forceinline__ void load_place(const RowHead<RESIDENT>& row, int vector) {
    place = row.a.item_place[row.item_begin + vector / SEGMENT_VECTORS];
  }
  template <bool RESIDENT>
  __device__ __forceinline__ void load_tables(const RowHead<RESIDENT>& row, int vector) {
    const size_t at = row.table(place) / VECTOR + vector % SEGMENT_VECTORS;
    sizes.packed = reinterpret_cast<const uint2*>(row.a.cluster_sizes)[at];
    if constexpr (RESIDENT) begins = reinterpret_cast<const uint2*>(row.a.member_begin)[at];
  }
  template <bool RESIDENT>
  __device__ __forceinline__ void load_weights(const RowHead<RESIDENT>& row, int vector) {
    const size_t tile = (size_t)row.item_begin * TILES + vector / TILE_VECTORS;
    const size_t tile_head = tile * NUM_KV_HEADS + row.kv_head;
    const uint2* weights = reinterpret_cast<const uint2*>(row.a.cluster_weight) +
                           tile_head * GROUP * TILE_VECTORS + vector % TILE_VECTORS;
#pragma unroll
    for (int group = 0; group < GROUP; ++group) weight[group] = weights[group * TILE_VECTORS];
    if constexpr (GROUP % 4 == 0) {
      const float4* shifts =
          reinterpret_cast<const float4*>(row.a.weight_shift) + tile_head * (GROUP / 4);
#pragma unroll
      for (int four = 0; four < GROUP / 4; ++four) {
        const float4 loaded = shifts[four];
        shift[4 * four] = loaded.x;
        shift[4 * four + 1] = loaded.y;
        shift[4 * four + 2] = loaded.z;
        shift[4 * four + 3] = loaded.w;
      }
    } else {
#pragma unroll
      for (int group = 0; group < GROUP; ++group)
        shift[group] = row.a.weight_shift[tile_head * GROUP + group];
    }
  }
};

__device__ __forceinline__ void clear_histogram(Shared& shared) {
  for (int nth = threadIdx.x; nth < BINS / 4; nth += THREADS)
    reinterpret_cast<uint4*>(shared.histogram)[nth] = uint4{0, 0, 0, 0};
}

// Steps 1 and 2's first bins: ranks, their histogram, the sum of all sizes.
template <bool RESIDENT>
__device__ void rank_clusters(const RowHead<RESIDENT>& row, Shared& shared, int part_begin,
                              int part_end) {
  constexpr int STRIDE = VECTORS_AT_ONCE * THREADS;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  Vector vectors[VECTORS_AT_ONCE];
  // what the coarse launch does not write is loaded before its end
#pragma unroll
  for (int nth = 0; nth < VECTORS_AT_ONCE; ++nth)
    if (thread + nth * THREADS < row.num_vectors)
      vectors[nth].load_place(row, thread + nth * THREADS);
  clear_histogram(shared);
#pragma unroll
  for (int nth = 0; nth < VECTORS_AT_ONCE; ++nth)
    if (thread + nth * THREADS < row.num_vectors)
      vectors[nth].load_tables(row, thread + nth * THREADS);
  wait_for_predecessor();
  // in flight while lse is computed
#pragma unroll
  for (int nth = 0; nth < VECTORS_AT_ONCE; ++nth)
    if (thread + nth * THREADS < row.num_vectors)
      vectors[nth].load_weights(row, thread + nth * THREADS);

  for (int group = warp; group < GROUP; group += WARPS) {
    float merged_max, merged_sum;
    merge_sums(row.a, part_begin, part_end, row.kv_head, group, lane, merged_max, merged_sum);
    if (lane == 0) shared.per_group[group] = merged_max + log2f(merged_sum);
  }
  __syncthreads();

  u32 tokens = 0;
  for (int first = thread; first < row.num_vectors; first += STRIDE) {
#pragma unroll
    for (int nth = 0; nth < VECTORS_AT_ONCE; ++nth) {
      const int vector = first + nth * THREADS;
      if (vector < row.num_vectors) {
        const Vector& loaded = vectors[nth];
        float rank[VECTOR] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int group = 0; group < GROUP; ++group) {
          const float factor = power_of_2(loaded.shift[group] - shared.per_group[group]);
          rank[0] += float_of_half(loaded.weight[group].x & 0xffff) * factor;
          rank[1] += float_of_half(loaded.weight[group].x >> 16) * factor;
          rank[2] += float_of_half(loaded.weight[group].y & 0xffff) * factor;
          rank[3] += float_of_half(loaded.weight[group].y >> 16) * factor;
        }
        u32 distance[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          // ranks are not negative: their bits are ordered as they are
          distance[i] = RANK_BITS_TOP - min(__float_as_uint(rank[i]), RANK_BITS_TOP);
          const u32 bin = distance[i] >> (FIRST_SHIFT - 32);
          const u32 size = loaded.sizes[i];
          if (size == 0)
            distance[i] = EMPTY;
          else if (bin < BINS)
            atomicAdd(&shared.histogram[bin], size);
          tokens += size;
        }
        reinterpret_cast<uint4*>(row.ranks)[vector] =
            uint4{distance[0], distance[1], distance[2], distance[3]};
        if constexpr (RESIDENT) {
          reinterpret_cast<uint2*>(row.sizes)[vector] = loaded.sizes.packed;
          reinterpret_cast<uint2*>(row.begins)[vector] = loaded.begins;
          if (vector % SEGMENT_VECTORS == 0) row.places[vector / SEGMENT_VECTORS] = loaded.place;
        }
      }
      if (vector + STRIDE < row.num_vectors) {
        vectors[nth].load_place(row, vector + STRIDE);
        vectors[nth].load_weights(row, vector + STRIDE);
        vectors[nth].load_tables(row, vector + STRIDE);
      }
    }
  }
  tokens = warp_sum(tokens);
  if (lane == 0) atomicAdd(&shared.total_tokens, tokens);
  __syncthreads();
}
