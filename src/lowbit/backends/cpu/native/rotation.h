// The rotation of ConvRot: groups of 4^s values times the regular Hadamard matrix, in place.
//
// The matrix is the Kronecker power of a symmetric 4 x 4 one, divided by the root of its size; so a group takes s
// rounds of products with that small one, of values at distances 1, 4, 16, ..., and these are sums and differences.
#pragma once

#include "simd.h"
#include "transpose.h"

namespace lowbit {

// The product with the 4 x 4 matrix: row i is -1 in column 3 - i and 1 elsewhere.
template <class T, class Add, class Sub>
inline void rotate_four(T& a, T& b, T& c, T& d, const Add& plus, const Sub& minus) {
  const T ab = plus(a, b), cd = plus(c, d), a_b = minus(a, b), c_d = minus(c, d);
  a = plus(ab, c_d);
  b = minus(ab, c_d);
  c = plus(a_b, cd);
  d = minus(cd, a_b);
}

// 16 values times a factor, at distances 1 and 4.
inline void rotate_sixteen(float* x, float factor) {
  Quad<float> rows[4];
  for (int j = 0; j < 4; ++j) std::memcpy(&rows[j], x + 4 * j, 16);  // one by one, or they go through memory
  const auto plus = [](Quad<float> a, Quad<float> b) { return a + b; };
  const auto minus = [](Quad<float> a, Quad<float> b) { return a - b; };
  for (auto& row : rows) row *= factor;
  rotate_four(rows[0], rows[1], rows[2], rows[3], plus, minus);
  transpose_quads(rows);
  rotate_four(rows[0], rows[1], rows[2], rows[3], plus, minus);
  transpose_quads(rows);
  for (int j = 0; j < 4; ++j) std::memcpy(x + 4 * j, &rows[j], 16);
}

// Every group of a row of k values; `size` is 16, 64, 256, ... and divides k. Round by round over the whole row, so
// that what short vectors have stored has left the store queue before long ones read it.
inline void rotate_groups(float* x, int64_t k, int64_t size) {
  using namespace simd;
  float factor = 0.25f;  // a power of two: exact but for subnormals
  for (int64_t step = 16; step < size; step *= 4) factor *= 0.5f;
  for (int64_t first = 0; first < k; first += 16) rotate_sixteen(x + first, factor);
  const auto plus = [](F32 a, F32 b) { return add(a, b); };
  const auto minus = [](F32 a, F32 b) { return sub(a, b); };
  for (int64_t step = 16; step < size; step *= 4)
    for (int64_t first = 0; first < k; first += 4 * step)
      for (int64_t i = first; i < first + step; i += kLanes) {
        F32 four[4];
        for (int j = 0; j < 4; ++j) four[j] = load_f32(x + i + j * step);
        rotate_four(four[0], four[1], four[2], four[3], plus, minus);
        for (int j = 0; j < 4; ++j) store_f32(x + i + j * step, four[j]);
      }
}

}  // namespace lowbit
