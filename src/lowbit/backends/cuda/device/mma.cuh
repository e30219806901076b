// The tensor-core product m16n8k16 of 16-bit floats, and which lane holds what of it.
//
// Lane l is of group l / 4 and has place l % 4 in it. Of A [16, 16] it holds, in four registers of two columns each,
// rows group and group + 8, columns 2 place, 2 place + 1, 2 place + 8, 2 place + 9; of B [16, 8] column `group`, the
// same rows; of the sums [16, 8] rows group and group + 8, columns 2 place and 2 place + 1. (PTX ISA, "Matrix Fragments
// for mma.m16n8k16 with floating point type".) As all 16 columns of A meet the same rows of B, whoever gives both
// operands in another order of them changes nothing.
#pragma once

#include "primitives.cuh"
#include "words.cuh"

namespace lowbit {

template <Half half>
LOWBIT_DEVICE void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#ifdef __CUDACC_RTC__
  if constexpr (half == kBFloat16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  simulator::mma_m16n8k16<half == kBFloat16>(sums, a0, a1, a2, a3, b0, b1);
#endif
}

}  // namespace lowbit
