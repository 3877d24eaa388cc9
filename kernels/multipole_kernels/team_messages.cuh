// How the blocks of a team tell each other things: stores into the other block's shared memory, whose
// bytes a barrier there counts.
//
// A barrier of the whole cluster would wait until every store of the block has reached memory, and empty
// the cache of global memory; it is used once, at the begin, and where things go wrong slowly.

#pragma once

#include "team_common.cuh"

__device__ __forceinline__ u32 shared_address(const void* of) {
  return (u32)__cvta_generic_to_shared(of);
}

// All threads of the team, and all that they wrote; it empties the caches of global memory.
__device__ __forceinline__ void team_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Say how many bytes of a kind come before the next wait for it; they may have come already.
__device__ __forceinline__ void expect(Shared& shared, Message kind, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&shared.told[kind])),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait_for(Shared& shared, Message kind, u32 parity = 0) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(&shared.told[kind])),
      "r"(parity)
      : "memory");
}

// Make the barriers; nobody tells a block anything before all have.
__device__ __forceinline__ void begin_team(Shared& shared) {
  if (threadIdx.x == 0) {
#pragma unroll
    for (int kind = 0; kind < MESSAGES; ++kind)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(
                       shared_address(&shared.told[kind]))
                   : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait_for_team() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Where another block's Shared holds what this one's holds at `local`, and its barrier of a kind.
struct Remote {
  u32 data, barrier;
  __device__ __forceinline__ Remote(Shared& shared, const void* local, Message kind, int block) {
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(data)
        : "r"(shared_address(local)), "r"(block));
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(barrier)
        : "r"(shared_address(&shared.told[kind])), "r"(block));
  }
};

__device__ __forceinline__ void tell(const Remote& to, u32 x) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   to.data),
               "r"(x), "r"(to.barrier)
               : "memory");
}

__device__ __forceinline__ void tell(const Remote& to, float x, float y) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          to.data),
      "f"(x), "f"(y), "r"(to.barrier)
      : "memory");
}

__device__ __forceinline__ void tell(const Remote& to, uint4 x) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to.data),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(to.barrier)
      : "memory");
}
