// Two floats in an instruction, from sm_100 on; earlier GPUs take two.
#pragma once

#include "primitives.cuh"

namespace lowbit {

// a * b + c of each, rounded once. Subnormals are what they are.
LOWBIT_DEVICE float2 fma_pair(float2 a, float2 b, float2 c) {
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 1000
  float2 out;
  asm("{\n"
      ".reg .b64 a, b, c;\n"
      "mov.b64 a, {%2, %3};\n"
      "mov.b64 b, {%4, %5};\n"
      "mov.b64 c, {%6, %7};\n"
      "fma.rn.f32x2 c, a, b, c;\n"
      "mov.b64 {%0, %1}, c;\n"
      "}"
      : "=f"(out.x), "=f"(out.y)
      : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y), "f"(c.x), "f"(c.y));
  return out;
#else
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

}  // namespace lowbit
