// Small transpositions, in vectors of 16 bytes that every instruction set has: the compiler's own vector types.
#pragma once

#include <cstdint>
#include <cstring>

namespace lowbit {

template <class T>
struct QuadOf {
  typedef T type __attribute__((vector_size(4 * sizeof(T))));
};
template <class T>
using Quad = typename QuadOf<T>::type;
typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// Four vectors of four values: rows become columns.
template <class V>
inline void transpose_quads(V (&rows)[4]) {
  const V a = __builtin_shufflevector(rows[0], rows[2], 0, 4, 1, 5),
          b = __builtin_shufflevector(rows[0], rows[2], 2, 6, 3, 7);
  const V c = __builtin_shufflevector(rows[1], rows[3], 0, 4, 1, 5),
          d = __builtin_shufflevector(rows[1], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(a, c, 0, 4, 1, 5);
  rows[1] = __builtin_shufflevector(a, c, 2, 6, 3, 7);
  rows[2] = __builtin_shufflevector(b, d, 0, 4, 1, 5);
  rows[3] = __builtin_shufflevector(b, d, 2, 6, 3, 7);
}

// 16 columns of 16 bytes without gaps -> 16 rows, `stride` bytes apart.
inline void transpose_bytes(const uint8_t* from, uint8_t* to, int64_t stride) {
  Bytes16 a[16], b[16];
  for (int c = 0; c < 16; ++c) std::memcpy(&a[c], from + 16 * c, 16);  // one by one, or they go through memory
  // Four times the first half is interleaved with the second: the index of a byte turns by a bit each time.
  const auto round = [](const Bytes16(&in)[16], Bytes16(&out)[16]) {
    for (int i = 0; i < 8; ++i) {
      out[2 * i] = __builtin_shufflevector(in[i], in[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      out[2 * i + 1] =
          __builtin_shufflevector(in[i], in[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  };
  round(a, b);
  round(b, a);
  round(a, b);
  round(b, a);
  for (int r = 0; r < 16; ++r) std::memcpy(to + r * stride, &a[r], 16);
}

// Four columns of 16 words without gaps -> 16 rows of four, `stride` bytes apart.
inline void transpose_words(const uint8_t* from, uint8_t* to, int64_t stride) {
  for (int r = 0; r < 16; r += 4) {
    Quad<uint32_t> rows[4];
    for (int c = 0; c < 4; ++c) std::memcpy(&rows[c], from + (c * 16 + r) * 4, 16);
    transpose_quads(rows);
    for (int j = 0; j < 4; ++j) std::memcpy(to + (r + j) * stride, &rows[j], 16);
  }
}

// Four words of each of 16 rows, from value `first` of them on -> four columns of 16 words without gaps.
template <class T>
inline void interleave_words(const T* const (&rows)[16], int64_t first, uint32_t* to) {
  for (int r = 0; r < 16; r += 4) {
    Quad<uint32_t> quads[4];
    for (int j = 0; j < 4; ++j) std::memcpy(&quads[j], rows[r + j] + first, 16);
    transpose_quads(quads);
    for (int c = 0; c < 4; ++c) std::memcpy(to + c * 16 + r, &quads[c], 16);
  }
}

}  // namespace lowbit
