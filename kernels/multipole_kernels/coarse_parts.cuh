// The coarse parts of a (row, KV head): their denominator, and their merge into one state.
//
// A state is (maximum, sum, acc), as attention_state.py describes it.

#pragma once

#include "selection_common.cuh"

// One query head's largest part maximum and the sum of weights relative to it, in all lanes.
__device__ void merge_sums(const Arguments& a, int begin, int end, int kv_head, int group, int lane,
                           float& merged_max, float& merged_sum) {
  float lane_max = minus_infinity(), lane_sum = 0.0f;
  for (int first = begin; first < end; first += 32 * PARTS_AT_ONCE) {
    float part_max[PARTS_AT_ONCE], part_sum[PARTS_AT_ONCE], new_max = lane_max;
#pragma unroll
    for (int nth = 0; nth < PARTS_AT_ONCE; ++nth) {
      const int part = first + nth * 32 + lane;
      // behind the last part it is loaded again
      const size_t head = (size_t)min(part, end - 1) * NUM_KV_HEADS + kv_head;
      part_max[nth] = a.part_max[head * GROUP + group];
      part_sum[nth] = a.part_sum[head * GROUP + group];
    }
#pragma unroll
    for (int nth = 0; nth < PARTS_AT_ONCE; ++nth) {
      if (first + nth * 32 + lane >= end) part_sum[nth] = 0.0f;
      new_max = fmaxf(new_max, part_max[nth]);
    }
    const float shift = finite_or_zero(new_max);
    lane_sum *= power_of_2(lane_max - shift);
#pragma unroll
    for (int nth = 0; nth < PARTS_AT_ONCE; ++nth)
      lane_sum += part_sum[nth] * power_of_2(part_max[nth] - shift);
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

// Merge the coarse parts of one (row, KV head) into one state.
__device__ void merge_parts(const Arguments& a, Shared& shared, int row_head) {
  constexpr int COLUMNS = GROUP * HEAD_DIM / 4;  // of four dimensions
  constexpr int WAYS = COLUMNS < THREADS ? THREADS / COLUMNS : 1;
  constexpr int STEP = COLUMNS < THREADS ? COLUMNS : THREADS;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row = row_head / NUM_KV_HEADS, kv_head = row_head % NUM_KV_HEADS;
  const int begin = a.chunk_indptr[row], end = a.chunk_indptr[row + 1];
  wait_for_predecessor();

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
