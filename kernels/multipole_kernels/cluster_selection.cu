// Cluster selection: one block selects for one (row, KV head), a second one merges its coarse parts.
//
// CUDA C++, because the search needs sums of sizes by rank in shared memory. The steps of a selection:
//
//   1. ranks       sum over g of weight_g * 2^(shift_g - lse_g), kept as their distance from 32.0:
//                  an order number (distance, cluster) is unique, and smaller is better
//   2. search      tokens by bin of the order numbers; the first bin that passes the budget is the
//                  boundary; while it holds too many clusters, it is cut into bins in its turn
//   3. boundary    each of its clusters counts the tokens before it: the budget ends the list there
//   4. list        clusters below the end, by number, and the slots of their tokens
//
// A row of up to resident_capacity clusters is held in shared memory; a longer one keeps its ranks
// in global memory and reads sizes again. What the coarse launch does not write (places, sizes) is
// loaded before its end.
//
// Given by the launcher: NUM_KV_HEADS, GROUP, HEAD_DIM, CLUSTERS, SEGMENT_SIZE, THREADS.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 FULL_WARP = 0xffffffffu;
constexpr int WARPS = THREADS / 32;
constexpr int VECTOR = 4;  // clusters a thread loads together
constexpr int SEGMENT_VECTORS = CLUSTERS / VECTOR;
constexpr int VECTORS_AT_ONCE = GROUP <= 4 ? 2 : 1;
// a rank is at most GROUP, which is at most 16; ranks above 32 (of NaN) count as 32
constexpr u32 RANK_BITS_TOP = 0x42000000u;
constexpr u32 EMPTY = 0xffffffffu;  // distance of a cluster without tokens
// the first bins are 2^-7 of an octave wide and reach 32 octaves down
constexpr int BIN_BITS = 12;
constexpr int BINS = 1 << BIN_BITS;
constexpr int FIRST_SHIFT = 48;
constexpr int MAX_CANDIDATES = 256;
constexpr int CANDIDATE_THREADS = THREADS / MAX_CANDIDATES;
constexpr int LIST = 1024;  // clusters whose slots are written together
constexpr int CLUSTER_LANES = 16;

static_assert(THREADS % MAX_CANDIDATES == 0 && THREADS <= BINS / 4 && WARPS <= 32, "THREADS");
static_assert(CLUSTERS % VECTOR == 0 && HEAD_DIM % 4 == 0 && GROUP <= 16, "geometry");

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
  u32 list_end;
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
  const u16* cluster_weight;         // [max_items, NUM_KV_HEADS, GROUP, CLUSTERS] fp16
  const float* weight_shift;         // [max_items, NUM_KV_HEADS, GROUP]
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

// ------------------------------------------------------------------------------------ small parts

__device__ __forceinline__ void wait_for_coarse() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float float_of_half(u32 bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)bits));
  return y;
}

// the shift of an exponent: 0 for -inf, because -inf - (-inf) is NaN
__device__ __forceinline__ float finite_or_zero(float x) { return x == minus_infinity() ? 0.0f : x; }

__device__ __forceinline__ u32 warp_sum(u32 x) { return __reduce_add_sync(FULL_WARP, x); }

__device__ __forceinline__ u32 inclusive_warp_sum(u32 x, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    u32 lower = __shfl_up_sync(FULL_WARP, x, distance);
    x += lane >= distance ? lower : 0;
  }
  return x;
}

// sum of the lower warps' values, which were stored and synchronised before
__device__ __forceinline__ u32 sum_of_lower_warps(const u32* of_warp, int warp, int lane) {
  return warp_sum(lane < warp ? of_warp[lane] : 0);
}

