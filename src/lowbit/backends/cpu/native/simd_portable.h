// simd.h for any machine: 4 lanes of plain C++, in the vector types that GCC and Clang translate into whatever the
// machine's base set has (SSE2 on x86-64, NEON on ARM).
//
// Conversions and roundings give the same bits as the other sets. Only `fma` may not: without an instruction for it the
// product is rounded, too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "transpose.h"

namespace lowbit::simd {

constexpr int kLanes = 4;

namespace plain {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));  // arithmetic on int32 that wraps around is done in these
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint8_t Octets __attribute__((vector_size(16)));

template <class T>
inline T load(const void* from) {
  T made;
  std::memcpy(&made, from, sizeof made);
  return made;
}
inline Ints all(int32_t value) { return Ints{value, value, value, value}; }
inline Floats all(float value) { return Floats{value, value, value, value}; }
inline Words words(Ints a) { return reinterpret_cast<Words>(a); }
inline Ints ints(Words a) { return reinterpret_cast<Ints>(a); }
inline Ints bits(Floats a) { return reinterpret_cast<Ints>(a); }
inline Floats floats(Ints a) { return reinterpret_cast<Floats>(a); }
inline Ints choose(Ints where, Ints yes, Ints no) { return (yes & where) | (no & ~where); }

}  // namespace plain

struct F32 {
  plain::Floats v;
};
struct I32 {
  plain::Ints v;
};
struct Bytes {
  plain::Octets v;
};

// ---- float32 -------------------------------------------------------------------------------------------------------

inline F32 set1_f32(float value) { return {plain::all(value)}; }
inline F32 zero_f32() { return set1_f32(0.0f); }
inline F32 load_f32(const float* from) { return {plain::load<plain::Floats>(from)}; }
inline void store_f32(float* to, F32 a) { std::memcpy(to, &a.v, sizeof a.v); }

inline F32 add(F32 a, F32 b) { return {a.v + b.v}; }
inline F32 sub(F32 a, F32 b) { return {a.v - b.v}; }
inline F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 div(F32 a, F32 b) { return {a.v / b.v}; }
inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__FP_FAST_FMAF)
  F32 made;
  for (int i = 0; i < kLanes; ++i) made.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return made;
#else
  return {a.v * b.v + c.v};
#endif
}
// The second one where they are not ordered, as x86 has it.
inline F32 min(F32 a, F32 b) { return {plain::floats(plain::choose(a.v < b.v, plain::bits(a.v), plain::bits(b.v)))}; }
inline F32 max(F32 a, F32 b) { return {plain::floats(plain::choose(a.v > b.v, plain::bits(a.v), plain::bits(b.v)))}; }
inline F32 abs(F32 a) { return {plain::floats(plain::bits(a.v) & plain::all(INT32_MAX))}; }

// Lane i of vector j <-> lane j of vector i.
inline void transpose(F32 (&rows)[kLanes]) {
  Quad<float> quads[kLanes];
  for (int i = 0; i < kLanes; ++i) quads[i] = rows[i].v;
  transpose_quads(quads);
  for (int i = 0; i < kLanes; ++i) rows[i].v = quads[i];
}

inline float reduce_add(F32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(F32 a) {
  const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2], odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return even > odd ? even : odd;
}

// ---- int32 ---------------------------------------------------------------------------------------------------------

