// Products on tensor cores whose operands come straight from global memory.
//
// mma.m16n8k16 wants of a lane (g, t), g = lane / 4, t = lane % 4:
//   A  rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9     B  column g, the same as rows
//   C  rows g and g + 8, columns 2t and 2t + 1
// Sums run over columns of A in any order and the order of rows is free, so each lane loads 16
// bytes in a row and calls them what the product wants.
//   scores  A: rows are clusters or tokens, columns dimensions; lane t takes every 4th chunk of them
//   values  A: rows are dimensions, columns clusters or tokens; lane g takes every 8th chunk

#pragma once

#include "team_common.cuh"

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                         u32 b1, bool halves) {
  if (halves || !QUERY_IS_BF16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// WORDS 4-byte words in a row of global memory, read once.
template <int WORDS>
__device__ __forceinline__ void load_words(u32* to, const void* from) {
  static_assert(WORDS == 1 || WORDS == 2 || WORDS == 4, "a load's width");
  if constexpr (WORDS == 4)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
  else if constexpr (WORDS == 2)
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "l"(from));
  else
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}

// The pointer as one number, of which loads are so many bytes away: else the compiler adds up each
// load's address anew.
__device__ __forceinline__ const u8* as_base(const void* pointer) {
  asm("" : "+l"(pointer));
  return static_cast<const u8*>(pointer);
}

__device__ __forceinline__ u32 bytes_of(u32 low, u32 high, u32 selector) {
  return __byte_perm(low, high, selector);
}

// Two 8-bit centroids' numbers, in bytes 0 and 1 of a word (or 2 and 3), as two float16; float8 ones
// divided by 2^8. See unpack_words.py.
__device__ __forceinline__ u32 unpack_two(u32 word, int pair) {
  u32 halves;
  if constexpr (CENTROIDS == 1) {
    // the bytes are n + 128, and 0x6400 | m is 1024 + m
    const u32 biased = bytes_of(word, 0x64646464u, pair == 0 ? 0x4140 : 0x4342);
    asm("sub.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(biased), "r"(0x64806480u));
  } else {
    const u32 high_bytes = bytes_of(word, 0u, pair == 0 ? 0x1404 : 0x3424);
    halves = (high_bytes & 0x80008000u) | (high_bytes >> 1 & 0x3f803f80u);
  }
  return halves;
}

// what unpack_two is given
__device__ __forceinline__ u32 biased(u32 word) {
  return CENTROIDS == 1 ? word ^ 0x80808080u : word;
}

// ------------------------------------------------------------------------------------- scores

// dimensions of one load of a row of BYTES a number
template <int BYTES>
constexpr int KEY_CHUNK = BYTES == 1 && HEAD_DIM % 64 == 0 ? 16 : 8;

// The query heads as B, for rows whose lanes take chunks of CHUNK dimensions.
template <int CHUNK>
struct Query {
  u32 words[HEAD_TILES][HEAD_DIM / 16][2];

  // q: [GROUP, HEAD_DIM]; halves: as float16
  __device__ __forceinline__ void load(const u16* q, int lane, bool halves) {
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
      // columns past the heads repeat the last one, and nobody reads what becomes of them
      const int head = min(tile * 8 + lane / 4, GROUP - 1);
      const u8* base = as_base(q + head * HEAD_DIM + lane % 4 * CHUNK);
#pragma unroll
      for (int step = 0; step < HEAD_DIM / 16; ++step) {
        const int dim = step / (CHUNK / 4) * 4 * CHUNK + step % (CHUNK / 4) * 4;
        uint2 loaded;
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                     : "=r"(loaded.x), "=r"(loaded.y)
                     : "l"(base + dim * 2));
        if (halves && QUERY_IS_BF16) {
          loaded.x = pack_halves(__uint_as_float(loaded.x << 16),
                                 __uint_as_float(loaded.x & 0xffff0000u));
          loaded.y = pack_halves(__uint_as_float(loaded.y << 16),
                                 __uint_as_float(loaded.y & 0xffff0000u));
        }
        words[tile][step][0] = loaded.x;
        words[tile][step][1] = loaded.y;
      }
    }
  }
};

// A lane's share of UNIT rows of keys or key centroids, BYTES a number.
template <int BYTES>
struct KeyRows {
  static constexpr int CHUNK = KEY_CHUNK<BYTES>;
  static constexpr int CHUNKS = HEAD_DIM / (4 * CHUNK);
  static constexpr int WORDS = CHUNK * BYTES / 4;
  u32 words[2][CHUNKS][WORDS];

