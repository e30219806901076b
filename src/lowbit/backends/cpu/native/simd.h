// The vector operations that kernels are written in; one header an instruction set implements them.
//
//   F32, I32   kLanes float32 or int32 values
//   Bytes      4 * kLanes bytes, as four beside each other in every 32-bit lane
//
// A kernel sees nothing of the set but kLanes and the few constants named here; how many lanes there are never changes
// what a result is a sum of, only the order of summation inside one set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(LOWBIT_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(LOWBIT_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(LOWBIT_ISA_NEON)
#include "simd_neon.h"
#elif defined(LOWBIT_ISA_PORTABLE)
#include "simd_portable.h"
#else
#error "no instruction set chosen: define one of LOWBIT_ISA_PORTABLE, _AVX2, _AVX512, _NEON"
#endif

namespace lowbit {

// Element types of activations, scales and outputs, as the launchers number them.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

inline int element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// f(a constant that is the dtype), for code that is compiled once a dtype.
template <class F>
inline void with_dtype(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32:
      return f(std::integral_constant<int, kFloat32>{});
    case kBfloat16:
      return f(std::integral_constant<int, kBfloat16>{});
    default:
      return f(std::integral_constant<int, kFloat16>{});
  }
}

namespace simd {

// kLanes values of a dtype that is known at run time, as float32.
inline F32 load_as_f32(const void* from, int64_t at, int dtype) {
  if (dtype == kFloat32) return load_f32(static_cast<const float*>(from) + at);
  const auto* half = static_cast<const uint16_t*>(from) + at;
  return dtype == kBfloat16 ? load_bf16(half) : load_f16(half);
}

inline void store_from_f32(void* to, int64_t at, F32 value, int dtype) {
  if (dtype == kFloat32) return store_f32(static_cast<float*>(to) + at, value);
  auto* half = static_cast<uint16_t*>(to) + at;
  return dtype == kBfloat16 ? store_bf16(half, value) : store_f16(half, value);
}

#if !defined(LOWBIT_ISA_AVX512)  // which looks int16 up
// A table of 16 int8, for pairs of int16.
struct PairTable {
  const int8_t* values;
};
inline PairTable make_pair_table(const int8_t* values) { return {values}; }
// What codes kAt and kAt + 4 of the 8 of every lane stand for, as two int16.
template <int kAt>
inline I32 lookup_pair(PairTable table, I32 word) {
  const Bytes values = lookup_bytes(table.values, kAt % 2 ? high_nibbles(as_bytes(word)) : low_nibbles(as_bytes(word)));
  return kAt / 2 ? odd_bytes(values) : even_bytes(values);
}
#endif

// f(0), f(1), ... with numbers that are known when compiling, as shifts want them.
template <int kCount, int kFirst = 0, class F>
inline __attribute__((always_inline)) void for_each_place(F&& f) {
  if constexpr (kFirst < kCount) {
    f(std::integral_constant<int, kFirst>{});
    for_each_place<kCount, kFirst + 1>(f);
  }
}

}  // namespace simd

// The first `count` values of a row, for the ends of rows that are no whole vector; the rest of the vector is zero.
inline simd::F32 load_first(const void* from, int64_t at, int count, int dtype) {
  alignas(64) unsigned char room[4 * simd::kLanes] = {};
  const int size = element_size(dtype);
  std::memcpy(room, static_cast<const unsigned char*>(from) + at * size, static_cast<size_t>(count) * size);
  return simd::load_as_f32(room, 0, dtype);
}

inline void store_first(void* to, int64_t at, int count, simd::F32 value, int dtype) {
  alignas(64) unsigned char room[4 * simd::kLanes];
  const int size = element_size(dtype);
  simd::store_from_f32(room, 0, value, dtype);
  std::memcpy(static_cast<unsigned char*>(to) + at * size, room, static_cast<size_t>(count) * size);
}

}  // namespace lowbit
