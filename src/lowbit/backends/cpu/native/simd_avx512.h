// simd.h for AVX-512 (F, BW, DQ, VL, VNNI): 16 lanes.
#pragma once

#if defined(LOWBIT_EMULATE)
#include "simde_missing.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

namespace lowbit::simd {

constexpr int kLanes = 16;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct Bytes {
  __m512i v;
};

// ---- float32 -------------------------------------------------------------------------------------------------------

inline F32 zero_f32() { return {_mm512_setzero_ps()}; }
inline F32 set1_f32(float value) { return {_mm512_set1_ps(value)}; }
inline F32 load_f32(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store_f32(float* to, F32 a) { _mm512_storeu_ps(to, a.v); }

inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c, rounded once
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 abs(F32 a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MAX)))};
}

// Lane i of vector j <-> lane j of vector i.
inline void transpose(F32 (&rows)[kLanes]) {
  __m512 quads[16];  // 4 * g + i: in quarter j the lane 4 * j + i of rows 4 * g..4 * g + 3
  for (int g = 0; g < 16; g += 4) {
    const __m512 a = _mm512_shuffle_ps(rows[g].v, rows[g + 1].v, 0x44),
                 b = _mm512_shuffle_ps(rows[g + 2].v, rows[g + 3].v, 0x44);
    const __m512 c = _mm512_shuffle_ps(rows[g].v, rows[g + 1].v, 0xee),
                 d = _mm512_shuffle_ps(rows[g + 2].v, rows[g + 3].v, 0xee);
    quads[g] = _mm512_shuffle_ps(a, b, 0x88);
    quads[g + 1] = _mm512_shuffle_ps(a, b, 0xdd);
    quads[g + 2] = _mm512_shuffle_ps(c, d, 0x88);
    quads[g + 3] = _mm512_shuffle_ps(c, d, 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x44),
                 b = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xee),
                 d = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xee);
    rows[i].v = _mm512_shuffle_f32x4(a, b, 0x88);
    rows[i + 4].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    rows[i + 8].v = _mm512_shuffle_f32x4(c, d, 0x88);
    rows[i + 12].v = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

inline float reduce_add(F32 a) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
  const __m256 both = _mm256_add_ps(_mm512_castps512_ps256(a.v), high);
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float reduce_max(F32 a) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
  const __m256 both = _mm256_max_ps(_mm512_castps512_ps256(a.v), high);
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// ---- int32 ---------------------------------------------------------------------------------------------------------

