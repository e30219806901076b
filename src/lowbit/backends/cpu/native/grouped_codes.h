// Weights of 4 or 8 bits in groups along K, in the layout rows16: w = code * scale + what code 0 stands for.
//
// As a Weight of int4_gemm.h and of float_gemm.h. There, for few float32 tokens, a code stays where it lies in its
// word: masked in place it is code * 2^(bits j), exactly a float32, and the activation of its column carries the
// inverse. So a weight costs a mask, a conversion and a multiplication. What all columns of a group share is done once
// a group: sum of w x = scale * sum of code x + (code 0) * sum of x.
#pragma once

#include <cmath>

#include "float_gemm.h"
#include "int4_gemm.h"

namespace lowbit {

// What the zeros of a weight are.
enum Zeros : int {
  kNoZeros = 0,     // none: the code in the middle, 2^(bits - 1), stands for 0
  kCodes = 1,       // uint8, the code that stands for 0
  kValues = 2,      // in the dtype of the scales, what the code in the middle stands for
  kFloatCodes = 3,  // in the dtype of the scales, the code that stands for 0, which need not be an integer
};

template <int kBits>
struct GroupedCodes {
  using F32 = simd::F32;
  using I32 = simd::I32;
  using Bytes = simd::Bytes;
  static_assert(kBits == 4 || kBits == 8);
  static constexpr int kWordCodes = 32 / kBits;
  static constexpr int kMiddle = 1 << (kBits - 1);

  const uint32_t* words;  // [blocks, stride]: k / kWordCodes words of 16 rows, and what fills up
  int64_t stride;
  const void* scales;  // [blocks, groups, 16]
  const void* zeros;   // the same, see Zeros
  int dtype;           // of scales
  int zeros_kind;
  int64_t n, k, group;

  int64_t groups() const { return k / group; }

  static constexpr int kSteps = simd::kDot4Steps;
  static void codes(I32 word, Bytes& even, Bytes& odd) {
    even = simd::low_nibbles(simd::as_bytes(word));
    odd = simd::high_nibbles(simd::as_bytes(word));
  }
  static Bytes bytes(I32 word) {
    return simd::as_bytes(simd::bit_xor(word, simd::set1_i32(static_cast<int32_t>(0x80808080u))));
  }
  template <int kAt>
  static I32 pair(I32 word) {
    using namespace simd;
    if constexpr (kBits == 8) return kAt ? odd_bytes(bytes(word)) : even_bytes(bytes(word));
    return bit_and(kAt ? shift_right<4 * kAt>(word) : word, set1_i32(0x000f000f));
  }

  static constexpr bool kOffsets = true, kSpans = false;
  void read_factors(int64_t block, float* scales_to, float* offsets_to) const {
    using namespace simd;
    const int64_t first = block * groups() * kBlockRows, count = groups() * kBlockRows;
    const auto read = [&](const void* from, float* to) {
      with_dtype(dtype, [&](auto known) {
        for (int64_t i = 0; i < count; i += kLanes)
          store_f32(to + i, load_as_f32(from, first + i, decltype(known)::value));
      });
    };
    const auto offset = [&](const auto& of) {  // of(index, scale)
      for (int64_t i = 0; i < count; i += kLanes) store_f32(offsets_to + i, of(i, load_f32(scales_to + i)));
    };
    constexpr int kCode = kBits == 8 ? kMiddle : 0;  // that is the integer 0
    const F32 below = set1_f32(static_cast<float>(kCode - kMiddle));
    read(scales, scales_to);
    if (zeros_kind == kValues || zeros_kind == kFloatCodes) read(zeros, offsets_to);
    switch (zeros_kind) {
      case kNoZeros:
        return offset([&](int64_t, F32 scale) { return mul(scale, below); });
      case kValues:
        return offset([&](int64_t i, F32 scale) { return fma(scale, below, load_f32(offsets_to + i)); });
      case kCodes:
        return offset([&](int64_t i, F32 scale) {
          const I32 zero = widen_u8(static_cast<const uint8_t*>(zeros) + first + i);
          return mul(scale, to_f32(sub(set1_i32(kCode), zero)));
        });
      default:
        return offset([&](int64_t i, F32 scale) {
          return mul(scale, sub(set1_f32(static_cast<float>(kCode)), load_f32(offsets_to + i)));
        });
    }
  }

  int64_t at(int64_t block, int64_t g, int v) const { return (block * groups() + g) * kBlockRows + v * simd::kLanes; }
  F32 scale(int64_t block, int64_t g, int v) const { return simd::load_as_f32(scales, at(block, g, v), dtype); }
  // Of the integer 0 in int4_gemm.h, where codes of 8 bits are read as int8.
  F32 offset(int64_t block, int64_t g, int v) const { return value_of(kBits == 8 ? kMiddle : 0, block, g, v); }