// One query head's largest part maximum and the sum of weights relative to it, in all lanes.
__device__ void merge_sums(const Arguments& a, int begin, int end, int kv_head, int group, int lane,
                           float& merged_max, float& merged_sum) {
  float lane_max = minus_infinity(), lane_sum = 0.0f;
  for (int part = begin + lane; part < end; part += 32) {
    const size_t at = ((size_t)part * NUM_KV_HEADS + kv_head) * GROUP + group;
    const float part_max = a.part_max[at], part_sum = a.part_sum[at];
    const float new_max = fmaxf(lane_max, part_max);
    const float shift = finite_or_zero(new_max);
    lane_sum = lane_sum * power_of_2(lane_max - shift) + part_sum * power_of_2(part_max - shift);
    lane_max = new_max;
  }
  merged_max = lane_max;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    merged_max = fmaxf(merged_max, __shfl_xor_sync(FULL_WARP, merged_max, distance));
  merged_sum = lane_sum * power_of_2(lane_max - finite_or_zero(merged_max));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    merged_sum += __shfl_xor_sync(FULL_WARP, merged_sum, distance);
}

// --------------------------------------------------------------------------------- merge of parts

__device__ void merge_parts(const Arguments& a, Shared& shared, int row_head) {
  constexpr int COLUMNS = GROUP * HEAD_DIM / 4;  // of four dimensions
  constexpr int WAYS = COLUMNS < THREADS ? THREADS / COLUMNS : 1;
  constexpr int STEP = COLUMNS < THREADS ? COLUMNS : THREADS;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row = row_head / NUM_KV_HEADS, kv_head = row_head % NUM_KV_HEADS;
  const int begin = a.chunk_indptr[row], end = a.chunk_indptr[row + 1];
  wait_for_coarse();

  for (int group = warp; group < GROUP; group += WARPS) {
    float merged_max, merged_sum;
    merge_sums(a, begin, end, kv_head, group, lane, merged_max, merged_sum);
    if (lane == 0) {
      shared.per_group[group] = finite_or_zero(merged_max);
      a.merged_max[(size_t)row_head * GROUP + group] = merged_max;
      a.merged_sum[(size_t)row_head * GROUP + group] = merged_sum;
    }
  }
  __syncthreads();

  const int way = thread / STEP;
  for (int column = thread % STEP; column < COLUMNS; column += STEP) {
    const int group = column / (HEAD_DIM / 4);
    const float shift = shared.per_group[group];
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    if (way < WAYS) {
#pragma unroll 4
      for (int part = begin + way; part < end; part += WAYS) {
        const size_t head = (size_t)part * NUM_KV_HEADS + kv_head;
        const float weight = power_of_2(a.part_max[head * GROUP + group] - shift);
        const float4 acc = reinterpret_cast<const float4*>(a.part_acc)[head * COLUMNS + column];
        sum.x += weight * acc.x;
        sum.y += weight * acc.y;
        sum.z += weight * acc.z;
        sum.w += weight * acc.w;
      }
    }
    if (WAYS > 1) {  // then there is one column a thread
      shared.partial[thread] = sum;
      __syncthreads();
      if (way == 0) {
#pragma unroll
        for (int other = 1; other < WAYS; ++other) {
          const float4 partial = shared.partial[other * STEP + column];
          sum.x += partial.x;
          sum.y += partial.y;
          sum.z += partial.z;
          sum.w += partial.w;
        }
      }
    }
    if (way == 0)
      reinterpret_cast<float4*>(a.merged_acc)[(size_t)row_head * COLUMNS + column] = sum;
  }
}

// -------------------------------------------------------------------------------------- selection

// One (row, KV head)'s clusters: their ranks, and the pool's tables of them.
struct RowHead {
  const Arguments& a;
  int kv_head, item_begin, num_segments;
  u32 num_clusters;
  bool is_resident;
  u32* ranks;         // distances, in shared memory or in a.long_row_ranks
  u16 *sizes, *begins;  // in shared memory, if is_resident
  int* places;          // in shared memory, if is_resident

  __device__ __forceinline__ int place(u32 segment) const {
    return is_resident ? places[segment] : a.item_place[item_begin + segment];
  }
  // of a segment's clusters in the pool's tables
  __device__ __forceinline__ size_t table(int place) const {
    return ((size_t)place * NUM_KV_HEADS + kv_head) * CLUSTERS;
  }
  __device__ __forceinline__ u32 size(u32 cluster) const {
    if (is_resident) return sizes[cluster];
    return a.cluster_sizes[table(place(cluster / CLUSTERS)) + cluster % CLUSTERS];
  }
  __device__ __forceinline__ u32 begin(u32 cluster) const {
    if (is_resident) return begins[cluster];
    return a.member_begin[table(place(cluster / CLUSTERS)) + cluster % CLUSTERS];
  }
  __device__ __forceinline__ u64 order(u32 cluster) const {
    return (u64)ranks[cluster] << 32 | cluster;
  }
};

