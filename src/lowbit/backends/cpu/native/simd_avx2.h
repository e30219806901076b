// simd.h for AVX2 with FMA and F16C: 8 lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lowbit::simd {

constexpr int kLanes = 8;

struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};
struct Bytes {
  __m256i v;
};

// ---- float32 -------------------------------------------------------------------------------------------------------

inline F32 zero_f32() { return {_mm256_setzero_ps()}; }
inline F32 set1_f32(float value) { return {_mm256_set1_ps(value)}; }
inline F32 load_f32(const float* from) { return {_mm256_loadu_ps(from)}; }
inline void store_f32(float* to, F32 a) { _mm256_storeu_ps(to, a.v); }

inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c, rounded once
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }

// Lane i of vector j <-> lane j of vector i.
inline void transpose(F32 (&rows)[kLanes]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

inline float reduce_add(F32 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float reduce_max(F32 a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// ---- int32 ---------------------------------------------------------------------------------------------------------

inline I32 zero_i32() { return {_mm256_setzero_si256()}; }
inline I32 set1_i32(int32_t value) { return {_mm256_set1_epi32(value)}; }
inline I32 load_i32(const void* from) { return {_mm256_loadu_si256(static_cast<const __m256i*>(from))}; }
inline void store_i32(void* to, I32 a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a.v); }
inline I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I32 sub(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline I32 mul(I32 a, I32 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline I32 bit_and(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
inline I32 bit_or(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
inline I32 bit_xor(I32 a, I32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline I32 min(I32 a, I32 b) { return {_mm256_min_epi32(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.v, b.v)}; }
template <int kBits>
inline I32 shift_left(I32 a) {
  return {_mm256_slli_epi32(a.v, kBits)};
}
template <int kBits>
inline I32 shift_right(I32 a) {  // zeros come in
  return {_mm256_srli_epi32(a.v, kBits)};
}
template <int kBits>
inline I32 shift_right_signed(I32 a) {
  return {_mm256_srai_epi32(a.v, kBits)};
}
inline int32_t reduce_add(I32 a) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
inline int32_t reduce_max(I32 a) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

inline F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline I32 to_i32(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }  // half to even; INT32_MIN for NaN and what is too large
inline F32 as_f32(I32 a) { return {_mm256_castsi256_ps(a.v)}; }
inline I32 as_i32(F32 a) { return {_mm256_castps_si256(a.v)}; }
inline I32 widen_u8(const uint8_t* from) {  // kLanes bytes
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))};
}
inline I32 widen_s8(const int8_t* from) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))};
}
inline I32 widen_u16(const uint16_t* from) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
// The low byte of every lane.
inline __m128i low_bytes(I32 a) {
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i found = _mm256_shuffle_epi8(a.v, order);
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
}
// The same, to kLanes bytes.
inline void store_low_bytes(uint8_t* to, I32 a) { _mm_storel_epi64(reinterpret_cast<__m128i*>(to), low_bytes(a)); }
// The low 16 bits of every lane of a, then of b, as 4 * kLanes bytes; the upper ones are zero.
inline void store_low_halves(uint8_t* to, I32 a, I32 b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(_mm256_packus_epi32(a.v, b.v), 0xd8));
}
// The low nibble of every lane, kLanes / 2 bytes, the first in a byte's low half.
inline void store_nibbles(uint8_t* to, I32 a) {
  const __m128i codes = _mm_and_si128(low_bytes(a), _mm_set1_epi8(15));
  const __m128i pairs = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x1001));  // the first plus 16 times the second
  const int four = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
  __builtin_memcpy(to, &four, 4);
}

// ---- masks ---------------------------------------------------------------------------------------------------------

