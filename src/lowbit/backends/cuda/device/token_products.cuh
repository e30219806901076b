// Products of a warpgroup with tokens that lie at fixed distances behind a place in shared memory (wgmma.cuh says how).
//
// A kernel that decodes for every product has few instructions to spare for where operand B begins: here that is found
// once for a place, and each product adds a constant to it.
#pragma once

#include "wgmma.cuh"

namespace lowbit {

// Tokens with 64 columns of 16 bits each, 128 bytes, swizzled over that width. `begin` is a multiple of 1024 bytes.
struct Tokens {
  const unsigned char* begin;
#ifdef __CUDACC_RTC__
  unsigned long long made;
  LOWBIT_DEVICE unsigned long long descriptor() const { return made; }
#endif

  LOWBIT_DEVICE explicit Tokens(const unsigned char* at) : begin(at) {
#ifdef __CUDACC_RTC__
    made = Tile<128>{at}.descriptor();
#endif
  }

  // Tokens so many bytes behind. The address, in units of 16 bytes, is the lowest part of what is made, and has room.
  LOWBIT_DEVICE Tokens behind(int bytes) const {
    Tokens found = *this;
    found.begin += bytes;
#ifdef __CUDACC_RTC__
    found.made += bytes / 16;
#endif
    return found;
  }
};

// clang-format off
// sums (+)= A B for float16 or bfloat16: added to what is there, or written over it.
template <Half half, int kTokens>
LOWBIT_DEVICE void multiply_tokens(float (&sums)[kTokens / 2], const uint32_t (&a)[4], const Tokens& b, bool adds) {
  static_assert(kTokens == 16 || kTokens == 32 || kTokens == 64 || kTokens == 128, "kTokens is 16, 32, 64 or 128");
#ifdef __CUDACC_RTC__
  if constexpr (half == kBFloat16) {
    if constexpr (kTokens == 16)
      LOWBIT_WGMMA("m64n16k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 8, "%8", "%9", "%10", "%11", "%12", "%13");
    else if constexpr (kTokens == 32)
      LOWBIT_WGMMA("m64n32k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 16, "%16", "%17", "%18", "%19", "%20", "%21");
    else if constexpr (kTokens == 64)
      LOWBIT_WGMMA("m64n64k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 32, "%32", "%33", "%34", "%35", "%36", "%37");
    else
      LOWBIT_WGMMA("m64n128k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 64, "%64", "%65", "%66", "%67", "%68", "%69");
  } else {
    if constexpr (kTokens == 16)
      LOWBIT_WGMMA("m64n16k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 8, "%8", "%9", "%10", "%11", "%12", "%13");
    else if constexpr (kTokens == 32)
      LOWBIT_WGMMA("m64n32k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 16, "%16", "%17", "%18", "%19", "%20", "%21");
    else if constexpr (kTokens == 64)
      LOWBIT_WGMMA("m64n64k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 32, "%32", "%33", "%34", "%35", "%36", "%37");
    else
      LOWBIT_WGMMA("m64n128k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 64, "%64", "%65", "%66", "%67", "%68", "%69");
  }
#else
  simulator::wgmma<kTokens>(sums, a, b.begin, 128, adds, simulator::dot_halves<half == kBFloat16>);
#endif
}
// clang-format on

}  // namespace lowbit