inline I32 zero_i32() { return {_mm512_setzero_si512()}; }
inline I32 set1_i32(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline I32 load_i32(const void* from) { return {_mm512_loadu_si512(from)}; }
inline void store_i32(void* to, I32 a) { _mm512_storeu_si512(to, a.v); }
inline I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 sub(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32 mul(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I32 bit_and(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I32 bit_or(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I32 bit_xor(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline I32 min(I32 a, I32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int kBits>
inline I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
inline I32 shift_right(I32 a) {  // zeros come in
  return {_mm512_srli_epi32(a.v, kBits)};
}
template <int kBits>
inline I32 shift_right_signed(I32 a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
inline int32_t reduce_add(I32 a) {
  const __m256i both = _mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
inline int32_t reduce_max(I32 a) {
  const __m256i both = _mm256_max_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

inline F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }  // half to even; INT32_MIN for NaN and what is too large
inline F32 as_f32(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
inline I32 as_i32(F32 a) { return {_mm512_castps_si512(a.v)}; }
inline I32 widen_u8(const uint8_t* from) {  // kLanes bytes
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
inline I32 widen_s8(const int8_t* from) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
inline I32 widen_u16(const uint16_t* from) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
// The low byte of every lane, kLanes bytes.
inline void store_low_bytes(uint8_t* to, I32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a.v));
}
// The low 16 bits of every lane of a, then of b, as 4 * kLanes bytes; the upper ones are zero.
inline void store_low_halves(uint8_t* to, I32 a, I32 b) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, _mm512_packus_epi32(a.v, b.v)));
}
// The low nibble of every lane, kLanes / 2 bytes, the first in a byte's low half.
inline void store_nibbles(uint8_t* to, I32 a) {
  const __m128i codes = _mm_and_si128(_mm512_cvtepi32_epi8(a.v), _mm_set1_epi8(15));
  const __m128i pairs = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x1001));  // the first plus 16 times the second
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(pairs, pairs));
}

// ---- masks ---------------------------------------------------------------------------------------------------------

struct Mask {
  __mmask16 v;  // a bit a lane
};
inline Mask less(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }  // false for NaN
inline Mask less(I32 a, I32 b) { return {_mm512_cmpgt_epi32_mask(b.v, a.v)}; }
inline Mask equal(I32 a, I32 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
inline Mask not_a_number(F32 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline F32 select(Mask where, F32 yes, F32 no) { return {_mm512_mask_mov_ps(no.v, where.v, yes.v)}; }
inline I32 select(Mask where, I32 yes, I32 no) { return {_mm512_mask_mov_epi32(no.v, where.v, yes.v)}; }
inline bool any(Mask a) { return a.v != 0; }

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

inline F32 load_bf16(const uint16_t* from) { return as_f32(shift_left<16>(widen_u16(from))); }
// Half to even; NaN stays NaN. The instruction for it, vcvtneps2bf16, takes subnormal numbers for zeros.
inline I32 bf16_bits(F32 a) {
  const I32 bits = as_i32(a);
  const I32 odd = bit_and(shift_right<16>(bits), set1_i32(1));
  const I32 rounded = shift_right<16>(add(add(bits, set1_i32(0x7fff)), odd));
  const I32 quiet = bit_or(shift_right<16>(bits), set1_i32(0x40));
  return select(not_a_number(a), quiet, rounded);
}
inline void store_bf16(uint16_t* to, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bf16_bits(a).v));
}
// 16 values at once.
inline void store16_bf16(uint16_t* to, const F32 (&a)[16 / kLanes]) { store_bf16(to, a[0]); }
inline F32 load_f16(const uint16_t* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
inline void store_f16(uint16_t* to, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// ---- 8-bit floats --------------------------------------------------------------------------------------------------

// kLanes codes of float8_e4m3fn, times 2^-8: moved to their places in a float16, whose exponent counts from 8 lower.
// The code 0x7f of either sign is NaN: one more carries into bit 14, which then fills the exponent with ones.
inline F32 load_e4m3(const uint8_t* from) {
  const __m256i wide =
      _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 7);
  const __m256i carry = _mm256_and_si256(_mm256_add_epi16(wide, _mm256_set1_epi16(0x80)), _mm256_set1_epi16(0x4000));
  return {_mm512_cvtph_ps(_mm256_xor_si256(wide, carry))};  // also clears the sign that bit 14 has a copy of
}
// 16 codes, as load_e4m3 gives them.
inline void load16_e4m3(const uint8_t* from, F32 (&to)[16 / kLanes]) { to[0] = load_e4m3(from); }
// 16 codes of float8_e5m2: the upper bytes of float16 values.
inline void load16_e5m2(const uint8_t* from, F32 (&to)[16 / kLanes]) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  to[0] = {_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8))};
}

// Columns of 16 codes that are decoded together: all but the last step is done for 32 codes at once.
constexpr int kFp8Columns = 2;
inline void load_half_columns(__m512i halves, F32 (&to)[kFp8Columns][16 / kLanes]) {
  to[0][0] = {_mm512_cvtph_ps(_mm512_castsi512_si256(halves))};
  to[1][0] = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}
// Each as load16 gives it.
inline void load_e4m3_columns(const uint8_t* from, F32 (&to)[kFp8Columns][16 / kLanes]) {
  const __m512i wide =
      _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 7);
  const __m512i sum = _mm512_add_epi16(wide, _mm512_set1_epi16(0x80));
  const __m512i bit14 = _mm512_set1_epi16(0x4000);
  load_half_columns(_mm512_ternarylogic_epi32(wide, sum, bit14, 0x78), to);  // wide ^ (sum & bit14)
}
inline void load_e5m2_columns(const uint8_t* from, F32 (&to)[kFp8Columns][16 / kLanes]) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  load_half_columns(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 8), to);
}