// Places, sizes and begins of a resident row, from the pool to shared memory.
__device__ void load_tables(const RowHead& row) {
  constexpr int AT_ONCE = 2;
  for (int segment = threadIdx.x; segment < row.num_segments; segment += THREADS)
    row.places[segment] = row.a.item_place[row.item_begin + segment];
  __syncthreads();
  const int num_vectors = row.num_segments * SEGMENT_VECTORS;
  for (int first = threadIdx.x; first < num_vectors; first += AT_ONCE * THREADS) {
    uint2 sizes[AT_ONCE], begins[AT_ONCE];
#pragma unroll
    for (int nth = 0; nth < AT_ONCE; ++nth) {
      const int vector = first + nth * THREADS;
      if (vector < num_vectors) {
        const size_t at = row.table(row.places[vector / SEGMENT_VECTORS]) / VECTOR +
                          vector % SEGMENT_VECTORS;
        sizes[nth] = reinterpret_cast<const uint2*>(row.a.cluster_sizes)[at];
        begins[nth] = reinterpret_cast<const uint2*>(row.a.member_begin)[at];
      }
    }
#pragma unroll
    for (int nth = 0; nth < AT_ONCE; ++nth) {
      const int vector = first + nth * THREADS;
      if (vector < num_vectors) {
        reinterpret_cast<uint2*>(row.sizes)[vector] = sizes[nth];
        reinterpret_cast<uint2*>(row.begins)[vector] = begins[nth];
      }
    }
  }
}

struct Weights {
  uint2 weight[GROUP];  // VECTOR fp16 each
  float shift[GROUP];
};

__device__ __forceinline__ void load_weights(const RowHead& row, int vector, Weights& weights) {
  const size_t item_head =
      (size_t)(row.item_begin + vector / SEGMENT_VECTORS) * NUM_KV_HEADS + row.kv_head;
#pragma unroll
  for (int group = 0; group < GROUP; ++group) {
    const size_t head = item_head * GROUP + group;
    weights.weight[group] = reinterpret_cast<const uint2*>(
        row.a.cluster_weight)[head * SEGMENT_VECTORS + vector % SEGMENT_VECTORS];
    weights.shift[group] = row.a.weight_shift[head];
  }
}

__device__ __forceinline__ void clear_histogram(Shared& shared) {
  for (int nth = threadIdx.x; nth < BINS / 4; nth += THREADS)
    reinterpret_cast<uint4*>(shared.histogram)[nth] = uint4{0, 0, 0, 0};
}

// Steps 1 and 2's first bins: ranks, their histogram, the sum of all sizes.
__device__ void rank_clusters(const RowHead& row, Shared& shared, int part_begin, int part_end) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int num_vectors = row.num_segments * SEGMENT_VECTORS;
  Weights weights[VECTORS_AT_ONCE];
  // in flight while lse is computed
