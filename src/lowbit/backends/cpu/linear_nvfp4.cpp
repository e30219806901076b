// linear for nvfp4 in the layout rows16: w = value * (scale * global_scale), an e4m3 scale for every 16 columns.
#include "native/bind.h"
#include "native/e2m1_weight.h"
#include "native/not_finite.h"

namespace lowbit {
namespace {

struct Nvfp4Scales {
  static constexpr int64_t kGroup = 16;
  const uint8_t* codes;  // [blocks, groups, 16]
  int64_t groups;
  const float* factors;  // of 16 rows each: the global scale, for halves, and what load_e4m3 leaves to multiply with
  int64_t step;          // from a block's factors to the next one's: 0 where all rows share one

  static constexpr bool kSpans = true;
  const uint8_t* own_codes(int64_t block, int64_t group) const { return codes + (block * groups + group) * kBlockRows; }
  simd::F32 own(int64_t block, int64_t group, int v) const {
    return simd::load_e4m3(own_codes(block, group) + v * simd::kLanes);
  }
  void read_own(int64_t block, float* to) const {
    using namespace simd;
    const uint8_t* from = own_codes(block, 0);
    int64_t g = 0;
    for (; g + kFp8Columns <= groups; g += kFp8Columns) {
      F32 columns[kFp8Columns][kBlockVectors];
      load_e4m3_columns(from + g * kBlockRows, columns);
      for (int i = 0; i < kFp8Columns; ++i)
        for (int v = 0; v < kBlockVectors; ++v, to += kLanes) store_f32(to, columns[i][v]);
    }
    for (; g < groups; ++g)
      for (int v = 0; v < kBlockVectors; ++v, to += kLanes) store_f32(to, own(block, g, v));
  }
  simd::F32 common(int64_t block, int v) const { return simd::load_f32(factors + block * step + v * simd::kLanes); }
  simd::F32 halves(int64_t block, int64_t group, int v) const {
    return simd::mul(own(block, group, v), common(block, v));
  }
};

}  // namespace

void linear_nvfp4(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint32_t> words,
                  int64_t stride, Ptr<const uint8_t> scales, Ptr<const float> global_scales, bool by_row, bool divides,
                  int64_t integer_block, Ptr<const void> bias, int bias_dtype, Ptr<void> out, int way, int threads) {
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
  Room factors(by_row ? blocks * kBlockRows : kBlockRows);
  for (int64_t row = 0; row < (by_row ? n : kBlockRows); ++row) {
    const float value = global_scales[by_row ? row : 0];
    factors.data()[row] = divides ? 0.5f * 256.0f / value : 0.5f * 256.0f * value;
  }
  if (by_row) std::fill(factors.data() + n, factors.data() + blocks * kBlockRows, 0.0f);
  const Nvfp4Scales by{scales, k / Nvfp4Scales::kGroup, factors.data(), by_row ? kBlockRows : 0};
  const E2m1Weight<Nvfp4Scales> weight{words, stride, by, n, k, Nvfp4Scales::kGroup};
  const Activations from{x, x_dtype, m, k};
  const Output to{out, x_dtype, bias, bias_dtype};
  linear_e2m1(weight, from, to, static_cast<E2m1Way>(way), integer_block, threads);
  if (takes_apart(static_cast<E2m1Way>(way))) multiply_not_finite(weight, from, to, threads);
}

void bind_linear_nvfp4(nb::module_& m) {
  m.def("linear_nvfp4", &linear_nvfp4, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("words"), nb::arg("stride"), nb::arg("scales"),
        nb::arg("global_scales"), nb::arg("by_row"), nb::arg("divides"), nb::arg("integer_block"), nb::arg("bias"),
        nb::arg("bias_dtype"), nb::arg("out"), nb::arg("way"), nb::arg("threads"));
}

}  // namespace lowbit
