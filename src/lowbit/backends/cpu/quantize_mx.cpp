// quantize and scale_search for mxfp8 and mxfp4: float8_e4m3fn or e2m1 codes, a power of two for every 32 weights.
//
// The search tries what Mxfp8.candidates and Mxfp4.candidates prove to be enough: the fitted scale and half of it.
#include "native/bind.h"
#include "native/encode.h"

namespace lowbit {
namespace {

constexpr int kGroup = 32, kVectors = kGroup / simd::kLanes;

struct Mxfp8Codes {
  static constexpr int kExponent = 8;  // of the largest value
  static constexpr int64_t kBytes = 32;
  static simd::F32 miss(simd::F32 value) { return float8_miss<E4m3Grid>(value); }
  static void store(uint8_t* to, int v, simd::F32 value) {
    simd::store_low_bytes(to + v * simd::kLanes, float8_codes<E4m3Grid>(value, value));
  }
};

struct Mxfp4Codes {
  static constexpr int kExponent = 2;  // of the largest weight that a scale of 1 is taken for
  static constexpr int64_t kBytes = 16;
  static simd::F32 miss(simd::F32 value) { return e2m1_miss(simd::abs(value)); }
  static void store(uint8_t* to, int v, simd::F32 value) {
    simd::store_nibbles(to + v * (simd::kLanes / 2), e2m1_codes(value, value));
  }
};

// The code of the smallest 2^e that is at least amax / (1.75 * 2^exponent): a mantissa above 1.75 carries.
inline int32_t code_for(int32_t amax_bits, int exponent) {
  const auto carried = static_cast<int32_t>(static_cast<uint32_t>(amax_bits) + (0x7fffff - 0x600000));
  return std::clamp((carried >> 23) - exponent, 0, 254);
}

// In units of the scale of a code.
template <class Codes, bool kWeighted>
float error(const simd::F32 (&x)[kVectors], int32_t code, const float* weights) {
  using namespace simd;
  const F32 inverse = set1_f32(e8m0_power(254 - code));
  F32 sum = zero_f32();
  for (int v = 0; v < kVectors; ++v) {
    const F32 miss = Codes::miss(mul(x[v], inverse));
    sum = fma(kWeighted ? mul(miss, load_f32(weights + v * kLanes)) : miss, miss, sum);
  }
  return reduce_add(sum);
}

template <class Codes>
bool quantize(const Matrix& w, bool search, const float* weights, uint8_t* codes, uint8_t* scales, int threads) {
  using namespace simd;
  const int64_t groups = (w.k + kGroup - 1) / kGroup, padded = groups * kGroup;
  const std::vector<float> columns = padded_weights(weights, weights ? w.k : 0, weights ? padded : 0);
  std::atomic<bool> finite{true};
  with_dtype(w.dtype, [&](auto dtype) {
    for_rows(w.n, w.k, padded, threads, [&](int64_t row, float* room) {
      if (load_row<dtype.value>(w.values, row * w.k, w.k, room, padded) >= kInfinityBits) {
        finite = false;
        return;
      }
      for (int64_t g = 0; g < groups; ++g) {
        prefetch(w, (row + 1) * w.k + g * kGroup, kGroup);
        F32 x[kVectors];
        I32 largest = zero_i32();
        for (int v = 0; v < kVectors; ++v) {
          x[v] = load_f32(room + g * kGroup + v * kLanes);
          largest = max(largest, as_i32(abs(x[v])));
        }
        int32_t code = code_for(reduce_max(largest), Codes::kExponent);
        if (search && code > 0) {
          const float* at = weights ? columns.data() + g * kGroup : nullptr;
          const float fitted = weights ? error<Codes, true>(x, code, at) : error<Codes, false>(x, code, at);
          const float half = weights ? error<Codes, true>(x, code - 1, at) : error<Codes, false>(x, code - 1, at);
          if (0.25f * half < fitted) --code;
        }
        const F32 inverse = set1_f32(e8m0_power(254 - code));
        // Under the lowest scale negative zeros become positive ones.
        const F32 added = code ? set1_f32(-0.0f) : zero_f32();
        uint8_t* to = codes + (row * groups + g) * Codes::kBytes;
        for (int v = 0; v < kVectors; ++v) Codes::store(to, v, add(mul(x[v], inverse), added));
        scales[row * groups + g] = static_cast<uint8_t>(code);
      }
    });
  });
  return finite;
}

}  // namespace

// False: the weight holds NaN or infinity, and what was written means nothing.
bool quantize_mx(Ptr<const void> w, int dtype, int64_t n, int64_t k, bool four_bits, bool search,
                 Ptr<const float> weights, Ptr<uint8_t> codes, Ptr<uint8_t> scales, int threads) {
  const Matrix matrix{w, dtype, n, k};
  if (four_bits) return quantize<Mxfp4Codes>(matrix, search, weights, codes, scales, threads);
  return quantize<Mxfp8Codes>(matrix, search, weights, codes, scales, threads);
}

void bind_quantize_mx(nb::module_& m) {
  m.def("quantize_mx", &quantize_mx, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"), nb::arg("dtype"),
        nb::arg("n"), nb::arg("k"), nb::arg("four_bits"), nb::arg("search"), nb::arg("weights"), nb::arg("codes"),
        nb::arg("scales"), nb::arg("threads"));
}

}  // namespace lowbit
