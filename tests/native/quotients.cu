// Quotients by a reciprocal in two parts, as kernels take them, for tests of their last bits.
#include "quotients.cuh"

namespace lowbit {

// values [size] / divisors [size] -> out; the reciprocal is moved by some units in the last place first.
__global__ void quotients(const float* __restrict__ values, const float* __restrict__ divisors, float* __restrict__ out,
                          int size, int units) {
  for (int i = threadIdx.x; i < size; i += 32) {
    const float near = __uint_as_float(__float_as_uint(near_reciprocal(divisors[i])) + units);
    const float2 parts = reciprocal_in_two(divisors[i], nearest_reciprocal(divisors[i], near));
    out[i] = times_two_parts(values[i], parts.x, parts.y);
  }
}

}  // namespace lowbit