  F32 value_of(int code, int64_t block, int64_t g, int v) const {
    using namespace simd;
    const F32 factor = scale(block, g, v);
    switch (zeros_kind) {
      case kNoZeros:
        return mul(factor, set1_f32(static_cast<float>(code - kMiddle)));
      case kValues:
        return fma(factor, set1_f32(static_cast<float>(code - kMiddle)), load_as_f32(zeros, at(block, g, v), dtype));
      case kCodes:
        return mul(factor, to_f32(sub(set1_i32(code), widen_u8(static_cast<const uint8_t*>(zeros) + at(block, g, v)))));
      default:
        return mul(factor, sub(set1_f32(static_cast<float>(code)), load_as_f32(zeros, at(block, g, v), dtype)));
    }
  }

  template <int kCode>
  static F32 code_in_place(I32 word) {  // code * 2^(kBits kCode); the last one would reach the sign and is moved down
    using namespace simd;
    if constexpr (kCode == kWordCodes - 1) return to_f32(shift_right<kBits * kCode>(word));
    return to_f32(bit_and(word, set1_i32((2 * kMiddle - 1) << (kBits * kCode))));
  }

  // x times the power of 2 that its code's place asks for, and the sum of each group of plain x.
  struct Few {
    int64_t k, groups;
    Room x, sums;  // [m, k], [m, groups]

    Few(const GroupedCodes& w, const Activations& from, int threads)
        : k(w.k), groups(w.groups()), x(from.m * w.k), sums(from.m * w.groups()) {
      float place[kWordCodes];
      for (int j = 0; j < kWordCodes; ++j) place[j] = j == kWordCodes - 1 ? 1.0f : std::ldexp(1.0f, -kBits * j);
      parallel_for(from.m, from.m > 1 ? threads : 1, [&](int64_t m) {
        float* row = x.data() + m * k;
        row_to_f32(from, m, row);
        for (int64_t g = 0; g < groups; ++g) {
          float lanes[kWordCodes] = {};
          for (int64_t c = g * w.group; c < (g + 1) * w.group; c += kWordCodes)
            for (int j = 0; j < kWordCodes; ++j) {
              lanes[j] += row[c + j];
              row[c + j] *= place[j];
            }
          float sum = 0.0f;
          for (float lane : lanes) sum += lane;
          sums.data()[m * groups + g] = sum;
        }
      });
    }
  };

  template <int kTokens>
  void multiply(int64_t block, const Few& few, int64_t token, F32 (&sums)[kTokens][kBlockVectors]) const {
    using namespace simd;
    // Independent sums, so that one multiplication need not wait for the last.
    constexpr int kChains = std::max(1, 8 / (kTokens * kBlockVectors));
    const uint32_t* word = words + block * stride;
    const float *x = few.x.data() + token * k, *x_sums = few.sums.data() + token * groups();
    for (auto& row : sums)
      for (auto& sum : row) sum = zero_f32();
    for (int64_t g = 0; g < groups(); ++g) {
      F32 acc[kTokens][kBlockVectors][kChains];
      for (auto& row : acc)
        for (auto& lanes : row)
          for (auto& sum : lanes) sum = zero_f32();
      for (int64_t c = g * group; c < (g + 1) * group; c += kWordCodes, word += kBlockRows) {
        I32 codes[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v) codes[v] = load_i32(word + v * kLanes);
        auto step = [&](auto place) {
          constexpr int j = decltype(place)::value;
          F32 token_x[kTokens];
          for (int t = 0; t < kTokens; ++t) token_x[t] = set1_f32(x[t * k + c + j]);
          for (int v = 0; v < kBlockVectors; ++v) {
            const F32 q = code_in_place<j>(codes[v]);
            for (int t = 0; t < kTokens; ++t) acc[t][v][j % kChains] = fma(q, token_x[t], acc[t][v][j % kChains]);
          }
        };
        for_each_place<kWordCodes>(step);
      }
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32 group_scale = scale(block, g, v), group_offset = value_of(0, block, g, v);
        for (int t = 0; t < kTokens; ++t) {
          F32 dot = acc[t][v][0];
          for (int i = 1; i < kChains; ++i) dot = add(dot, acc[t][v][i]);
          sums[t][v] = fma(group_scale, dot, fma(group_offset, set1_f32(x_sums[t * groups() + g]), sums[t][v]));
        }
      }
    }
  }

  void decode(int64_t block, int64_t first, int64_t last, float* panel) const {
    using namespace simd;
    const uint32_t* word = words + block * stride + first / kWordCodes * kBlockRows;
    F32 group_scale[kBlockVectors], group_offset[kBlockVectors];
    int64_t group_end = first;
    for (int64_t c = first; c < last; c += kWordCodes, word += kBlockRows) {
      if (c >= group_end) {
        for (int v = 0; v < kBlockVectors; ++v) {
          group_scale[v] = scale(block, c / group, v);
          group_offset[v] = value_of(0, block, c / group, v);
        }
        group_end = (c / group + 1) * group;
      }
      for (int v = 0; v < kBlockVectors; ++v) {
        I32 codes = load_i32(word + v * kLanes);
        for (int j = 0; j < kWordCodes; ++j) {
          store_f32(panel + (c - first + j) * kPanelRows + v * kLanes,
                    fma(to_f32(bit_and(codes, set1_i32(2 * kMiddle - 1))), group_scale[v], group_offset[v]));
          codes = shift_right<kBits>(codes);
        }
      }
    }
  }
};

}  // namespace lowbit
