// What the encoders share: rows as float32 with their largest magnitude, rounding to the small formats, packing codes.
//
// Codes and stored scales are those of the reference bit for bit: the same float32 operations in the same order. Errors
// in a search are only compared with each other, so there a quotient is a product with the reciprocal.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "float_gemm.h"

namespace lowbit {

constexpr int32_t kInfinityBits = 0x7f800000;  // bits of a magnitude from here on: infinity or NaN
constexpr int64_t kTaskElements = 1 << 15;     // weights that a thread takes at a time: large beside the price of it

struct Matrix {
  const void* values;
  int dtype;
  int64_t n, k;
};

// Asks for values that are wanted soon: a row is read twice, and while codes are made of it the next one can come.
inline void prefetch(const Matrix& w, int64_t at, int64_t count) {
  const auto* from = static_cast<const unsigned char*>(w.values) + at * element_size(w.dtype);
  for (int64_t byte = 0; byte < count * element_size(w.dtype); byte += 64) __builtin_prefetch(from + byte);
}

// Bytes to where they are not read again soon: past the caches, which then need not fetch what is overwritten. Only
// after `streamed` do other threads see them for sure. `from` is aligned to 64 bytes.
inline void stream_bytes(uint8_t* to, const uint8_t* from, int64_t bytes) {
  int64_t at = 0;
#if defined(LOWBIT_ISA_AVX512) && !defined(LOWBIT_EMULATE)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0)
    for (; at + 64 <= bytes; at += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_load_si512(from + at));
#elif defined(LOWBIT_ISA_AVX2)
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0)
    for (; at + 32 <= bytes; at += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at)));
#endif
  std::memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
}
inline void streamed() {
#if defined(LOWBIT_ISA_AVX2) || (defined(LOWBIT_ISA_AVX512) && !defined(LOWBIT_EMULATE))
  _mm_sfence();
#endif
}

// f(row) for all rows, some at a time on a thread; `room` floats of its own go with it: f(row, room).
template <class F>
inline void for_rows(int64_t n, int64_t k, int64_t room, int threads, const F& f) {
  const int64_t run = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, k));
  parallel_for((n + run - 1) / run, threads, [&](int64_t task) {
    const Room own(room);
    for (int64_t row = task * run; row < std::min(n, (task + 1) * run); ++row) f(row, own.data());
  });
}

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

inline float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// from[at .. at + count) as float32 -> to, zeros after them up to `padded`; the bits of the largest magnitude.
template <int kDtype>
inline int32_t load_row(const void* from, int64_t at, int64_t count, float* to, int64_t padded) {
  using namespace simd;
  I32 largest = zero_i32();
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    const F32 value = load_as_f32(from, at + c, kDtype);
    store_f32(to + c, value);
    largest = max(largest, as_i32(abs(value)));
  }
  if (c < count) {
    const F32 value = load_first(from, at + c, static_cast<int>(count - c), kDtype);
    store_f32(to + c, value);
    largest = max(largest, as_i32(abs(value)));
    c += kLanes;
  }
  for (; c < padded; c += kLanes) store_f32(to + c, zero_f32());
  return reduce_max(largest);
}

// The bits, as float32, of the largest magnitude among count values: 16-bit ones are compared two to a lane.
template <int kDtype>
inline int32_t largest_bits(const void* from, int64_t count) {
  using namespace simd;
  I32 largest = zero_i32(), other = zero_i32();
  int64_t c = 0;
  if constexpr (kDtype == kFloat32) {
    const auto* at = static_cast<const float*>(from);
    for (; c + kLanes <= count; c += kLanes) largest = max(largest, as_i32(abs(load_f32(at + c))));
  } else {
    const auto* at = static_cast<const uint16_t*>(from);
    const I32 upper = set1_i32(0x7fff0000);
    for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
      const I32 two = load_i32(at + c);
      largest = max(largest, bit_and(two, upper));
      other = max(other, bit_and(shift_left<16>(two), upper));
    }
    largest = max(largest, other);
  }
  int32_t bits = reduce_max(largest);
  if constexpr (kDtype == kFloat16) {
    alignas(64) uint16_t half[kLanes] = {static_cast<uint16_t>(bits >> 16)};
    bits = reduce_max(as_i32(load_f16(half)));  // of a NaN, too, a NaN
  }
  for (; c < count; c += kLanes) {
    const int left = static_cast<int>(std::min<int64_t>(kLanes, count - c));
    bits = std::max(bits, reduce_max(as_i32(abs(load_first(from, c, left, kDtype)))));
  }
  return bits;
}

