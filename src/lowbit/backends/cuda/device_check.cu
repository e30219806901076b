// A kernel that does nothing: what a GPU and its driver must be able to run before any other is given to them.

#include "primitives.cuh"

namespace lowbit {

__global__ void nothing() {}

}  // namespace lowbit
