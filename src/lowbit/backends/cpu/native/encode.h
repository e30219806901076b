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

inline int32_t largest_of(simd::I32 a) {
  alignas(64) int32_t lanes[simd::kLanes];
  simd::store_i32(lanes, a);
  return *std::max_element(lanes, lanes + simd::kLanes);
}

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
  return largest_of(largest);
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
  int32_t bits = largest_of(largest);
  if constexpr (kDtype == kFloat16) {
    alignas(64) uint16_t half[kLanes] = {static_cast<uint16_t>(bits >> 16)};
    bits = largest_of(as_i32(load_f16(half)));  // of a NaN, too, a NaN
  }
  for (; c < count; c += kLanes) {
    const int left = static_cast<int>(std::min<int64_t>(kLanes, count - c));
    bits = std::max(bits, largest_of(as_i32(abs(load_first(from, c, left, kDtype)))));
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

// ---- rounding ------------------------------------------------------------------------------------------------------
// A grid gives the code of a quotient, and for a search the value of the nearest code of a magnitude (ties either way):
// p - (p - c) with p = max(c, 2^e) * (2^s + 1) leaves of c the bits that p has no room for.

struct E4m3Grid {
  static constexpr int kShift = 20;  // mantissa bits of a float32 that a code lacks
  static constexpr float kLargest = 448.0f, kSmallestNormal = 0x1p-6f, kSplit = 0x1p20f + 1.0f;
  static constexpr int32_t kBias = (127 - 7) << 3;
  static constexpr float kMagic = 0x1p14f;  // its last bit is worth a subnormal step
};

struct E5m2Grid {
  static constexpr int kShift = 21;
  static constexpr float kLargest = 57344.0f, kSmallestNormal = 0x1p-14f, kSplit = 0x1p21f + 1.0f;
  static constexpr int32_t kBias = (127 - 15) << 2;
  static constexpr float kMagic = 0x1p7f;
};

// float8 codes of finite values in the low byte of every lane: half to even, saturating.
template <class Grid>
inline simd::I32 float8_codes(simd::F32 value) {
  using namespace simd;
  const F32 size = min(abs(value), set1_f32(Grid::kLargest));
  const I32 bits = as_i32(size);
  const I32 odd = bit_and(shift_right<Grid::kShift>(bits), set1_i32(1));
  const I32 half = set1_i32((1 << (Grid::kShift - 1)) - 1);
  const I32 normal = sub(shift_right<Grid::kShift>(add(add(bits, half), odd)), set1_i32(Grid::kBias));
  const I32 magic = as_i32(set1_f32(Grid::kMagic));
  const I32 subnormal = sub(as_i32(add(size, set1_f32(Grid::kMagic))), magic);
  const I32 code = select(less(size, set1_f32(Grid::kSmallestNormal)), subnormal, normal);
  return bit_or(code, bit_and(shift_right<24>(as_i32(value)), set1_i32(0x80)));
}

// What rounding to the nearest value changes in a quotient (its sign does not matter).
template <class Grid>
inline simd::F32 float8_miss(simd::F32 value) {
  using namespace simd;
  const F32 size = abs(value), kept = min(size, set1_f32(Grid::kLargest));
  const F32 p = mul(max(kept, set1_f32(Grid::kSmallestNormal)), set1_f32(Grid::kSplit));
  return sub(size, sub(p, sub(p, kept)));
}

// e2m1 codes 0..15 of finite values: half to even, saturating at 6; zeros keep their sign.
inline simd::I32 e2m1_codes(simd::F32 value) {
  using namespace simd;
  const F32 size = min(abs(value), set1_f32(6.0f));
  // The power of two below, from 1 on; 1.5 * 2^22 of it has a last bit that is worth the step of the codes there.
  const I32 power = max(bit_and(as_i32(size), set1_i32(0x7f800000)), set1_i32(127 << 23));
  const I32 magic = add(power, set1_i32((22 << 23) + (1 << 22)));
  const I32 steps = sub(as_i32(add(size, as_f32(magic))), magic);
  const I32 code = add(steps, sub(shift_right<22>(power), set1_i32(2 * 127)));  // two codes lie below each octave
  return bit_or(code, bit_and(shift_right<28>(as_i32(value)), set1_i32(8)));
}

// The same for a magnitude: what rounding changes.
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

// ---- packing -------------------------------------------------------------------------------------------------------

// kLanes codes 0..15 -> kLanes / 2 bytes, the first in the low nibble.
inline void store_nibbles(uint8_t* to, simd::I32 codes) {
  alignas(64) uint8_t bytes[std::max(simd::kLanes, 8)] = {};
  simd::store_low_bytes(bytes, codes);
  for (int i = 0; i < simd::kLanes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    word = (word | word >> 4) & 0x00ff00ff00ff00ff;
    word = (word | word >> 8) & 0x0000ffff0000ffff;
    word |= word >> 16;
    std::memcpy(to + i / 2, &word, std::min(simd::kLanes, 8) / 2);
  }
}

}  // namespace lowbit
