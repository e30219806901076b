// The rotation of ConvRot: groups of 4^s values times the regular Hadamard matrix, in place.
//
// The matrix is the Kronecker power of a symmetric 4 x 4 one, divided by the root of its size; so a group takes s
// rounds of products with that small one, of values at distances 1, 4, 16, ..., and these are sums and differences.
#pragma once

#include "simd.h"

namespace lowbit {

// The product with the 4 x 4 matrix: row i is -1 in column 3 - i and 1 elsewhere.
inline void rotate_four(simd::F32& a, simd::F32& b, simd::F32& c, simd::F32& d) {
  using namespace simd;
  const F32 ab = add(a, b), cd = add(c, d), a_b = sub(a, b), c_d = sub(c, d);
  a = add(ab, c_d);
  b = sub(ab, c_d);
  c = add(a_b, cd);
  d = sub(cd, a_b);
}

using Sixteen = simd::F32[16 / simd::kLanes];

// 16 values at distances 4 and then 1. With ab = a + b and so on, four of them become the sums of rotate_four,
// (ab, ab, cd, cd) + (c - d, d - c, a - b, b - a): each vector with its neighbours swapped, and then its halves.
#if defined(LOWBIT_ISA_AVX512)
inline void rotate_sixteen(Sixteen& x) {
  __m512 v = x[0].v, other = _mm512_shuffle_f32x4(v, v, 0xb1), less = _mm512_sub_ps(v, other);
  v = _mm512_add_ps(_mm512_add_ps(v, other), _mm512_shuffle_f32x4(less, less, 0x4e));
  other = _mm512_shuffle_ps(v, v, 0xb1);
  less = _mm512_sub_ps(v, other);
  x[0].v = _mm512_add_ps(_mm512_add_ps(v, other), _mm512_shuffle_ps(less, less, 0x4e));
}
#elif defined(LOWBIT_ISA_AVX2)
inline void rotate_sixteen(Sixteen& x) {
  __m256 more[2], less[2];
  for (int i = 0; i < 2; ++i) {
    const __m256 other = _mm256_permute2f128_ps(x[i].v, x[i].v, 1);
    more[i] = _mm256_add_ps(x[i].v, other);
    less[i] = _mm256_sub_ps(x[i].v, other);
  }
  for (int i = 0; i < 2; ++i) {
    const __m256 v = _mm256_add_ps(more[i], less[1 - i]), other = _mm256_permute_ps(v, 0xb1);
    x[i].v = _mm256_add_ps(_mm256_add_ps(v, other), _mm256_permute_ps(_mm256_sub_ps(v, other), 0x4e));
  }
}
#else
inline void rotate_sixteen(Sixteen& x) {
  for (int round = 0; round < 2; ++round) {
    rotate_four(x[0], x[1], x[2], x[3]);
    simd::transpose(x);
  }
}
#endif

// The rounds at distances 1 and 4 of a row; where four sixteens are taken together that at distance 16, too.
template <int kTogether>
inline void rotate_near(float* x, int64_t k, simd::F32 factor) {
  using namespace simd;
  constexpr int kVectors = 16 / kLanes;
  for (int64_t first = 0; first < k; first += 16 * kTogether) {
    Sixteen of[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      for (int v = 0; v < kVectors; ++v) of[j][v] = mul(load_f32(x + first + 16 * j + v * kLanes), factor);
      rotate_sixteen(of[j]);
    }
    if constexpr (kTogether == 4)
      for (int v = 0; v < kVectors; ++v) rotate_four(of[0][v], of[1][v], of[2][v], of[3][v]);
    for (int j = 0; j < kTogether; ++j)
      for (int v = 0; v < kVectors; ++v) store_f32(x + first + 16 * j + v * kLanes, of[j][v]);
  }
}

// Every group of a row of k values; `size` is 16, 64, 256, ... and divides k.
inline void rotate_groups(float* x, int64_t k, int64_t size) {
  using namespace simd;
  float factor = 0.25f;  // a power of two: exact but for subnormals
  for (int64_t step = 16; step < size; step *= 4) factor *= 0.5f;
  const bool four = kLanes > 4 && size > 16;  // as many vectors as there are registers for
  four ? rotate_near<4>(x, k, set1_f32(factor)) : rotate_near<1>(x, k, set1_f32(factor));
  for (int64_t step = four ? 64 : 16; step < size; step *= 4)
    for (int64_t first = 0; first < k; first += 4 * step)
      for (int64_t i = first; i < first + step; i += kLanes) {
        F32 of[4];
        for (int j = 0; j < 4; ++j) of[j] = load_f32(x + i + j * step);
        rotate_four(of[0], of[1], of[2], of[3]);
        for (int j = 0; j < 4; ++j) store_f32(x + i + j * step, of[j]);
      }
}

}  // namespace lowbit
