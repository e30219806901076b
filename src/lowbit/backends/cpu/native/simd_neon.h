// simd.h for 64-bit ARM with dot products (NEON, FEAT_DotProd): 4 lanes.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace lowbit::simd {

constexpr int kLanes = 4;

struct F32 {
  float32x4_t v;
};
struct I32 {
  int32x4_t v;
};
struct Bytes {
  uint8x16_t v;
};

// ---- float32 -------------------------------------------------------------------------------------------------------

inline F32 zero_f32() { return {vdupq_n_f32(0.0f)}; }
inline F32 set1_f32(float value) { return {vdupq_n_f32(value)}; }
inline F32 load_f32(const float* from) { return {vld1q_f32(from)}; }
inline void store_f32(float* to, F32 a) { vst1q_f32(to, a.v); }

inline F32 add(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }  // a * b + c, rounded once
// The second one where they are not ordered, as x86 has it; fmin and fmax have rules of their own for NaN and -0.
inline F32 min(F32 a, F32 b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline F32 abs(F32 a) { return {vabsq_f32(a.v)}; }

// Lane i of vector j <-> lane j of vector i.
inline void transpose(F32 (&rows)[kLanes]) {
  float64x2_t pairs[4];  // of lanes 0 2 and 1 3, of rows 0 1 and 2 3
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = vreinterpretq_f64_f32(vtrn1q_f32(rows[i].v, rows[i + 1].v));
    pairs[i + 1] = vreinterpretq_f64_f32(vtrn2q_f32(rows[i].v, rows[i + 1].v));
  }
  for (int i = 0; i < 2; ++i) {
    rows[i].v = vreinterpretq_f32_f64(vtrn1q_f64(pairs[i], pairs[i + 2]));
    rows[i + 2].v = vreinterpretq_f32_f64(vtrn2q_f64(pairs[i], pairs[i + 2]));
  }
}

inline float reduce_add(F32 a) { return vaddvq_f32(a.v); }
inline float reduce_max(F32 a) { return vmaxvq_f32(a.v); }

// ---- int32 ---------------------------------------------------------------------------------------------------------

inline I32 zero_i32() { return {vdupq_n_s32(0)}; }
inline I32 set1_i32(int32_t value) { return {vdupq_n_s32(value)}; }
inline I32 load_i32(const void* from) {  // from any address: what is loaded as bytes may lie anywhere
  return {vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(from)))};
}
inline void store_i32(void* to, I32 a) { vst1q_u8(static_cast<uint8_t*>(to), vreinterpretq_u8_s32(a.v)); }
inline I32 add(I32 a, I32 b) { return {vaddq_s32(a.v, b.v)}; }
inline I32 sub(I32 a, I32 b) { return {vsubq_s32(a.v, b.v)}; }
inline I32 mul(I32 a, I32 b) { return {vmulq_s32(a.v, b.v)}; }
inline I32 bit_and(I32 a, I32 b) { return {vandq_s32(a.v, b.v)}; }
inline I32 bit_or(I32 a, I32 b) { return {vorrq_s32(a.v, b.v)}; }
inline I32 bit_xor(I32 a, I32 b) { return {veorq_s32(a.v, b.v)}; }
inline I32 min(I32 a, I32 b) { return {vminq_s32(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {vmaxq_s32(a.v, b.v)}; }
template <int kBits>
inline I32 shift_left(I32 a) {
  return {vshlq_n_s32(a.v, kBits)};
}
template <int kBits>
inline I32 shift_right(I32 a) {  // zeros come in
  if constexpr (kBits == 0)
    return a;
  else
    return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v), kBits))};
}
template <int kBits>
inline I32 shift_right_signed(I32 a) {
  if constexpr (kBits == 0)
    return a;
  else
    return {vshrq_n_s32(a.v, kBits)};
}
inline int32_t reduce_add(I32 a) { return vaddvq_s32(a.v); }
inline int32_t reduce_max(I32 a) { return vmaxvq_s32(a.v); }