#pragma unroll
  for (int nth = 0; nth < VECTORS_AT_ONCE; ++nth)
    if (thread + nth * THREADS < num_vectors)
      load_weights(row, thread + nth * THREADS, weights[nth]);

  for (int group = warp; group < GROUP; group += WARPS) {
    float merged_max, merged_sum;
    merge_sums(row.a, part_begin, part_end, row.kv_head, group, lane, merged_max, merged_sum);
    if (lane == 0) shared.per_group[group] = merged_max + log2f(merged_sum);
  }
  __syncthreads();

  u32 tokens = 0;
  for (int first = thread; first < num_vectors; first += VECTORS_AT_ONCE * THREADS) {
#pragma unroll
    for (int nth = 0; nth < VECTORS_AT_ONCE; ++nth) {
      const int vector = first + nth * THREADS;
      if (vector < num_vectors) {
        float rank[VECTOR] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int group = 0; group < GROUP; ++group) {
          const float factor = power_of_2(weights[nth].shift[group] - shared.per_group[group]);
          const uint2 weight = weights[nth].weight[group];
          rank[0] += float_of_half(weight.x & 0xffff) * factor;
          rank[1] += float_of_half(weight.x >> 16) * factor;
          rank[2] += float_of_half(weight.y & 0xffff) * factor;
          rank[3] += float_of_half(weight.y >> 16) * factor;
        }
        uint2 packed;
        if (row.is_resident) {
          packed = reinterpret_cast<const uint2*>(row.sizes)[vector];
        } else {
          const size_t table = row.table(row.place(vector / SEGMENT_VECTORS));
          packed = reinterpret_cast<const uint2*>(
              row.a.cluster_sizes)[table / VECTOR + vector % SEGMENT_VECTORS];
        }
        const u32 sizes[VECTOR] = {packed.x & 0xffff, packed.x >> 16, packed.y & 0xffff,
                                   packed.y >> 16};
        u32 distance[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          // ranks are not negative: their bits are ordered as they are
          distance[i] = RANK_BITS_TOP - min(__float_as_uint(rank[i]), RANK_BITS_TOP);
          const u32 bin = distance[i] >> (FIRST_SHIFT - 32);
          if (sizes[i] == 0)
            distance[i] = EMPTY;
          else if (bin < BINS)
            atomicAdd(&shared.histogram[bin], sizes[i]);
          tokens += sizes[i];
        }
        reinterpret_cast<uint4*>(row.ranks)[vector] =
            uint4{distance[0], distance[1], distance[2], distance[3]};
      }
      if (vector + VECTORS_AT_ONCE * THREADS < num_vectors)
        load_weights(row, vector + VECTORS_AT_ONCE * THREADS, weights[nth]);
    }
  }
  tokens = warp_sum(tokens);
  if (lane == 0) atomicAdd(&shared.total_tokens, tokens);
  __syncthreads();
}

// shared.bin: the first bin at which more than budget tokens are counted, BINS if there is none;
// shared.tokens_before: tokens counted before it, tokens_before at the first.
__device__ void find_bin(Shared& shared, u32 tokens_before, u32 budget) {
  constexpr int PER_THREAD = BINS / THREADS;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  u32 counts[PER_THREAD], sum = 0;
#pragma unroll
  for (int nth = 0; nth < PER_THREAD / 4; ++nth) {
    const uint4 four =
        reinterpret_cast<const uint4*>(shared.histogram)[thread * (PER_THREAD / 4) + nth];
    counts[4 * nth] = four.x;
    counts[4 * nth + 1] = four.y;
    counts[4 * nth + 2] = four.z;
    counts[4 * nth + 3] = four.w;
    sum += four.x + four.y + four.z + four.w;
  }
  const u32 inclusive = inclusive_warp_sum(sum, lane);
  if (lane == 31) shared.warp_tokens[warp] = inclusive;
  if (thread == 0) shared.bin = BINS;
  __syncthreads();
  u32 before = tokens_before + sum_of_lower_warps(shared.warp_tokens, warp, lane);
  before += inclusive - sum;
  if (before <= budget && before + sum > budget) {
    int nth = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD - 1; ++i) {
      if (nth == i && before + counts[i] <= budget) {
        before += counts[i];
        ++nth;
      }
    }
    shared.bin = thread * PER_THREAD + nth;
    shared.tokens_before = before;
  } else if (thread == THREADS - 1 && before + sum <= budget) {
    shared.tokens_before = before + sum;
  }
  __syncthreads();
}

