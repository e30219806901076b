// Codes of int8, two at a time, as 16-bit floats for the tensor cores, exactly.
#pragma once

#include "floats.cuh"

namespace lowbit {

// a + b for two float16 side by side.
LOWBIT_DEVICE uint32_t add_float16_pair(uint32_t a, uint32_t b) {
#ifdef __CUDACC_RTC__
  uint32_t out;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
#else
  uint32_t out = 0;
  for (int at = 0; at < 32; at += 16)
    out |= uint32_t(float_to_half<kFloat16>(half_to_float<kFloat16>(uint16_t(a >> at)) +
                                            half_to_float<kFloat16>(uint16_t(b >> at))))
           << at;
  return out;
#endif
}

// Bytes 0 and 1 of a word, or 2 and 3.
//
// float16: the byte with its sign bit turned over is the code + 128, which beside the exponent of 1024 is 1152 + code.
// bfloat16 has room for 7 bits beside the exponent of 128: the lower seven bits are 128 + themselves, and the sign bit
// is where it makes 256 of the 128 that is taken off.
template <Half half, bool upper>
LOWBIT_DEVICE uint32_t int8_pair(uint32_t word) {
  if constexpr (half == kBFloat16) {
    const uint32_t bytes = pick_bytes<upper ? 0x4342 : 0x4140>(word, 0);
    const uint32_t value = masked<0x007F007Fu, 0x43004300u>(bytes), offset = masked<0x00800080u, 0xC300C300u>(bytes);
    return fma_bfloat16_pair(value, 0x3F803F80u, offset);
  }
  return add_float16_pair(pick_bytes<upper ? 0x4342 : 0x4140>(word ^ 0x80808080u, 0x64646464u), 0xE480E480u);
}

}  // namespace lowbit