inline int32_t largest_bits(const Matrix& w, int threads) {
  const int64_t count = w.n * w.k, tasks = (count + kTaskElements - 1) / kTaskElements;
  std::vector<int32_t> found(static_cast<size_t>(tasks), 0);
  with_dtype(w.dtype, [&](auto dtype) {
    parallel_for(tasks, threads, [&](int64_t task) {
      const int64_t begin = task * kTaskElements, end = std::min(count, begin + kTaskElements);
      const auto* at = static_cast<const unsigned char*>(w.values) + begin * element_size(w.dtype);
      found[static_cast<size_t>(task)] = largest_bits<dtype.value>(at, end - begin);
    });
  });
  return found.empty() ? 0 : *std::max_element(found.begin(), found.end());
}

// Weights of columns, with zeros where a row is filled up.
inline std::vector<float> padded_weights(const float* weights, int64_t k, int64_t padded) {
  std::vector<float> made(static_cast<size_t>(padded), 0.0f);
  if (weights) std::copy_n(weights, k, made.begin());
  return made;
}

// ---- division ------------------------------------------------------------------------------------------------------

// Quotients by a number that many are divided by, as a division rounds them, at a third of its price.
//
// The product with the reciprocal, whose own rounding is known, is less than a step off, so what it leaves of the
// dividend is exact, and that times the reciprocal corrects it to the nearest (Markstein). That needs a product and a
// sum rounded once, and no underflow on the way: in the range below that happens only to quotients that are far smaller
// than any code. A zero may lose its sign.
class Divisor {
 public:
#if defined(LOWBIT_ISA_PORTABLE) && !defined(__FP_FAST_FMAF)
  static constexpr bool kFused = false;
#else
  static constexpr bool kFused = true;
#endif

  explicit Divisor(simd::F32 by) : by_(by), minus_(simd::sub(simd::zero_f32(), by)) {
    using namespace simd;
    inverse_ = div(set1_f32(1.0f), by);
    rest_ = mul(fma(minus_, inverse_, set1_f32(1.0f)), inverse_);
    fast_ = kFused && !any(less(by, set1_f32(0x1p-40f))) && !any(less(set1_f32(0x1p100f), by));
  }

  simd::F32 operator()(simd::F32 x) const {
    using namespace simd;
    if (!fast_) return div(x, by_);
    const F32 near = fma(x, inverse_, mul(x, rest_));
    return fma(fma(minus_, near, x), inverse_, near);
  }

 private:
  simd::F32 by_, minus_, inverse_, rest_;
  bool fast_;
};

// ---- rounding ------------------------------------------------------------------------------------------------------
// A grid gives the code of a quotient, and for a search the value of the nearest code of a magnitude (ties either way):
// p - (p - c) with p = max(c, 2^e) * (2^s + 1) leaves of c the bits that p has no room for.

struct E4m3Grid {
  static constexpr int kShift = 20;  // mantissa bits of a float32 that a code lacks
  static constexpr float kLargest = 448.0f, kSmallestNormal = 0x1p-6f, kSplit = 0x1p20f + 1.0f;
  static constexpr int32_t kBias = (127 - 7) << 3, kLastCode = 0x7e;
};

struct E5m2Grid {
  static constexpr int kShift = 21;
  static constexpr float kLargest = 57344.0f, kSmallestNormal = 0x1p-14f, kSplit = 0x1p21f + 1.0f;
  static constexpr int32_t kBias = (127 - 15) << 2, kLastCode = 0x7b;
};

// float8 codes of finite values in every lane: half to even, saturating.
//
// To a magnitude a power of two is added in whose binade the last bit is worth the step of the codes near that
// magnitude, so that the addition rounds and the low byte of the sum counts steps; it begins where, with the exponent
// shifted in beside it, the codes do. The low seven bits are the code; what is above them means nothing.
template <class Grid>
inline simd::I32 float8_magnitudes(simd::F32 size) {
  using namespace simd;
  constexpr int kMantissa = 23 - Grid::kShift;
  constexpr int32_t kBegin = -(Grid::kBias + (1 << kMantissa)) & 0xff;
  static_assert(kBegin % 2 == 0, "half to even");
  size = min(size, set1_f32(Grid::kLargest));
  const I32 power = max(bit_and(as_i32(size), set1_i32(0x7f800000)), as_i32(set1_f32(Grid::kSmallestNormal)));
  const F32 magic = as_f32(add(power, set1_i32((Grid::kShift << 23) + (1 << 22) + kBegin)));
  return add(as_i32(add(size, magic)), shift_right<Grid::kShift>(power));
}

