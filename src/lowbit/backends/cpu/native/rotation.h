// The rotation of ConvRot: groups of 4^s values times the regular Hadamard matrix, in place.
//
// The matrix is the Kronecker power of a symmetric 4 x 4 one whose rows are the sum of all four, less twice one of them;
// so a group takes s rounds of such fours, at distances 1, 4, 16, ..., and no multiplication but the last.
#pragma once

#include "simd.h"

namespace lowbit {

namespace detail {

// Row i of the 4 x 4 matrix is -1 in column 3 - i and 1 elsewhere.
template <class T, class Add, class Sub>
inline void rotate_four(T& a, T& b, T& c, T& d, const Add& plus, const Sub& minus) {
  const T ab = plus(a, b), cd = plus(c, d), a_b = minus(a, b), c_d = minus(c, d);
  a = plus(ab, c_d);
  b = minus(ab, c_d);
  c = plus(a_b, cd);
  d = minus(cd, a_b);
}

}  // namespace detail

// One group; `size` is a power of four.
inline void rotate_group(float* x, int64_t size) {
  using namespace simd;
  int64_t step = 1;
  float factor = 1.0f;
  for (; step < size; step *= 4) {
    factor *= 0.5f;
    if (step < kLanes) {
      for (int64_t first = 0; first < size; first += 4 * step)
        for (int64_t i = first; i < first + step; ++i)
          detail::rotate_four(
              x[i], x[i + step], x[i + 2 * step], x[i + 3 * step], [](float a, float b) { return a + b; },
              [](float a, float b) { return a - b; });
      continue;
    }
    for (int64_t first = 0; first < size; first += 4 * step)
      for (int64_t i = first; i < first + step; i += kLanes) {
        F32 four[4];
        for (int j = 0; j < 4; ++j) four[j] = load_f32(x + i + j * step);
        detail::rotate_four(
            four[0], four[1], four[2], four[3], [](F32 a, F32 b) { return add(a, b); },
            [](F32 a, F32 b) { return sub(a, b); });
        for (int j = 0; j < 4; ++j) store_f32(x + i + j * step, four[j]);
      }
  }
  for (int64_t i = 0; i < size; ++i) x[i] *= factor;  // a power of two: exact but for subnormals
}

// Every group of a row of k values.
inline void rotate_groups(float* x, int64_t k, int64_t size) {
  for (int64_t c = 0; c < k; c += size) rotate_group(x + c, size);
}

}  // namespace lowbit
