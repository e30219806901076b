// AVX-512 for a machine without it, to test the kernels there: SIMDe, and what its older versions lack.
//
// Each of these is what Intel's description of the instruction says, lane by lane, or the AVX2 instruction that is
// defined to do the same to half as many lanes.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

namespace lowbit::emulated {

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To made;
  std::memcpy(&made, &from, sizeof made);
  return made;
}

template <class T, int kCount>
struct Lanes {
  T at[kCount];
};

struct Halves256 {
  __m256 low, high;
};
struct Halves256i {
  __m256i low, high;
};
struct Halves128i {
  __m128i low, high;
};

inline __m512i srai_epi32(__m512i a, unsigned count) {
  auto lanes = as<Lanes<int32_t, 16>>(a);
  for (int32_t& lane : lanes.at) lane >>= count < 31 ? count : 31;
  return as<__m512i>(lanes);
}

inline __m512 cvtepi32_ps(__m512i a) {
  const auto half = as<Halves256i>(a);
  return as<__m512>(Halves256{_mm256_cvtepi32_ps(half.low), _mm256_cvtepi32_ps(half.high)});
}

inline __m512i cvtps_epi32(__m512 a) {
  const auto half = as<Halves256>(a);
  return as<__m512i>(Halves256i{_mm256_cvtps_epi32(half.low), _mm256_cvtps_epi32(half.high)});
}

template <class From, int kCount, class Vector>
inline __m512i widen(Vector a) {
  const auto from = as<Lanes<From, kCount>>(a);
  Lanes<int32_t, 16> made;
  for (int i = 0; i < 16; ++i) made.at[i] = from.at[i];
  return as<__m512i>(made);
}

inline __m512i cvtepu8_epi64(__m128i a) {  // its first eight bytes
  const auto from = as<Lanes<uint8_t, 16>>(a);
  Lanes<int64_t, 8> made;
  for (int i = 0; i < 8; ++i) made.at[i] = from.at[i];
  return as<__m512i>(made);
}

inline __m512i cvtepu8_epi16(__m256i a) {
  const auto half = as<Lanes<__m128i, 2>>(a);
  return as<__m512i>(Halves256i{_mm256_cvtepu8_epi16(half.at[0]), _mm256_cvtepu8_epi16(half.at[1])});
}

template <class To, class Vector>
inline Vector narrow(__m512i a) {  // the low bits of every lane
  const auto from = as<Lanes<uint32_t, 16>>(a);
  Lanes<To, 16> made;
  for (int i = 0; i < 16; ++i) made.at[i] = static_cast<To>(from.at[i]);
  return as<Vector>(made);
}

inline __m512 shuffle_f32x4(__m512 a, __m512 b, unsigned choice) {
  struct Quarters {
    __m128 at[4];
  };
  const auto low = as<Quarters>(a), high = as<Quarters>(b);
  return as<__m512>(
      Quarters{{low.at[choice & 3], low.at[choice >> 2 & 3], high.at[choice >> 4 & 3], high.at[choice >> 6 & 3]}});
}

inline __m512 cvtph_ps(__m256i a) {
  const auto half = as<Halves128i>(a);
  return as<__m512>(Halves256{_mm256_cvtph_ps(half.low), _mm256_cvtph_ps(half.high)});
}

template <int kRounding>
inline __m256i cvtps_ph(__m512 a) {
  const auto half = as<Halves256>(a);
  return as<__m256i>(Halves128i{_mm256_cvtps_ph(half.low, kRounding), _mm256_cvtps_ph(half.high, kRounding)});
}

}  // namespace lowbit::emulated

#undef _mm512_srai_epi32
#define _mm512_srai_epi32(a, count) lowbit::emulated::srai_epi32(a, count)
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(a) lowbit::emulated::cvtepi32_ps(a)
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32(a) lowbit::emulated::cvtps_epi32(a)
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32(a) (lowbit::emulated::widen<uint8_t, 16>(a))
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32(a) (lowbit::emulated::widen<int8_t, 16>(a))
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(a) (lowbit::emulated::widen<uint16_t, 16>(a))
#undef _mm512_cvtepu8_epi64
#define _mm512_cvtepu8_epi64(a) lowbit::emulated::cvtepu8_epi64(a)
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16(a) lowbit::emulated::cvtepu8_epi16(a)
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8(a) (lowbit::emulated::narrow<uint8_t, __m128i>(a))
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(a) (lowbit::emulated::narrow<uint16_t, __m256i>(a))
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, choice) lowbit::emulated::shuffle_f32x4(a, b, choice)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(a) lowbit::emulated::cvtph_ps(a)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) (lowbit::emulated::cvtps_ph<rounding>(a))