struct Mask {
  __m256 v;  // all bits of a lane, or none
};
inline Mask less(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }  // false for NaN
inline Mask less(I32 a, I32 b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
inline Mask equal(I32 a, I32 b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
inline Mask not_a_number(F32 a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
inline F32 select(Mask where, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, where.v)}; }
inline I32 select(Mask where, I32 yes, I32 no) { return as_i32(select(where, as_f32(yes), as_f32(no))); }
inline bool any(Mask a) { return _mm256_movemask_ps(a.v) != 0; }

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

inline F32 load_bf16(const uint16_t* from) { return as_f32(shift_left<16>(widen_u16(from))); }
// Half to even; NaN stays NaN.
inline I32 bf16_bits(F32 a) {
  const I32 bits = as_i32(a);
  const I32 odd = bit_and(shift_right<16>(bits), set1_i32(1));
  const I32 rounded = shift_right<16>(add(add(bits, set1_i32(0x7fff)), odd));
  const I32 quiet = bit_or(shift_right<16>(bits), set1_i32(0x40));
  return select(not_a_number(a), quiet, rounded);
}
inline void store_bf16(uint16_t* to, F32 a) {
  const __m256i bits = bf16_bits(a).v;
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
// 16 values at once, which costs less where most are numbers.
inline void store16_bf16(uint16_t* to, const F32 (&a)[2]) {
  if (_mm256_movemask_ps(_mm256_cmp_ps(a[0].v, a[1].v, _CMP_UNORD_Q))) {
    for (int i = 0; i < 2; ++i) store_bf16(to + 8 * i, a[i]);
    return;
  }
  I32 bits[2];
  for (int i = 0; i < 2; ++i) {
    const I32 from = as_i32(a[i]), odd = bit_and(shift_right<16>(from), set1_i32(1));
    bits[i] = shift_right<16>(add(add(from, set1_i32(0x7fff)), odd));
  }
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits[0].v, bits[1].v), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
}
inline F32 load_f16(const uint16_t* from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
inline void store_f16(uint16_t* to, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// ---- 8-bit floats --------------------------------------------------------------------------------------------------

// kLanes codes of float8_e4m3fn, times 2^-8: moved to their places in a float16, whose exponent counts from 8 lower.
// The code 0x7f of either sign is NaN: one more carries into bit 14, which then fills the exponent with ones.
inline F32 load_e4m3(const uint8_t* from) {
  const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))), 7);
  const __m128i carry = _mm_and_si128(_mm_add_epi16(wide, _mm_set1_epi16(0x80)), _mm_set1_epi16(0x4000));
  return {_mm256_cvtph_ps(_mm_xor_si128(wide, carry))};  // also clears the sign that bit 14 has a copy of
}
// 16 codes, as load_e4m3 gives them.
inline void load16_e4m3(const uint8_t* from, F32 (&to)[16 / kLanes]) {
  const __m256i wide =
      _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 7);
  const __m256i carry = _mm256_and_si256(_mm256_add_epi16(wide, _mm256_set1_epi16(0x80)), _mm256_set1_epi16(0x4000));
  const __m256i half = _mm256_xor_si256(wide, carry);
  to[0] = {_mm256_cvtph_ps(_mm256_castsi256_si128(half))};
  to[1] = {_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}
// 16 codes of float8_e5m2: the upper bytes of float16 values.
inline void load16_e5m2(const uint8_t* from, F32 (&to)[16 / kLanes]) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  to[0] = {_mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), codes))};
  to[1] = {_mm256_cvtph_ps(_mm_unpackhi_epi8(_mm_setzero_si128(), codes))};
}
// Columns of 16 codes that are decoded together, each as load16 gives it.
constexpr int kFp8Columns = 1;
inline void load_e4m3_columns(const uint8_t* from, F32 (&to)[kFp8Columns][16 / kLanes]) { load16_e4m3(from, to[0]); }
inline void load_e5m2_columns(const uint8_t* from, F32 (&to)[kFp8Columns][16 / kLanes]) { load16_e5m2(from, to[0]); }

// ---- a table of 16 floats, indexed by the low four bits of every lane
// -------------------------------------------------

struct Table16 {
  __m256 low, high;
};
inline Table16 make_table(const float* values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }
inline F32 lookup(Table16 table, I32 index) {  // higher bits of the index are ignored
  const __m256 low = _mm256_permutevar8x32_ps(table.low, index.v), high = _mm256_permutevar8x32_ps(table.high, index.v);
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)))};
}

// ---- bytes, and products of four of them to a lane
// ----------------------------------------------------------------------