inline F32 to_f32(I32 a) { return {vcvtq_f32_s32(a.v)}; }
inline I32 to_i32(F32 a) {  // half to even; INT32_MIN for NaN and what is too large, where ARM gives 0 and the nearest
  const uint32x4_t fits = vcltq_f32(vabsq_f32(a.v), vdupq_n_f32(0x1p31f));
  return {vbslq_s32(fits, vcvtnq_s32_f32(a.v), vdupq_n_s32(INT32_MIN))};
}
inline F32 as_f32(I32 a) { return {vreinterpretq_f32_s32(a.v)}; }
inline I32 as_i32(F32 a) { return {vreinterpretq_s32_f32(a.v)}; }
inline I32 widen_u8(const uint8_t* from) {  // kLanes bytes
  uint32_t four;
  std::memcpy(&four, from, 4);
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))))};
}
inline I32 widen_s8(const int8_t* from) {
  uint32_t four;
  std::memcpy(&four, from, 4);
  return {vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))))};
}
inline I32 widen_u16(const uint16_t* from) { return {vreinterpretq_s32_u32(vmovl_u16(vld1_u16(from)))}; }
// The low byte of every lane, kLanes bytes.
inline void store_low_bytes(uint8_t* to, I32 a) {
  const uint16x4_t halves = vmovn_u32(vreinterpretq_u32_s32(a.v));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
  std::memcpy(to, &four, 4);
}
// The low 16 bits of every lane of a, then of b, as 4 * kLanes bytes; the upper ones are zero.
inline void store_low_halves(uint8_t* to, I32 a, I32 b) {
  const uint16x8_t halves = vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(a.v)), vmovn_u32(vreinterpretq_u32_s32(b.v)));
  vst1q_u8(to, vreinterpretq_u8_u16(halves));
}
// The low nibble of every lane, kLanes / 2 bytes, the first in a byte's low half.
inline void store_nibbles(uint8_t* to, I32 a) {
  uint8_t codes[kLanes];
  store_low_bytes(codes, a);
  for (int i = 0; i < kLanes / 2; ++i) to[i] = static_cast<uint8_t>((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
}

// ---- masks ---------------------------------------------------------------------------------------------------------

struct Mask {
  uint32x4_t v;  // all bits of a lane, or none
};
inline Mask less(F32 a, F32 b) { return {vcltq_f32(a.v, b.v)}; }  // false for NaN
inline Mask less(I32 a, I32 b) { return {vcltq_s32(a.v, b.v)}; }
inline Mask equal(I32 a, I32 b) { return {vceqq_s32(a.v, b.v)}; }
inline Mask not_a_number(F32 a) { return {vmvnq_u32(vceqq_f32(a.v, a.v))}; }
inline F32 select(Mask where, F32 yes, F32 no) { return {vbslq_f32(where.v, yes.v, no.v)}; }
inline I32 select(Mask where, I32 yes, I32 no) { return {vbslq_s32(where.v, yes.v, no.v)}; }
inline bool any(Mask a) { return vmaxvq_u32(a.v) != 0; }

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

inline F32 load_bf16(const uint16_t* from) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16))}; }
// Half to even; NaN stays NaN.
inline I32 bf16_bits(F32 a) {
  const I32 bits = as_i32(a);
  const I32 odd = bit_and(shift_right<16>(bits), set1_i32(1));
  const I32 rounded = shift_right<16>(add(add(bits, set1_i32(0x7fff)), odd));
  const I32 quiet = bit_or(shift_right<16>(bits), set1_i32(0x40));
  return select(not_a_number(a), quiet, rounded);
}
inline void store_bf16(uint16_t* to, F32 a) { vst1_u16(to, vmovn_u32(vreinterpretq_u32_s32(bf16_bits(a).v))); }
// 16 values at once.
inline void store16_bf16(uint16_t* to, const F32 (&a)[16 / kLanes]) {
  for (int i = 0; i < 16 / kLanes; ++i) store_bf16(to + i * kLanes, a[i]);
}
inline F32 load_f16(const uint16_t* from) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)))}; }
inline void store_f16(uint16_t* to, F32 a) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }

// ---- 8-bit floats --------------------------------------------------------------------------------------------------

