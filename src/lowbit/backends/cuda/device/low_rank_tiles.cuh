// Pieces of a matrix [K, R] of 16-bit floats in shared memory, and operand A of products with activations.
//
// A lane that loads 16 bytes of a row holds eight columns side by side: of 32 columns place p has 8 p .. + 7. They make
// operand B of two m16n8k16 as they are, when A, ranks by columns, has the columns in the same order: product j (0, 1)
// takes, as 2 p, 2 p + 1 and 2 p + 8, 2 p + 9 of K, columns 8 p + 4 j .. + 1 and .. + 2, + 3. So A's eight columns for
// a j and a `second` (0, 1) are rows 8 p + 4 j + 2 second + {0, 1} of all four p: they lie side by side in shared
// memory, 16 bytes of 8 ranks each, for ldmatrix to transpose.
#pragma once

#include "mma.cuh"

namespace lowbit {

// Where the 16 bytes of row k (0..63) and ranks 8 eight .. + 7 lie in a piece of 64 rows and 8 `eights` ranks. Which of
// eight banks they are in depends on both, so that neither reading 8 rows of an eight, nor writing eights side by side,
// meets a bank twice.
LOWBIT_DEVICE int rank_bytes_at(int k, int eight, int eights) {
  const int piece = k / 32 * 4 + k % 8 / 2, row = k % 32 / 8 * 2 + k % 2;
  return ((piece * eights + eight) * 8 + (row ^ (eight % 4 * 2 + eight / 4 % 2))) * 16;
}

// ldmatrix.x4 with transposed matrices of 8 by 8 floats of 16 bits: of each, a lane of group g and place p gets
// elements g of rows 2 p and 2 p + 1. Lanes 8 i .. + 7 name the rows of matrix i.
LOWBIT_DEVICE void load_transposed(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC_RTC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#else
  load_matrices(out, row);
  const int lane = threadIdx.x % 32, group = lane / 4, from = lane % 4 * 8 + group / 2;
  for (uint32_t& word : out) {
    const uint32_t first = from_lane(word, from), second = from_lane(word, from + 4);
    word = (first >> 16 * (group % 2) & 0xFFFFu) | second >> 16 * (group % 2) << 16;
  }
#endif
}

// The part of `rank_bytes_at` that depends on the lane, for `load_ranks`.
template <int kEights>
LOWBIT_DEVICE int rank_lane_at() {
  const int lane = threadIdx.x % 32, row = lane % 8, second = lane / 16;
  return rank_bytes_at(row / 2 * 8 + second * 2 + row % 2, lane / 8 % 2, kEights);
}

// A of product j of half `half` (0, 1) of a group: ranks 16 sixteen .. + 15.
template <int kEights>
LOWBIT_DEVICE void load_ranks(uint32_t (&out)[4], const unsigned char* piece, int lane_at, int half, int j,
                              int sixteen) {
  const int bank = (sixteen % 2 * 4 + sixteen / 2 % 2) * 16;
  load_transposed(out, piece + (lane_at ^ bank) + ((half * 4 + j * 2) * kEights + sixteen * 2) * 128);
}

}  // namespace lowbit