// Codes of values. `sign` is the value, or what it is a quotient of: zeros keep their sign.
template <class Grid>
inline simd::I32 float8_codes(simd::F32 value, simd::F32 sign) {
  using namespace simd;
  const I32 code = float8_magnitudes<Grid>(abs(value));
  return bit_or(bit_and(code, set1_i32(0x7f)), bit_and(shift_right<24>(as_i32(sign)), set1_i32(0x80)));
}

// What rounding to the nearest value changes in a quotient (its sign does not matter).
template <class Grid>
inline simd::F32 float8_miss(simd::F32 value) {
  using namespace simd;
  const F32 size = abs(value), kept = min(size, set1_f32(Grid::kLargest));
  const F32 p = mul(max(kept, set1_f32(Grid::kSmallestNormal)), set1_f32(Grid::kSplit));
  return sub(size, sub(p, sub(p, kept)));
}

// e2m1 codes 0..15 of finite values, in the same way.
inline simd::I32 e2m1_codes(simd::F32 value, simd::F32 sign) {
  using namespace simd;
  const F32 size = min(abs(value), set1_f32(6.0f));
  const I32 power = max(bit_and(as_i32(size), set1_i32(0x7f800000)), set1_i32(127 << 23));
  const F32 magic = as_f32(add(power, set1_i32((22 << 23) + (1 << 22) + 2)));  // two codes lie below each octave
  const I32 code = add(as_i32(add(size, magic)), shift_right<22>(power));
  return bit_or(bit_and(code, set1_i32(7)), bit_and(shift_right<28>(as_i32(sign)), set1_i32(8)));
}

// For a magnitude: what rounding to the nearest e2m1 value changes.
inline simd::F32 e2m1_miss(simd::F32 size) {
  using namespace simd;
  const F32 kept = min(size, set1_f32(6.0f));
  const F32 p = mul(max(kept, set1_f32(1.0f)), set1_f32(0x1p22f + 1.0f));
  return sub(size, sub(p, sub(p, kept)));
}

inline simd::I32 integer_codes(simd::F32 value, float low, float high) {
  using namespace simd;
  return to_i32(max(min(value, set1_f32(high)), set1_f32(low)));
}

inline simd::F32 integer_miss(simd::F32 value, simd::F32 low, simd::F32 high) {
  using namespace simd;
  const F32 magic = set1_f32(0x1.8p23f);
  return sub(value, sub(add(max(min(value, high), low), magic), magic));
}

// The value of positive float8_e4m3fn codes, 0 to 0x7e.
inline simd::F32 e4m3_values(simd::I32 codes) {
  using namespace simd;
  const F32 normal = as_f32(add(shift_left<20>(codes), set1_i32(120 << 23)));
  return select(less(codes, set1_i32(8)), mul(to_f32(codes), set1_f32(0x1p-9f)), normal);
}

// 2^(code - 127) for code 0 to 254; 0 is a float32 subnormal.
inline float e8m0_power(int32_t code) { return float_of(code ? code << 23 : 0x400000); }

// A finite float32 as it is stored in a dtype, and what it is then. Small: a search makes many.
struct Stored {
  uint32_t bits;
  float value;

  Stored(float exact, int dtype) {
    std::memcpy(&bits, &exact, sizeof bits);
    value = exact;
    if (dtype == kBfloat16) {
      bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      value = float_of(static_cast<int32_t>(bits << 16));
    } else if (dtype == kFloat16) {
      alignas(64) uint16_t halves[simd::kLanes];
      alignas(64) float lanes[simd::kLanes];
      simd::store_f16(halves, simd::set1_f32(exact));
      simd::store_f32(lanes, simd::load_f16(halves));
      bits = halves[0];
      value = lanes[0];
    }
  }
  void put(void* to, int64_t at, int dtype) const {  // the machine is little-endian, as the files are
    const auto size = static_cast<size_t>(element_size(dtype));
    std::memcpy(static_cast<unsigned char*>(to) + static_cast<size_t>(at) * size, &bits, size);
  }
};

}  // namespace lowbit
