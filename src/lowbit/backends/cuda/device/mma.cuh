// Tensor-core products of a warp, D = A B + C with A [16, K] and B [K, 8], and which lane holds what of them.
//
// K is 32 bytes: 16 floats of 16 bits, 32 of int8, 64 of int4. Lane l is of group l / 4 and has place l % 4 in it. Of A
// it holds four registers of 4 bytes: row `group` bytes 4 place .. + 3, row `group` + 8 the same bytes, row `group`
// bytes 16 + 4 place .. + 3, row `group` + 8 the same; of B column `group`, bytes 4 place .. + 3 and 16 + 4 place .. +
// 3; of the sums [16, 8] rows group and group + 8, columns 2 place and 2 place + 1. (PTX ISA, "Matrix Fragments for
// mma.m16n8k16",
// "... k32", "... k64".) As all of a row of A meets the same rows of B, whoever gives both operands in another order of
// K changes nothing.
//
// All are volatile: else the compiler might compute a sum that only some lanes store where only they are, and a product
// wants every lane of the warp.
#pragma once

#include "primitives.cuh"
#include "words.cuh"

namespace lowbit {

// sums += A B for float16 or bfloat16.
template <Half half>
LOWBIT_DEVICE void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#ifdef __CUDACC_RTC__
  if constexpr (half == kBFloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  const uint32_t a[4] = {a0, a1, a2, a3};
  const float start[4] = {sums[0], sums[1], sums[2], sums[3]};
  simulator::mma_m16n8(sums, a, b0, b1, start, simulator::dot_halves < half == kBFloat16 >);
#endif
}

// sums = A B + start for int8. `start` may be `sums`, or constants that stay where they are.
LOWBIT_DEVICE void mma_int8(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&start)[4]) {
#ifdef __CUDACC_RTC__
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start[0]), "r"(start[1]), "r"(start[2]),
        "r"(start[3]));
#else
  simulator::mma_m16n8(sums, a, b0, b1, start, simulator::dot_bytes);
#endif
}

// The same for int4, B signed or unsigned. In hardware from sm_80 to sm_89; later GPUs take many instructions for it.
template <bool unsigned_b>
LOWBIT_DEVICE void mma_int4(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&start)[4]) {
#ifdef __CUDACC_RTC__
  if constexpr (unsigned_b)
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.u4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start[0]), "r"(start[1]), "r"(start[2]),
          "r"(start[3]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start[0]), "r"(start[1]), "r"(start[2]),
          "r"(start[3]));
#else
  simulator::mma_m16n8(sums, a, b0, b1, start, simulator::dot_nibbles<unsigned_b>);
#endif
}

// Four matrices of 8 rows of 16 bytes from shared memory (ldmatrix.x4): lanes 8 i .. + 7 name the rows of matrix i, and
// every lane gets, of each, bytes 4 place .. + 3 of row `group`. The rows of a matrix must lie in different banks.
LOWBIT_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC_RTC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#else
  simulator::load_matrices(out, row);
#endif
}

}  // namespace lowbit