// kLanes codes of float8_e4m3fn, times 2^-8: moved to their places in a float16, whose exponent counts from 8 lower.
// The code 0x7f of either sign is NaN: one more carries into bit 14, which then fills the exponent with ones.
inline F32 load_e4m3(const uint8_t* from) {
  uint32_t four;
  std::memcpy(&four, from, 4);
  const int16x4_t wide = vshl_n_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))), 7);
  const int16x4_t carry = vand_s16(vadd_s16(wide, vdup_n_s16(0x80)), vdup_n_s16(0x4000));
  return {vcvt_f32_f16(vreinterpret_f16_s16(veor_s16(wide, carry)))};  // also clears the sign's copy in bit 14
}
// 16 codes, as load_e4m3 gives them.
inline void load16_e4m3(const uint8_t* from, F32 (&to)[16 / kLanes]) {
  const int8x16_t codes = vreinterpretq_s8_u8(vld1q_u8(from));
  const int16x8_t wide[2] = {vshll_n_s8(vget_low_s8(codes), 7), vshll_n_s8(vget_high_s8(codes), 7)};
  for (int i = 0; i < 2; ++i) {
    const int16x8_t carry = vandq_s16(vaddq_s16(wide[i], vdupq_n_s16(0x80)), vdupq_n_s16(0x4000));
    const float16x8_t half = vreinterpretq_f16_s16(veorq_s16(wide[i], carry));
    to[2 * i] = {vcvt_f32_f16(vget_low_f16(half))};
    to[2 * i + 1] = {vcvt_high_f32_f16(half)};
  }
}
// 16 codes of float8_e5m2: the upper bytes of float16 values.
inline void load16_e5m2(const uint8_t* from, F32 (&to)[16 / kLanes]) {
  const uint8x16_t codes = vld1q_u8(from), zero = vdupq_n_u8(0);
  const float16x8_t half[2] = {vreinterpretq_f16_u8(vzip1q_u8(zero, codes)),
                               vreinterpretq_f16_u8(vzip2q_u8(zero, codes))};
  for (int i = 0; i < 2; ++i) {
    to[2 * i] = {vcvt_f32_f16(vget_low_f16(half[i]))};
    to[2 * i + 1] = {vcvt_high_f32_f16(half[i])};
  }
}
// Columns of 16 codes that are decoded together, each as load16 gives it.
constexpr int kFp8Columns = 1;
inline void load_e4m3_columns(const uint8_t* from, F32 (&to)[kFp8Columns][16 / kLanes]) { load16_e4m3(from, to[0]); }
inline void load_e5m2_columns(const uint8_t* from, F32 (&to)[kFp8Columns][16 / kLanes]) { load16_e5m2(from, to[0]); }

// ---- a table of 16 floats, indexed by the low four bits of every lane
// -------------------------------------------------

struct Table16 {
  uint8x16x4_t bytes;
};
inline Table16 make_table(const float* values) {
  const auto* from = reinterpret_cast<const uint8_t*>(values);
  return {{{vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)}}};
}
inline F32 lookup(Table16 table, I32 index) {  // higher bits of the index are ignored
  // Byte j of entry i is byte 4 i + j of the table.
  const int32x4_t first = vmulq_s32(vandq_s32(index.v, vdupq_n_s32(15)), vdupq_n_s32(0x04040404));
  const int32x4_t at = vaddq_s32(first, vdupq_n_s32(0x03020100));
  return {vreinterpretq_f32_u8(vqtbl4q_u8(table.bytes, vreinterpretq_u8_s32(at)))};
}

// ---- bytes, and products of four of them to a lane
// ----------------------------------------------------------------------