// ---- a table of 16 floats, indexed by the low four bits of every lane
// -------------------------------------------------

struct Table16 {
  __m512 values;
};
inline Table16 make_table(const float* values) { return {_mm512_loadu_ps(values)}; }
inline F32 lookup(Table16 table, I32 index) {  // higher bits of the index are ignored
  return {_mm512_permutexvar_ps(index.v, table.values)};
}

// ---- bytes, and products of four of them to a lane
// ----------------------------------------------------------------------

inline Bytes load_bytes(const void* from) { return {_mm512_loadu_si512(from)}; }
inline void store_bytes(void* to, Bytes a) { _mm512_storeu_si512(to, a.v); }
inline Bytes set4_bytes(const void* four) {  // the same four in every lane
  int32_t word;
  __builtin_memcpy(&word, four, 4);
  return {_mm512_set1_epi32(word)};
}
inline Bytes as_bytes(I32 a) { return {a.v}; }
inline I32 as_i32(Bytes a) { return {a.v}; }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// A byte for each of 16 codes; codes above 15 are not allowed.
inline Bytes lookup_bytes(const void* table, Bytes codes) {
  const __m128i values = _mm_loadu_si128(static_cast<const __m128i*>(table));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes.v)};
}

// The codes of 2 * kLanes bytes, the low nibble first: 4 * kLanes bytes of 0..15.
inline Bytes nibbles_in_order(const void* from) {
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  return {_mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15))};
}
// kLanes / 4 of many tables of 16 bytes, beside each other: a byte each says which.
inline Bytes choose_tables(const uint8_t* tables, const uint8_t* which) {
  const auto at = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(tables + static_cast<uint64_t>(which[i]) * 16));
  };
  __m512i found = _mm512_castsi128_si512(at(0));
  found = _mm512_mask_broadcast_i32x4(found, 0x00f0, at(1));
  found = _mm512_mask_broadcast_i32x4(found, 0x0f00, at(2));
  return {_mm512_mask_broadcast_i32x4(found, 0xf000, at(3))};
}
// A byte for each code, every 16 of them from their own table.
inline Bytes lookup_bytes(Bytes tables, Bytes codes) { return {_mm512_shuffle_epi8(tables.v, codes.v)}; }

// Keeps a sum of integers where it is written: without it GCC copies sums around the instruction that adds to one, and
// then has no registers left.
#if defined(LOWBIT_EMULATE)
inline void keep_order(__m512i&) {}
#else
inline void keep_order(__m512i& sum) { asm("" : "+v"(sum)); }
#endif

// Sums of products of codes 0..15 and int8: at most kDot4Steps (kDot4StepsInt4 where the int8 are within -15..15)
// may be added up before `total`, which gives the int32 of every lane.
struct Dot4 {
  __m512i v;
};
constexpr int kDot4Steps = 1 << 18;      // 2**18 * 4 * 15 * 128 < 2**31
constexpr int kDot4StepsInt4 = 1 << 21;  // 2**21 * 4 * 15 * 15 < 2**31
inline Dot4 zero_dot4() { return {_mm512_setzero_si512()}; }
// A sum that begins at a value; with all that is added before `total` it has to stay within -2**15..2**15.
inline Dot4 start_dot4(I32 value) { return {value.v}; }
inline Dot4 dot4(Dot4 sum, Bytes codes, Bytes x) {
  sum.v = _mm512_dpbusd_epi32(sum.v, codes.v, x.v);
  keep_order(sum.v);
  return sum;
}
inline I32 total(Dot4 sum) { return {sum.v}; }

