// Matrices of 8 x 8 halves that a warp holds as sums of a product, written to shared memory transposed.
#pragma once

#include "async.cuh"
#include "primitives.cuh"

namespace lowbit {

// Four matrices (stmatrix.x4.trans, sm_90). Of matrix i lane l holds in words[i] row l / 4, columns 2 (l % 4) and + 1,
// the first in the lower half. Lanes 8 i .. + 7 name where columns 0..7 of matrix i go: 16 bytes each, its rows in
// order.
LOWBIT_DEVICE void store_transposed(const uint32_t (&words)[4], void* column) {
#ifdef __CUDACC_RTC__
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(column)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  unsigned char* shared = dynamic_shared();
  const auto mine = uint32_t(static_cast<unsigned char*>(column) - shared);
  if (mine % 16) simulator::fail("a column of a matrix does not begin at a multiple of 16 bytes");
  const int row = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = from_lane(mine, 8 * i + 2 * place + half) + uint32_t(2 * row);
      *reinterpret_cast<uint16_t*>(shared + at) = uint16_t(words[i] >> 16 * half);
    }
#endif
}

}  // namespace lowbit