inline Bytes load_bytes(const void* from) { return {vld1q_u8(static_cast<const uint8_t*>(from))}; }
inline void store_bytes(void* to, Bytes a) { vst1q_u8(static_cast<uint8_t*>(to), a.v); }
inline Bytes set4_bytes(const void* four) {  // the same four in every lane
  uint32_t word;
  std::memcpy(&word, four, 4);
  return {vreinterpretq_u8_u32(vdupq_n_u32(word))};
}
inline Bytes as_bytes(I32 a) { return {vreinterpretq_u8_s32(a.v)}; }
inline I32 as_i32(Bytes a) { return {vreinterpretq_s32_u8(a.v)}; }
inline Bytes low_nibbles(Bytes a) { return {vandq_u8(a.v, vdupq_n_u8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {vshrq_n_u8(a.v, 4)}; }
// A byte for each of 16 codes; codes above 15 are not allowed.
inline Bytes lookup_bytes(const void* table, Bytes codes) {
  return {vqtbl1q_u8(vld1q_u8(static_cast<const uint8_t*>(table)), codes.v)};
}

// The codes of 2 * kLanes bytes, the low nibble first: 4 * kLanes bytes of 0..15.
inline Bytes nibbles_in_order(const void* from) {
  const uint8x8_t bytes = vld1_u8(static_cast<const uint8_t*>(from));
  const uint8x8x2_t both = vzip_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
  return {vcombine_u8(both.val[0], both.val[1])};
}
// kLanes / 4 of many tables of 16 bytes, beside each other: a byte each says which.
inline Bytes choose_tables(const uint8_t* tables, const uint8_t* which) {
  return {vld1q_u8(tables + static_cast<uint64_t>(which[0]) * 16)};
}
// A byte for each code, every 16 of them from their own table.
inline Bytes lookup_bytes(Bytes tables, Bytes codes) { return {vqtbl1q_u8(tables.v, codes.v)}; }

// Keeps a sum of integers where it is written: without it GCC copies sums around the instruction that adds to one, and
// then has no registers left.
inline void keep_order(int32x4_t& sum) { asm("" : "+w"(sum)); }

// Sums of products of codes 0..15 and int8: at most kDot4Steps (kDot4StepsInt4 where the int8 are within -15..15)
// may be added up before `total`, which gives the int32 of every lane. The codes have no sign bit, so that the
// instruction for int8 serves.
struct Dot4 {
  int32x4_t v;
};
constexpr int kDot4Steps = 1 << 18;      // 2**18 * 4 * 15 * 128 < 2**31
constexpr int kDot4StepsInt4 = 1 << 21;  // 2**21 * 4 * 15 * 15 < 2**31
inline Dot4 zero_dot4() { return {vdupq_n_s32(0)}; }
// A sum that begins at a value; with all that is added before `total` it has to stay within -2**15..2**15.
inline Dot4 start_dot4(I32 value) { return {value.v}; }
inline Dot4 dot4(Dot4 sum, Bytes codes, Bytes x) {
  sum.v = vdotq_s32(sum.v, vreinterpretq_s8_u8(codes.v), vreinterpretq_s8_u8(x.v));
  keep_order(sum.v);
  return sum;
}
inline I32 total(Dot4 sum) { return {sum.v}; }

// Sums of products of int8 weights (-128 allowed) and int8 activations (-127..127). The result is too large by
// kDot8Offset times the sum of the activations.
struct Weights8 {
  int8x16_t v;
};
constexpr int kDot8Offset = 0;
constexpr bool kDot8IsOneStep = true;  // whether it is an instruction; if not, dot2 multiplies as fast
inline Weights8 prepare8(Bytes w) { return {vreinterpretq_s8_u8(w.v)}; }
inline I32 dot8(I32 sum, Weights8 w, Bytes x) {
  sum.v = vdotq_s32(sum.v, w.v, vreinterpretq_s8_u8(x.v));
  keep_order(sum.v);
  return sum;
}

// Bytes 0 and 2, or 1 and 3, of every lane, as two int16 with their sign: what `dot2` multiplies.
inline I32 even_bytes(Bytes a) {
  return {vreinterpretq_s32_s16(vshrq_n_s16(vshlq_n_s16(vreinterpretq_s16_u8(a.v), 8), 8))};
}
inline I32 odd_bytes(Bytes a) { return {vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_u8(a.v), 8))}; }
// sum + the products of the two int16 of every lane.
inline I32 dot2(I32 sum, I32 a, I32 b) {
  const int16x8_t x = vreinterpretq_s16_s32(a.v), y = vreinterpretq_s16_s32(b.v);
  const int32x4_t first = vmull_s16(vget_low_s16(x), vget_low_s16(y)), last = vmull_high_s16(x, y);
  return {vaddq_s32(sum.v, vpaddq_s32(first, last))};
}

// The codes of kLanes / 2 bytes, the low nibble first; bits above the lowest four are not cleared.
inline I32 spread_nibbles(const void* from) {
  uint16_t two;
  std::memcpy(&two, from, 2);
  const int32x4_t right{0, -4, -8, -12};
  return {vreinterpretq_s32_u32(vshlq_u32(vdupq_n_u32(two), right))};
}

}  // namespace lowbit::simd