inline Bytes load_bytes(const void* from) { return {_mm256_loadu_si256(static_cast<const __m256i*>(from))}; }
inline void store_bytes(void* to, Bytes a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a.v); }
inline Bytes set4_bytes(const void* four) {  // the same four in every lane
  int32_t word;
  __builtin_memcpy(&word, four, 4);
  return {_mm256_set1_epi32(word)};
}
inline Bytes as_bytes(I32 a) { return {a.v}; }
inline I32 as_i32(Bytes a) { return {a.v}; }
inline Bytes low_nibbles(Bytes a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm256_and_si256(_mm256_srli_epi16(a.v, 4), _mm256_set1_epi8(15))}; }
// A byte for each of 16 codes; codes above 15 are not allowed.
inline Bytes lookup_bytes(const void* table, Bytes codes) {
  const __m128i values = _mm_loadu_si128(static_cast<const __m128i*>(table));
  return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes.v)};
}

// The codes of 2 * kLanes bytes, the low nibble first: 4 * kLanes bytes of 0..15.
inline Bytes nibbles_in_order(const void* from) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  return {_mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15))};
}
// kLanes / 4 of many tables of 16 bytes, beside each other: a byte each says which.
inline Bytes choose_tables(const uint8_t* tables, const uint8_t* which) {
  const auto at = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(tables + static_cast<uint64_t>(which[i]) * 16));
  };
  return {_mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1)};
}
// A byte for each code, every 16 of them from their own table.
inline Bytes lookup_bytes(Bytes tables, Bytes codes) { return {_mm256_shuffle_epi8(tables.v, codes.v)}; }

// Keeps a sum of integers where it is written. GCC would gather the products of an unrolled loop first and add them at
// its end: they do not fit into the registers.
inline void keep_order(__m256i& sum) { asm("" : "+x"(sum)); }

// Sums of products of codes 0..15 and int8: at most kDot4Steps (kDot4StepsInt4 where the int8 are within -15..15)
// may be added up before `total`, which gives the int32 of every lane.
struct Dot4 {
  __m256i v;  // pairs of int16
};
constexpr int kDot4Steps = 8;       // 8 * 2 * 15 * 128 < 2**15
constexpr int kDot4StepsInt4 = 64;  // 64 * 2 * 15 * 15 < 2**15
inline Dot4 zero_dot4() { return {_mm256_setzero_si256()}; }
// A sum that begins at a value; with all that is added before `total` it has to stay within -2**15..2**15.
inline Dot4 start_dot4(I32 value) { return {_mm256_and_si256(value.v, _mm256_set1_epi32(0xffff))}; }
// The same for the two int16 of every lane by themselves. Codes up to 255 may follow where |x| is so small that no pair
// of products leaves int16; sums wrap around, so that only what `total` takes has to fit.
inline Dot4 start_dot4_pairs(I32 pairs) { return {pairs.v}; }
inline Dot4 dot4(Dot4 sum, Bytes codes, Bytes x) {
  sum.v = _mm256_add_epi16(sum.v, _mm256_maddubs_epi16(codes.v, x.v));
  keep_order(sum.v);
  return sum;
}
inline I32 total(Dot4 sum) { return {_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1))}; }

// Sums of products of int8 weights (-128 allowed) and int8 activations (-127..127). The result is too large by
// kDot8Offset times the sum of the activations.
struct Weights8 {
  __m256i magnitude, sign;
};
constexpr int kDot8Offset = 0;
constexpr bool kDot8IsOneStep = false;  // whether it is an instruction; if not, dot2 multiplies as fast
inline Weights8 prepare8(Bytes w) { return {_mm256_abs_epi8(w.v), w.v}; }
inline I32 dot8(I32 sum, Weights8 w, Bytes x) {
  const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x.v, w.sign));  // at most 2 * 128 * 127
  sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  keep_order(sum.v);
  return sum;
}

// Bytes 0 and 2, or 1 and 3, of every lane, as two int16 with their sign: what `dot2` multiplies.
inline I32 even_bytes(Bytes a) { return {_mm256_srai_epi16(_mm256_slli_epi16(a.v, 8), 8)}; }
inline I32 odd_bytes(Bytes a) { return {_mm256_srai_epi16(a.v, 8)}; }
// sum + the products of the two int16 of every lane.
inline I32 dot2(I32 sum, I32 a, I32 b) {
  sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v));
  keep_order(sum.v);
  return sum;
}

// The codes of kLanes / 2 bytes, the low nibble first; bits above the lowest four are not cleared.
inline I32 spread_nibbles(const void* from) {
  int32_t word;
  __builtin_memcpy(&word, from, 4);
  return {_mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28))};
}

}  // namespace lowbit::simd