  // bytes from the begin of a row to a lane's first chunk
  static __device__ __forceinline__ int lane_offset(int lane) { return lane % 4 * CHUNK * BYTES; }
  // the lane's first chunks in rows g and g + 8
  __device__ __forceinline__ void load(const u8* first, const u8* second) {
    const u8* rows[2] = {first, second};
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int nth = 0; nth < CHUNKS; ++nth)
        load_words<WORDS>(words[row][nth], rows[row] + nth * 4 * CHUNK * BYTES);
  }

  // The rows' products with the query heads, in C's layout.
  __device__ __forceinline__ void score(const Query<CHUNK>& q,
                                        float (&scores)[HEAD_TILES][4]) const {
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][i] = 0.0f;
#pragma unroll
    for (int nth = 0; nth < CHUNKS; ++nth)
#pragma unroll
      for (int i = 0; i < CHUNK / 4; ++i) {
        u32 a[2][2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if constexpr (BYTES == 1) {
            const u32 word = biased(words[row][nth][i]);
            a[row][0] = unpack_two(word, 0);
            a[row][1] = unpack_two(word, 1);
          } else {
            a[row][0] = words[row][nth][2 * i];
            a[row][1] = words[row][nth][2 * i + 1];
          }
        }
        const int step = nth * (CHUNK / 4) + i;
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile)
          multiply(scores[tile], a[0][0], a[1][0], a[0][1], a[1][1], q.words[tile][step][0],
                   q.words[tile][step][1], BYTES == 1);
      }
  }
};

// ------------------------------------------------------------------------------------- values

// dimensions of one load, for tokens and centroids alike: one accumulator takes both
constexpr int VALUE_CHUNK = HEAD_DIM % 64 == 0 ? 8 : 4;
constexpr int DIM_TILES = HEAD_DIM / 16;

// The first of the two dimensions that a lane has of a tile of 16.
__device__ __forceinline__ int dim_of_tile(int tile, int lane) {
  return (tile / (VALUE_CHUNK / 2) * 8 + lane / 4) * VALUE_CHUNK + tile % (VALUE_CHUNK / 2) * 2;
}

// A lane's share of UNIT rows of values or value centroids, BYTES a number.
template <int BYTES>
struct ValueRows {
  static constexpr int CHUNKS = HEAD_DIM / (8 * VALUE_CHUNK);
  static constexpr int WORDS = VALUE_CHUNK * BYTES / 4;
  u32 words[4][CHUNKS][WORDS];

  // bytes from the begin of a row to a lane's first chunk
  static __device__ __forceinline__ int lane_offset(int lane) {
    return lane / 4 * VALUE_CHUNK * BYTES;
  }
  // rows: the lane's first chunks in 2t, 2t + 1, 2t + 8 and 2t + 9
  __device__ __forceinline__ void load(const u8* const (&rows)[4]) {
#pragma unroll
    for (int row = 0; row < 4; ++row)
#pragma unroll
      for (int nth = 0; nth < CHUNKS; ++nth)
        load_words<WORDS>(words[row][nth], rows[row] + nth * 8 * VALUE_CHUNK * BYTES);
  }

  // acc [dimensions, query heads] += the rows times their weights, B's layout: of head g of a tile,
  // rows 2t and 2t + 1 in the first word, 2t + 8 and 2t + 9 in the second.
  __device__ __forceinline__ void add(const u32 (&weights)[HEAD_TILES][2],
                                      float (&acc)[HEAD_TILES][DIM_TILES][4]) const {
#pragma unroll
    for (int nth = 0; nth < CHUNKS; ++nth)
#pragma unroll
      for (int i = 0; i < VALUE_CHUNK / 2; ++i) {
        u32 a[4];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          if constexpr (BYTES == 1) {
            // dimensions 4j and 4j + 1 of both rows in turn, or 4j + 2 and 4j + 3
            const u32 interleaved =
                bytes_of(biased(words[2 * pair][nth][i / 2]),
                         biased(words[2 * pair + 1][nth][i / 2]), i % 2 == 0 ? 0x5140 : 0x7362);
            a[2 * pair] = unpack_two(interleaved, 0);
            a[2 * pair + 1] = unpack_two(interleaved, 1);
          } else {
            a[2 * pair] = bytes_of(words[2 * pair][nth][i], words[2 * pair + 1][nth][i], 0x5410);
            a[2 * pair + 1] =
                bytes_of(words[2 * pair][nth][i], words[2 * pair + 1][nth][i], 0x7632);
          }
        }
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile)
          multiply(acc[tile][nth * (VALUE_CHUNK / 2) + i], a[0], a[1], a[2], a[3],
                   weights[tile][0], weights[tile][1], BYTES == 1);
      }
  }
};

// An 8 x 8 matrix of 16-bit numbers from C's layout to B's.
__device__ __forceinline__ u32 transposed(u32 fragment) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
  return result;
}
