// Cluster selection: a block selects for one (row, KV head), a second one merges its coarse parts.
//
// CUDA C++, because the search needs sums of sizes by rank in shared memory. The steps:
//
//   1. ranks       kept as their distance from 32.0: an order number (distance, cluster) is unique,
//                  and smaller is better                                      (cluster_rank.cuh)
//   2. search      where the budget ends the list                             (cluster_search.cuh)
//   3. list        clusters before the end, by number, and their tokens' slots (cluster_list.cuh)
//
// A row of up to resident_capacity clusters is held in shared memory; a longer one keeps its ranks
// in global memory and reads sizes again. One multiprocessor works on thousands of clusters, so
// instructions count: clusters are looked at four at a time, and most are passed over.

#include "cluster_list.cuh"

template <bool RESIDENT>
__device__ void select_clusters(const Arguments& a, Shared& shared, char* tables, int row_head) {
  const int row_of_batch = row_head / NUM_KV_HEADS, kv_head = row_head % NUM_KV_HEADS;
  const int item_begin = a.item_indptr[row_of_batch];
  const int num_clusters = (a.item_indptr[row_of_batch + 1] - item_begin) * CLUSTERS;
  const u32 budget = min(a.token_budget[row_of_batch], a.budget_capacity);
  const int part_begin = a.chunk_indptr[row_of_batch];
  const int part_end = a.chunk_indptr[row_of_batch + 1];
  u32* ranks = reinterpret_cast<u32*>(tables);
  u16* sizes = reinterpret_cast<u16*>(ranks + a.resident_capacity);
  u16* begins = sizes + a.resident_capacity;
  int* places = reinterpret_cast<int*>(begins + a.resident_capacity);
  if constexpr (!RESIDENT)
    ranks = a.long_row_ranks + (size_t)item_begin * (NUM_KV_HEADS * CLUSTERS) +
            (size_t)kv_head * num_clusters;
  const RowHead<RESIDENT> row{a,     kv_head, item_begin, num_clusters / VECTOR,
                              ranks, sizes,   begins,     places};

  if (threadIdx.x == 0) {
    shared.total_tokens = 0;
    shared.end = 0;
  }
  // synchronises before the first use of either
  rank_clusters(row, shared, part_begin, part_end);
  u64 end;
  if (shared.total_tokens > budget) {
    end = find_end(row, shared, budget);
  } else {
    end = (u64)(RANK_BITS_TOP + 1) << 32;  // behind every cluster that has tokens
    count_and_collect(row, shared, end, end);
    __syncthreads();
  }
  list_selected(row, shared, end, row_head);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cluster_selection(const __grid_constant__ Arguments a) {
  __shared__ Shared shared;
  extern __shared__ __align__(16) char tables[];
  const int row_head = blockIdx.x % a.num_row_heads;
  if ((int)blockIdx.x >= a.num_row_heads) {
    merge_parts(a, shared, row_head);
    return;
  }
  const int* items = a.item_indptr + row_head / NUM_KV_HEADS;
  if ((items[1] - items[0]) * CLUSTERS <= a.resident_capacity)
    select_clusters<true>(a, shared, tables, row_head);
  else
    select_clusters<false>(a, shared, tables, row_head);
}