// Steps 2 and 3: shared.end, if the row has more tokens than the budget.
__device__ void find_end(const RowHead& row, Shared& shared, u32 budget) {
  const int thread = threadIdx.x;
  u64 low = 0;
  int shift = FIRST_SHIFT;
  u32 tokens_before = 0;
  while (true) {
    find_bin(shared, tokens_before, budget);
    tokens_before = shared.tokens_before;
    low += (u64)shared.bin << shift;
    if (shared.bin < BINS) {
      if (thread == 0) shared.num_candidates = 0;
      __syncthreads();
      for (u32 cluster = thread; cluster < row.num_clusters; cluster += THREADS) {
        const u64 order = row.order(cluster);
        if (order >= low && (order - low) >> shift == 0) {
          const u32 nth = atomicAdd(&shared.num_candidates, 1);
          if (nth < MAX_CANDIDATES) shared.candidates[nth] = Candidate{order, row.size(cluster)};
        }
      }
      __syncthreads();
      if (shared.num_candidates <= MAX_CANDIDATES) break;
      shift -= BIN_BITS;
    }
    clear_histogram(shared);
    __syncthreads();
    for (u32 cluster = thread; cluster < row.num_clusters; cluster += THREADS) {
      const u64 order = row.order(cluster);
      if (order >= low && (order - low) >> shift < BINS)
        atomicAdd(&shared.histogram[(order - low) >> shift], row.size(cluster));
    }
    __syncthreads();
  }

  const u32 num_candidates = shared.num_candidates;
  if (thread == 0) shared.end = low;
  __syncthreads();
  const u32 nth = thread / CANDIDATE_THREADS;
  const Candidate mine = nth < num_candidates ? shared.candidates[nth] : Candidate{0, 0};
  u32 before = 0;
  for (u32 other = thread % CANDIDATE_THREADS; other < num_candidates; other += CANDIDATE_THREADS) {
    const Candidate candidate = shared.candidates[other];
    before += candidate.order < mine.order ? candidate.size : 0;
  }
#pragma unroll
  for (int distance = 1; distance < CANDIDATE_THREADS; distance *= 2)
    before += __shfl_xor_sync(FULL_WARP, before, distance);
  before += tokens_before;
  // the best is taken whatever its size, unless the budget is 0
  const bool fits = before + mine.size <= budget || (before == 0 && budget > 0);
  if (nth < num_candidates && thread % CANDIDATE_THREADS == 0 && fits)
    atomicMax(&shared.end, mine.order + 1);
  __syncthreads();
}

// Write the slots of the listed clusters' tokens: each team of lanes takes CLUSTERS_AT_ONCE clusters,
// each lane TOKENS_PER_LANE tokens of each.
//
// Loads are not predicated but repeat a valid one, so that all of a kind are in flight together.
template <int CLUSTERS_AT_ONCE, int TOKENS_PER_LANE>
__device__ void write_slots(const RowHead& row, const ListedCluster* list, int num_listed,
                            int* slots) {
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
      const size_t head = (size_t)cluster.place * NUM_KV_HEADS + row.kv_head;
      members[nth] = row.a.members + head * SEGMENT_SIZE + (cluster.members >> 16);
      segment_slots[nth] = row.a.segment_slots + (size_t)cluster.place * SEGMENT_SIZE;
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

// Step 4: the clusters below `end` and their slots; LIST clusters at a time.
__device__ void list_selected(const RowHead& row, Shared& shared, u64 end, int row_head) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const u32 end_rank = end >> 32, end_cluster = (u32)end;
  // a warp's clusters are neighbours, so that the list is in order
  const u32 per_warp = (row.num_clusters + THREADS - 1) / THREADS * 32;
  const u32 warp_begin = warp * per_warp, warp_end = min(warp_begin + per_warp, row.num_clusters);
  auto is_taken = [&](u32 cluster) {
    const u32 rank = cluster < warp_end ? row.ranks[cluster] : EMPTY;
    return rank < end_rank || (rank == end_rank && cluster < end_cluster);
  };

  u32 count = 0, tokens = 0;
#pragma unroll 4
  for (u32 first = warp_begin; first < warp_end; first += 32) {
    const u32 cluster = first + lane;
    if (is_taken(cluster)) {
      ++count;
      tokens += row.size(cluster);
    }
  }
  count = warp_sum(count);
  tokens = warp_sum(tokens);
  if (lane == 0) {
    shared.warp_clusters[warp] = count;
    shared.warp_tokens[warp] = tokens;
  }
  __syncthreads();
  const u32 clusters_before = sum_of_lower_warps(shared.warp_clusters, warp, lane);
  const u32 tokens_before = sum_of_lower_warps(shared.warp_tokens, warp, lane);
  const u32 num_clusters = warp_sum(lane < WARPS ? shared.warp_clusters[lane] : 0);
  const u32 num_tokens = warp_sum(lane < WARPS ? shared.warp_tokens[lane] : 0);
  if (thread == 0) {
    row.a.num_selected_clusters[row_head] = num_clusters;
    row.a.num_selected_tokens[row_head] = num_tokens;
    row.a.num_clustered_tokens[row_head] = shared.total_tokens;
  }

  int* clusters = row.a.selected_clusters + (size_t)row_head * row.a.cluster_capacity;
  int* slots = row.a.selected_slots + (size_t)row_head * row.a.slot_capacity;
  for (u32 list_begin = 0; list_begin < num_clusters; list_begin += LIST) {
    u32 nth = clusters_before, token = tokens_before;
    for (u32 first = warp_begin; first < warp_end; first += 32) {
      const u32 cluster = first + lane;
      const bool taken = is_taken(cluster);
      const u32 takers = __ballot_sync(FULL_WARP, taken);
      if (takers == 0) continue;
      const u32 size = taken ? row.size(cluster) : 0;
      const u32 inclusive = inclusive_warp_sum(size, lane);
      const u32 in_list = nth + __popc(takers & ((1u << lane) - 1)) - list_begin;
      if (taken && in_list < LIST) {
        clusters[list_begin + in_list] = cluster;
        shared.list[in_list] =
            ListedCluster{token + inclusive - size, (u32)row.place(cluster / CLUSTERS),
                          row.begin(cluster) << 16 | size};
      }
      nth += __popc(takers);
      token += __shfl_sync(FULL_WARP, inclusive, 31);
    }
    __syncthreads();
    const int num_listed = min(num_clusters - list_begin, (u32)LIST);
    if (num_listed <= THREADS / CLUSTER_LANES)
      write_slots<1, 4>(row, shared.list, num_listed, slots);
    else
      write_slots<4, 2>(row, shared.list, num_listed, slots);
    __syncthreads();
  }
}

