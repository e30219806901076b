// linear for awq_w4a16 in the layout rows16: w = (code - 8) * scale + zero.
//
// Activations of 16 bits become int16 with one scale a group, and the products are those of integers (int4_gemm.h).
// float32 activations stay what they are. Few tokens: a code stays where it lies in its word. Masked in place it is code * 16^j, exactly a float32, and the
// activation of its column carries the 16^-j; so a weight costs a mask, a conversion and a multiplication. What all
// columns of a group share is done once a group: sum of w x = scale * sum of code x + (zero - 8 scale) * sum of x.
#include "native/bind.h"
#include "native/float_gemm.h"
#include "native/int4_gemm.h"

namespace lowbit {
namespace {

using namespace simd;

constexpr int kWordCodes = 8;

template <int kCode>
inline F32 code_in_place(I32 word) {  // code * 16^kCode; the last one would reach the sign and is moved down
  if constexpr (kCode == kWordCodes - 1) return to_f32(shift_right<4 * kCode>(word));
  return to_f32(bit_and(word, set1_i32(15 << (4 * kCode))));
}

struct AwqWeight {
  const uint32_t* words;  // [blocks, stride]: k / 8 words of 16 rows, and what fills up
  int64_t stride;
  const void* scales;     // [blocks, groups, 16]
  const void* zeros;
  int dtype;  // of scales and zeros
  int64_t n, k, group;

  int64_t groups() const { return k / group; }

  static constexpr int kSteps = kDot4Steps;
  static void codes(I32 word, Bytes& even, Bytes& odd) {
    even = low_nibbles(as_bytes(word));
    odd = high_nibbles(as_bytes(word));
  }
  F32 scale(int64_t block, int64_t g, int v) const {
    return load_as_f32(scales, (block * groups() + g) * kBlockRows + v * kLanes, dtype);
  }
  F32 offset(int64_t block, int64_t g, int v) const {  // of code 0
    const F32 zero = load_as_f32(zeros, (block * groups() + g) * kBlockRows + v * kLanes, dtype);
    return fma(scale(block, g, v), set1_f32(-8.0f), zero);
  }

  // x times the power of 16 that its code's place asks for, and the sum of each group of plain x.
  struct Few {
    int64_t k, groups;
    Room x, sums;  // [m, k], [m, groups]

    Few(const AwqWeight& w, const Activations& from, int threads)
        : k(w.k), groups(w.groups()), x(from.m * w.k), sums(from.m * w.groups()) {
      static const float kPlace[kWordCodes] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1};
      parallel_for(from.m, from.m > 1 ? threads : 1, [&](int64_t m) {
        float* row = x.data() + m * k;
        row_to_f32(from, m, row);
        for (int64_t g = 0; g < groups; ++g) {
          float lanes[kWordCodes] = {};
          for (int64_t c = g * w.group; c < (g + 1) * w.group; c += kWordCodes)
            for (int j = 0; j < kWordCodes; ++j) {
              lanes[j] += row[c + j];
              row[c + j] *= kPlace[j];
            }
          sums.data()[m * groups + g] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
        }
      });
    }
  };

  template <int kTokens>
  void multiply(int64_t block, const Few& few, int64_t token, F32 (&sums)[kTokens][kBlockVectors]) const {
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
        const F32 group_scale = scale(block, g, v), group_offset = offset(block, g, v);
        for (int t = 0; t < kTokens; ++t) {
          F32 dot = acc[t][v][0];
          for (int i = 1; i < kChains; ++i) dot = add(dot, acc[t][v][i]);
          sums[t][v] = fma(group_scale, dot, fma(group_offset, set1_f32(x_sums[t * groups() + g]), sums[t][v]));
        }
      }
    }
  }

  void decode(int64_t block, int64_t first, int64_t last, float* panel) const {
    const uint32_t* word = words + block * stride + first / kWordCodes * kBlockRows;
    F32 group_scale[kBlockVectors], group_offset[kBlockVectors];
    int64_t group_end = first;
    for (int64_t c = first; c < last; c += kWordCodes, word += kBlockRows) {
      if (c >= group_end) {
        for (int v = 0; v < kBlockVectors; ++v) {
          group_scale[v] = scale(block, c / group, v);
          group_offset[v] = offset(block, c / group, v);
        }
        group_end = (c / group + 1) * group;
      }
      for (int v = 0; v < kBlockVectors; ++v) {
        I32 codes = load_i32(word + v * kLanes);
        for (int j = 0; j < kWordCodes; ++j) {
          store_f32(panel + (c - first + j) * kPanelRows + v * kLanes, fma(to_f32(bit_and(codes, set1_i32(15))), group_scale[v], group_offset[v]));
          codes = shift_right<4>(codes);
        }
      }
    }
  }
};

}  // namespace

// Which way a call goes; the launcher knows from how many tokens on which is the faster one.
enum Way : int { kInt16 = 0, kRegisters = 1, kPanels = 2 };

void linear_awq_w4a16(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint32_t> words,
                      int64_t stride, Ptr<const void> scales, Ptr<const void> zeros, int scale_dtype, int64_t group,
                      int64_t integer_block, Ptr<const void> bias, int bias_dtype, Ptr<void> out, int way, int threads) {
  const AwqWeight weight{words, stride, scales, zeros, scale_dtype, n, k, group};
  const Activations from{x, x_dtype, m, k};
  const Output to{out, x_dtype, bias, bias_dtype};
  if (way == kRegisters) return gemm_few(weight, from, to, threads);
  if (way == kPanels) return gemm_many(weight, from, to, threads);
  int4_gemm(weight, IntegerTokens<2>(from, integer_block, group, threads), m, to, threads);
}

void bind_linear_awq_w4a16(nb::module_& m) {
  m.def("linear_awq_w4a16", &linear_awq_w4a16, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"),
        nb::arg("x_dtype"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("words"), nb::arg("stride"),
        nb::arg("scales"), nb::arg("zeros"), nb::arg("scale_dtype"), nb::arg("group"), nb::arg("integer_block"),
        nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"), nb::arg("way"), nb::arg("threads"));
}

}  // namespace lowbit