inline I32 set1_i32(int32_t value) { return {plain::all(value)}; }
inline I32 zero_i32() { return set1_i32(0); }
inline I32 load_i32(const void* from) { return {plain::load<plain::Ints>(from)}; }
inline void store_i32(void* to, I32 a) { std::memcpy(to, &a.v, sizeof a.v); }
inline I32 add(I32 a, I32 b) { return {plain::ints(plain::words(a.v) + plain::words(b.v))}; }
inline I32 sub(I32 a, I32 b) { return {plain::ints(plain::words(a.v) - plain::words(b.v))}; }
inline I32 mul(I32 a, I32 b) { return {plain::ints(plain::words(a.v) * plain::words(b.v))}; }
inline I32 bit_and(I32 a, I32 b) { return {a.v & b.v}; }
inline I32 bit_or(I32 a, I32 b) { return {a.v | b.v}; }
inline I32 bit_xor(I32 a, I32 b) { return {a.v ^ b.v}; }
inline I32 min(I32 a, I32 b) { return {plain::choose(a.v < b.v, a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {plain::choose(a.v > b.v, a.v, b.v)}; }
template <int kBits>
inline I32 shift_left(I32 a) {
  return {plain::ints(plain::words(a.v) << kBits)};
}
template <int kBits>
inline I32 shift_right(I32 a) {  // zeros come in
  return {plain::ints(plain::words(a.v) >> kBits)};
}
template <int kBits>
inline I32 shift_right_signed(I32 a) {
  return {a.v >> kBits};
}
inline int32_t reduce_add(I32 a) {
  const plain::Words w = plain::words(a.v);
  return static_cast<int32_t>((w[0] + w[2]) + (w[1] + w[3]));
}
inline int32_t reduce_max(I32 a) {
  const int32_t even = a.v[0] > a.v[2] ? a.v[0] : a.v[2], odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return even > odd ? even : odd;
}

inline F32 to_f32(I32 a) { return {__builtin_convertvector(a.v, plain::Floats)}; }
inline I32 to_i32(F32 a) {  // half to even; INT32_MIN for NaN and what is too large
  const plain::Ints fits = abs(a).v < plain::all(0x1p31f);
  const plain::Floats x = plain::floats(plain::bits(a.v) & fits);
  // Beside 2^23 there is no room for a fraction: the sum is rounded to an integer.
  const plain::Ints sign = plain::bits(x) & plain::all(INT32_MIN);
  const plain::Floats large = plain::floats(plain::bits(plain::all(0x1p23f)) | sign);
  const plain::Ints has_fraction = abs(F32{x}).v < plain::all(0x1p23f);
  const plain::Floats rounded =
      plain::floats(plain::choose(has_fraction, plain::bits((x + large) - large), plain::bits(x)));
  return {plain::choose(fits, __builtin_convertvector(rounded, plain::Ints), plain::all(INT32_MIN))};
}
inline F32 as_f32(I32 a) { return {plain::floats(a.v)}; }
inline I32 as_i32(F32 a) { return {plain::bits(a.v)}; }
inline I32 widen_u8(const uint8_t* from) { return {plain::Ints{from[0], from[1], from[2], from[3]}}; }  // kLanes bytes
inline I32 widen_s8(const int8_t* from) { return {plain::Ints{from[0], from[1], from[2], from[3]}}; }
inline I32 widen_u16(const uint16_t* from) { return {plain::Ints{from[0], from[1], from[2], from[3]}}; }
// The low byte of every lane, kLanes bytes.
inline void store_low_bytes(uint8_t* to, I32 a) {
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint8_t>(a.v[i]);
}
// The low 16 bits of every lane of a, then of b, as 4 * kLanes bytes; the upper ones are zero.
inline void store_low_halves(uint8_t* to, I32 a, I32 b) {
  uint16_t halves[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    halves[i] = static_cast<uint16_t>(a.v[i]);
    halves[kLanes + i] = static_cast<uint16_t>(b.v[i]);
  }
  std::memcpy(to, halves, sizeof halves);
}
// The low nibble of every lane, kLanes / 2 bytes, the first in a byte's low half.
inline void store_nibbles(uint8_t* to, I32 a) {
  uint8_t codes[kLanes];
  store_low_bytes(codes, a);
  for (int i = 0; i < kLanes / 2; ++i) to[i] = static_cast<uint8_t>((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
}

// ---- masks ---------------------------------------------------------------------------------------------------------

struct Mask {
  plain::Ints v;  // all bits of a lane, or none
};
inline Mask less(F32 a, F32 b) { return {a.v < b.v}; }  // false for NaN
inline Mask less(I32 a, I32 b) { return {a.v < b.v}; }
inline Mask equal(I32 a, I32 b) { return {a.v == b.v}; }
inline Mask not_a_number(F32 a) { return {a.v != a.v}; }
inline I32 select(Mask where, I32 yes, I32 no) { return {plain::choose(where.v, yes.v, no.v)}; }
inline F32 select(Mask where, F32 yes, F32 no) { return as_f32(select(where, as_i32(yes), as_i32(no))); }
inline bool any(Mask a) { return (a.v[0] | a.v[1] | a.v[2] | a.v[3]) != 0; }

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

namespace plain {

inline void store_low_halves(uint16_t* to, I32 a) {
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint16_t>(a.v[i]);
}

}  // namespace plain

inline F32 load_bf16(const uint16_t* from) { return as_f32(shift_left<16>(widen_u16(from))); }
// Half to even; NaN stays NaN.
inline I32 bf16_bits(F32 a) {
  const I32 bits = as_i32(a);
  const I32 odd = bit_and(shift_right<16>(bits), set1_i32(1));
  const I32 rounded = shift_right<16>(add(add(bits, set1_i32(0x7fff)), odd));
  const I32 quiet = bit_or(shift_right<16>(bits), set1_i32(0x40));
  return select(not_a_number(a), quiet, rounded);
}
inline void store_bf16(uint16_t* to, F32 a) { plain::store_low_halves(to, bf16_bits(a)); }
// 16 values at once.
inline void store16_bf16(uint16_t* to, const F32 (&a)[16 / kLanes]) {
  for (int i = 0; i < 16 / kLanes; ++i) store_bf16(to + i * kLanes, a[i]);
}
namespace plain {

inline F32 half_to_f32(I32 half) {  // the low 16 bits of every lane
  const I32 size = bit_and(half, set1_i32(0x7fff));
  const I32 moved = shift_left<13>(size);
  const I32 subnormal = as_i32(mul(to_f32(size), set1_f32(0x1p-24f))), normal = add(moved, set1_i32(112 << 23));
  const I32 quiet = bit_or(moved, select(less(set1_i32(0x7c00), size), set1_i32(0x7fc00000), set1_i32(0x7f800000)));
  const I32 finite = select(less(size, set1_i32(0x400)), subnormal, normal);
  const I32 found = select(less(set1_i32(0x7bff), size), quiet, finite);
  return as_f32(bit_or(found, shift_left<16>(bit_and(half, set1_i32(0x8000)))));
}

}  // namespace plain

inline F32 load_f16(const uint16_t* from) { return plain::half_to_f32(widen_u16(from)); }
inline void store_f16(uint16_t* to, F32 a) {  // half to even; NaN stays NaN
  const I32 bits = as_i32(a), size = bit_and(bits, set1_i32(INT32_MAX));
  const I32 odd = bit_and(shift_right<13>(size), set1_i32(1));
  const I32 rounded = sub(shift_right<13>(add(add(size, set1_i32(0xfff)), odd)), set1_i32(112 << 10));
  const I32 normal = min(rounded, set1_i32(0x7c00));
  // The last place of 0.5 is 2^-24, which is that of subnormal halves: the sum is rounded as they are.
  const I32 subnormal = sub(as_i32(add(as_f32(size), set1_f32(0.5f))), as_i32(set1_f32(0.5f)));
  const I32 quiet = bit_or(set1_i32(0x7e00), bit_and(shift_right<13>(size), set1_i32(0x3ff)));
  const I32 finite = select(less(size, set1_i32(113 << 23)), subnormal, normal);
  const I32 found = select(less(set1_i32(0x7f800000), size), quiet, finite);
  plain::store_low_halves(to, bit_or(found, bit_and(shift_right<16>(bits), set1_i32(0x8000))));
}

// ---- 8-bit floats --------------------------------------------------------------------------------------------------

// kLanes codes of float8_e4m3fn, times 2^-8: moved to their places in a float16, whose exponent counts from 8 lower.
// The code 0x7f of either sign is NaN: one more carries into bit 14, which then fills the exponent with ones.
inline F32 load_e4m3(const uint8_t* from) {
  const I32 moved = shift_left<7>(widen_u8(from));
  const I32 size = bit_and(moved, set1_i32(0x3f80)), sign = shift_left<1>(bit_and(moved, set1_i32(0x4000)));
  const I32 carry = bit_and(add(size, set1_i32(0x80)), set1_i32(0x4000));
  return plain::half_to_f32(bit_or(bit_or(size, carry), sign));
}
// 16 codes, as load_e4m3 gives them.
inline void load16_e4m3(const uint8_t* from, F32 (&to)[16 / kLanes]) {
  for (int i = 0; i < 16 / kLanes; ++i) to[i] = load_e4m3(from + i * kLanes);
}
// 16 codes of float8_e5m2: the upper bytes of float16 values.
inline void load16_e5m2(const uint8_t* from, F32 (&to)[16 / kLanes]) {
  for (int i = 0; i < 16 / kLanes; ++i) to[i] = plain::half_to_f32(shift_left<8>(widen_u8(from + i * kLanes)));
}
// Columns of 16 codes that are decoded together, each as load16 gives it.
constexpr int kFp8Columns = 1;
inline void load_e4m3_columns(const uint8_t* from, F32 (&to)[kFp8Columns][16 / kLanes]) { load16_e4m3(from, to[0]); }
inline void load_e5m2_columns(const uint8_t* from, F32 (&to)[kFp8Columns][16 / kLanes]) { load16_e5m2(from, to[0]); }

// ---- a table of 16 floats, indexed by the low four bits of every lane
// -------------------------------------------------

struct Table16 {
  float values[16];
};
inline Table16 make_table(const float* values) {
  Table16 made;
  std::memcpy(made.values, values, sizeof made.values);
  return made;
}
inline F32 lookup(const Table16& table, I32 index) {  // higher bits of the index are ignored
  F32 found;
  for (int i = 0; i < kLanes; ++i) found.v[i] = table.values[index.v[i] & 15];
  return found;
}

// ---- bytes, and products of four of them to a lane
// ----------------------------------------------------------------------

inline Bytes load_bytes(const void* from) { return {plain::load<plain::Octets>(from)}; }
inline void store_bytes(void* to, Bytes a) { std::memcpy(to, &a.v, sizeof a.v); }
inline Bytes as_bytes(I32 a) { return {reinterpret_cast<plain::Octets>(a.v)}; }
inline I32 as_i32(Bytes a) { return {reinterpret_cast<plain::Ints>(a.v)}; }
inline Bytes set4_bytes(const void* four) {  // the same four in every lane
  int32_t word;
  std::memcpy(&word, four, 4);
  return as_bytes(set1_i32(word));
}
inline Bytes low_nibbles(Bytes a) { return {a.v & 15}; }
inline Bytes high_nibbles(Bytes a) { return {a.v >> 4}; }
// A byte for each of 16 codes; codes above 15 are not allowed.
inline Bytes lookup_bytes(const void* table, Bytes codes) {
  const auto* values = static_cast<const uint8_t*>(table);
  Bytes found;
  for (int i = 0; i < 4 * kLanes; ++i) found.v[i] = values[codes.v[i] & 15];
  return found;
}

// The codes of 2 * kLanes bytes, the low nibble first: 4 * kLanes bytes of 0..15.
inline Bytes nibbles_in_order(const void* from) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  Bytes found;
  for (int i = 0; i < 2 * kLanes; ++i) {
    found.v[2 * i] = bytes[i] & 15;
    found.v[2 * i + 1] = bytes[i] >> 4;
  }
  return found;
}
// kLanes / 4 of many tables of 16 bytes, beside each other: a byte each says which.
inline Bytes choose_tables(const uint8_t* tables, const uint8_t* which) {
  return load_bytes(tables + static_cast<uint64_t>(which[0]) * 16);
}
// A byte for each code, every 16 of them from their own table.
inline Bytes lookup_bytes(Bytes tables, Bytes codes) {
  Bytes found;
  for (int i = 0; i < 4 * kLanes; ++i) found.v[i] = tables.v[codes.v[i] & 15];
  return found;
}

namespace plain {

// Bytes 0 and 2, and bytes 1 and 3, of every lane as int16: of bytes without a sign, and of bytes with one.
inline Shorts even_unsigned(Bytes a) { return reinterpret_cast<Shorts>(reinterpret_cast<Halves>(a.v) & 0xff); }
inline Shorts odd_unsigned(Bytes a) { return reinterpret_cast<Shorts>(reinterpret_cast<Halves>(a.v) >> 8); }
inline Shorts even_signed(Bytes a) { return reinterpret_cast<Shorts>(reinterpret_cast<Halves>(a.v) << 8) >> 8; }
inline Shorts odd_signed(Bytes a) { return reinterpret_cast<Shorts>(a.v) >> 8; }
inline Ints low_shorts(Ints a) { return ints(words(a) << 16) >> 16; }
// The two int16 of every lane, added.
inline Ints pair_sums(Shorts a) { return low_shorts(reinterpret_cast<Ints>(a)) + (reinterpret_cast<Ints>(a) >> 16); }

}  // namespace plain

// Sums of products of codes 0..15 and int8: at most kDot4Steps (kDot4StepsInt4 where the int8 are within -15..15)
// may be added up before `total`, which gives the int32 of every lane.
struct Dot4 {
  plain::Shorts v;  // pairs of int16
};
constexpr int kDot4Steps = 8;       // 8 * 2 * 15 * 128 < 2**15
constexpr int kDot4StepsInt4 = 64;  // 64 * 2 * 15 * 15 < 2**15
inline Dot4 zero_dot4() { return {reinterpret_cast<plain::Shorts>(plain::all(0))}; }
// A sum that begins at a value; with all that is added before `total` it has to stay within -2**15..2**15.
inline Dot4 start_dot4(I32 value) { return {reinterpret_cast<plain::Shorts>(value.v & plain::all(0xffff))}; }
inline Dot4 dot4(Dot4 sum, Bytes codes, Bytes x) {
  const plain::Shorts even = plain::even_unsigned(codes) * plain::even_signed(x);
  return {sum.v + even + plain::odd_unsigned(codes) * plain::odd_signed(x)};
}
inline I32 total(Dot4 sum) { return {plain::pair_sums(sum.v)}; }

// Sums of products of int8 weights (-128 allowed) and int8 activations (-127..127). The result is too large by
// kDot8Offset times the sum of the activations.
struct Weights8 {
  plain::Shorts even, odd;
};
constexpr int kDot8Offset = 0;
constexpr bool kDot8IsOneStep = false;  // whether it is an instruction; if not, dot2 multiplies as fast
inline Weights8 prepare8(Bytes w) { return {plain::even_signed(w), plain::odd_signed(w)}; }
inline I32 dot8(I32 sum, Weights8 w, Bytes x) {
  const plain::Shorts pairs = w.even * plain::even_signed(x) + w.odd * plain::odd_signed(x);  // at most 2 * 128 * 127
  return add(sum, {plain::pair_sums(pairs)});
}

// Bytes 0 and 2, or 1 and 3, of every lane, as two int16 with their sign: what `dot2` multiplies.
inline I32 even_bytes(Bytes a) { return {reinterpret_cast<plain::Ints>(plain::even_signed(a))}; }
inline I32 odd_bytes(Bytes a) { return {reinterpret_cast<plain::Ints>(plain::odd_signed(a))}; }
// sum + the products of the two int16 of every lane.
inline I32 dot2(I32 sum, I32 a, I32 b) {
  const I32 low = mul(I32{plain::low_shorts(a.v)}, I32{plain::low_shorts(b.v)});
  return add(add(sum, low), mul(shift_right_signed<16>(a), shift_right_signed<16>(b)));
}

// The codes of kLanes / 2 bytes, the low nibble first; bits above the lowest four are not cleared.
inline I32 spread_nibbles(const void* from) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  return {plain::Ints{bytes[0], bytes[0] >> 4, bytes[1], bytes[1] >> 4}};
}

}  // namespace lowbit::simd