__device__ void select_clusters(const Arguments& a, Shared& shared, char* tables, int row_head) {
  const int thread = threadIdx.x;
  const int row_of_batch = row_head / NUM_KV_HEADS;
  const int item_begin = a.item_indptr[row_of_batch];
  const int num_segments = a.item_indptr[row_of_batch + 1] - item_begin;
  const u32 budget = min(a.token_budget[row_of_batch], a.budget_capacity);
  const int part_begin = a.chunk_indptr[row_of_batch];
  const int part_end = a.chunk_indptr[row_of_batch + 1];
  const int kv_head = row_head % NUM_KV_HEADS;
  const int num_clusters = num_segments * CLUSTERS;
  const bool is_resident = num_clusters <= a.resident_capacity;
  u32* ranks = reinterpret_cast<u32*>(tables);
  u16* sizes = reinterpret_cast<u16*>(ranks + a.resident_capacity);
  u16* begins = sizes + a.resident_capacity;
  int* places = reinterpret_cast<int*>(begins + a.resident_capacity);
  if (!is_resident)
    ranks = a.long_row_ranks + (size_t)item_begin * (NUM_KV_HEADS * CLUSTERS) +
            (size_t)kv_head * num_clusters;
  const RowHead row{a,     kv_head, item_begin, num_segments, (u32)num_clusters, is_resident,
                    ranks, sizes,   begins,     places};

  if (is_resident) load_tables(row);
  clear_histogram(shared);
  if (thread == 0) shared.total_tokens = 0;
  __syncthreads();
  wait_for_coarse();
  rank_clusters(row, shared, part_begin, part_end);
  u64 end = (u64)(RANK_BITS_TOP + 1) << 32;  // behind every cluster that has tokens
  if (shared.total_tokens > budget) {
    find_end(row, shared, budget);
    end = shared.end;
  }
  __syncthreads();
  list_selected(row, shared, end, row_head);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cluster_selection(const __grid_constant__ Arguments a) {
  __shared__ Shared shared;
  extern __shared__ __align__(16) char tables[];
  if ((int)blockIdx.x < a.num_row_heads)
    select_clusters(a, shared, tables, blockIdx.x);
  else
    merge_parts(a, shared, blockIdx.x - a.num_row_heads);
}