// Sums of products of int8 weights (-128 allowed) and int8 activations (-127..127). The result is too large by
// kDot8Offset times the sum of the activations: the instruction takes one factor without a sign, so 128 is added to the
// weights. Sums wrap around, so that only what remains has to fit in int32.
struct Weights8 {
  __m512i v;
};
constexpr int kDot8Offset = 128;
constexpr bool kDot8IsOneStep = true;  // whether it is an instruction; if not, dot2 multiplies as fast
inline Weights8 prepare8(Bytes w) {
  return {_mm512_xor_si512(w.v, _mm512_set1_epi32(static_cast<int32_t>(0x80808080)))};
}
inline I32 dot8(I32 sum, Weights8 w, Bytes x) {
  sum.v = _mm512_dpbusd_epi32(sum.v, w.v, x.v);
  keep_order(sum.v);
  return sum;
}

// Bytes 0 and 2, or 1 and 3, of every lane, as two int16 with their sign: what `dot2` multiplies.
inline I32 even_bytes(Bytes a) { return {_mm512_srai_epi16(_mm512_slli_epi16(a.v, 8), 8)}; }
inline I32 odd_bytes(Bytes a) { return {_mm512_srai_epi16(a.v, 8)}; }
// sum + the products of the two int16 of every lane.
inline I32 dot2(I32 sum, I32 a, I32 b) {
  sum.v = _mm512_dpwssd_epi32(sum.v, a.v, b.v);
  keep_order(sum.v);
  return sum;
}

#if !defined(LOWBIT_EMULATE)
// Four words of each of 16 rows, from byte `at` of them on -> four columns of 16 words without gaps.
inline void interleave_words(const uint8_t* const (&rows)[16], int64_t at, uint32_t* to) {
  __m512i quads[4];  // in quarter q of quads[j]: row 4 q + j
  for (int j = 0; j < 4; ++j) {
    const auto row = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + at)); };
    quads[j] = _mm512_castsi128_si512(row(j));
    quads[j] = _mm512_inserti32x4(quads[j], row(4 + j), 1);
    quads[j] = _mm512_inserti32x4(quads[j], row(8 + j), 2);
    quads[j] = _mm512_inserti32x4(quads[j], row(12 + j), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(quads[0], quads[1]), b = _mm512_unpacklo_epi32(quads[2], quads[3]);
  const __m512i c = _mm512_unpackhi_epi32(quads[0], quads[1]), d = _mm512_unpackhi_epi32(quads[2], quads[3]);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi64(a, b));
  _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi64(a, b));
  _mm512_storeu_si512(to + 32, _mm512_unpacklo_epi64(c, d));
  _mm512_storeu_si512(to + 48, _mm512_unpackhi_epi64(c, d));
}
// The word at byte `at` of each of 16 rows.
inline I32 gather_words(const uint8_t* const (&rows)[16], int64_t at) {
  const __m512i low = _mm512_loadu_si512(rows), high = _mm512_loadu_si512(rows + 8);
  const void* base = reinterpret_cast<const void*>(at);
  return {_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_i64gather_epi32(low, base, 1)),
                             _mm512_i64gather_epi32(high, base, 1), 1)};
}
// The lower halves of all lanes.
inline void store_low_halves(uint16_t* to, I32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(a.v));
}
#endif

// A table of 16 int8, for pairs of int16.
struct PairTable {
  __m512i values;  // 32 int16: twice the 16, as the instruction looks at five bits
};
inline PairTable make_pair_table(const int8_t* values) {
  const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  return {_mm512_broadcast_i64x4(words)};
}
// What codes kAt and kAt + 4 of the 8 of every lane stand for, as two int16.
template <int kAt>
inline I32 lookup_pair(PairTable table, I32 word) {
  return {_mm512_permutexvar_epi16(kAt ? _mm512_srli_epi32(word.v, 4 * kAt) : word.v, table.values)};
}

// The codes of kLanes / 2 bytes, the low nibble first; bits above the lowest four are not cleared.
inline I32 spread_nibbles(const void* from) {
  // A byte to every 64 bits, and its high nibble to the upper half of them.
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
  return {_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28))};
}

}  // namespace lowbit::simd
