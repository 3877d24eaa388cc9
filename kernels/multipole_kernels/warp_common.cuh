// What the CUDA C++ kernels share: types, how ranks are numbered, sums over a warp, exponents.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 FULL_WARP = 0xffffffffu;
// A rank is kept as its distance from 32.0, so that smaller is better: it is at most GROUP, which is at
// most 16; ranks above 32 (of NaN) count as 32. (distance, cluster) is an order number.
constexpr u32 RANK_BITS_TOP = 0x42000000u;
constexpr u32 EMPTY = 0xffffffffu;  // distance of a cluster without tokens

__device__ __forceinline__ void wait_for_predecessor() {
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

// the shift of an exponent: 0 for -inf, because -inf - (-inf) is NaN
__device__ __forceinline__ float finite_or_zero(float x) {
  return x == minus_infinity() ? 0.0f : x;
}

__device__ __forceinline__ u32 warp_sum(u32 x) { return __reduce_add_sync(FULL_WARP, x); }

__device__ __forceinline__ u32 inclusive_warp_sum(u32 x, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const u32 lower = __shfl_up_sync(FULL_WARP, x, distance);
    x += lane >= distance ? lower : 0;
  }
  return x;
}
