// Tokens that hold infinity or NaN, for ways of multiplying that take a weight apart.
//
// Codes and what they are offset by, or activations as integers with a scale: either way an infinity times a weight is
// a sum of infinities of both signs, NaN. Such tokens are multiplied anew with decoded weights, as the reference does,
// and then an infinity gives one wherever its weight is not zero.
#pragma once

#include <cstring>
#include <vector>

#include "float_gemm.h"

namespace lowbit {

// Whether one of count values has an exponent of ones.
template <class Bits>
inline bool any_not_finite(const void* values, int64_t begin, int64_t count, Bits exponent) {
  const auto* at = static_cast<const Bits*>(values) + begin;
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) found |= static_cast<Bits>((at[i] & exponent) == exponent);
  return found;
}

inline bool is_finite(const Activations& x, int64_t token) {
  const int64_t begin = token * x.k;
  if (x.dtype == kFloat32) return !any_not_finite<uint32_t>(x.data, begin, x.k, 0x7f800000u);
  const uint16_t exponent = x.dtype == kBfloat16 ? 0x7f80 : 0x7c00;
  return !any_not_finite<uint16_t>(x.data, begin, x.k, exponent);
}

// Writes the products of these tokens over those that are there.
template <class Weight>
void multiply_not_finite(const Weight& w, const Activations& x, const Output& out, int threads) {
  std::vector<char> finite(static_cast<size_t>(x.m));
  parallel_for(x.m, x.m * x.k >= (1 << 20) ? threads : 1, [&](int64_t token) { finite[token] = is_finite(x, token); });
  std::vector<int64_t> tokens;
  for (int64_t token = 0; token < x.m; ++token)
    if (!finite[token]) tokens.push_back(token);
  if (tokens.empty()) return;
  const auto count = static_cast<int64_t>(tokens.size());
  const int64_t from_bytes = x.k * element_size(x.dtype), to_bytes = w.n * element_size(out.dtype);
  const Room from(count * x.k), to(count * w.n);
  auto* rows = reinterpret_cast<char*>(from.data());
  auto* found = reinterpret_cast<char*>(to.data());
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(rows + i * from_bytes, static_cast<const char*>(x.data) + tokens[i] * from_bytes, from_bytes);
  gemm_many(w, {rows, x.dtype, count, x.k}, {found, out.dtype, out.bias, out.bias_dtype}, threads);
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(static_cast<char*>(out.data) + tokens[i] * to_bytes, found + i * to_bytes, to_bytes);
}

}  // namespace lowbit
