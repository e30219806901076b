// Small kernels around single device functions, for tests of those and of the simulator.
#include "mma.cuh"
#include "wgmma.cuh"

namespace lowbit {

// One product of a warp over `bytes` 32 of K: A [16, 32] and B [8, 32] bytes as they are, sums [16, 8].
template <int kind>
__global__ void product(const uint32_t* __restrict__ left, const uint32_t* __restrict__ right, int* __restrict__ out) {
  const int lane = threadIdx.x, owner = lane / 4, place = lane % 4;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = left[(owner + 8 * (i % 2)) * 8 + 4 * (i / 2) + place];
  const uint32_t b0 = right[owner * 8 + place], b1 = right[owner * 8 + 4 + place];
  const int start[4] = {1, 2, 3, 4};
  int sums[4];
  if constexpr (kind == 0) mma_int8(sums, a, b0, b1, start);
  if constexpr (kind == 1) mma_int4<false>(sums, a, b0, b1, start);
  if constexpr (kind == 2) mma_int4<true>(sums, a, b0, b1, start);
  for (int i = 0; i < 4; ++i) out[(owner + 8 * (i / 2)) * 8 + 2 * place + i % 2] = sums[i];
}

// [32, 8] halves through asynchronous copies and ldmatrix: matrix i becomes word i of every lane, [4, 32].
__global__ void matrices(const uint4* __restrict__ from, uint32_t* __restrict__ out) {
  auto* shared = reinterpret_cast<uint4*>(dynamic_shared());
  copy_async(shared + threadIdx.x, from + threadIdx.x, threadIdx.x != 5);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  uint32_t found[4];
  load_matrices(found, shared + threadIdx.x);
  for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = found[i];
}

// A ring of bulk copies, one warp to ask for them and four to add up: out[t] = sum of from[i * 128 + t].
template <int kStages>
__global__ void ring(const int* __restrict__ from, int* __restrict__ out, int count) {
  auto* slots = reinterpret_cast<int*>(dynamic_shared());
  auto* full = reinterpret_cast<Mailbox*>(slots + kStages * 128);
  Mailbox* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) open_mailbox(full + i, 1), open_mailbox(empty + i, 128);
    publish_mailboxes();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x != 128) return;
    for (int i = 0; i < count; ++i) {
      wait_for(empty + i % kStages, (i / kStages + 1) % 2);
      arrive_expecting(full + i % kStages, 512);
      copy_bulk(slots + i % kStages * 128, from + i * 128, 512, full + i % kStages);
    }
    return;
  }
  int sum = 0;
  for (int i = 0; i < count; ++i) {
    wait_for(full + i % kStages, i / kStages % 2);
    sum += slots[i % kStages * 128 + threadIdx.x];
    arrive(empty + i % kStages);
  }
  out[threadIdx.x] = sum;
}

// A [64, width] and B [kTokens, width] bytes, K side by side: sums [64, kTokens] of int8 or, for `type` 1 and 2, of
// float16 and bfloat16.
template <int type, int kTokens, int width>
__global__ void __launch_bounds__(128)
    warpgroup(const uint32_t* __restrict__ left, const uint4* __restrict__ right, int* __restrict__ out) {
  unsigned char* shared = dynamic_shared();
  for (int i = threadIdx.x; i < kTokens * width / 16; i += 128) {
    const int column = i / (width / 16), piece = i % (width / 16);
    const int to = piece ^ (column * width / 128) % (width / 16);
    *reinterpret_cast<uint4*>(shared + column * width + to * 16) = right[i];
  }
  publish_shared();
  __syncthreads();
  const int lane = threadIdx.x % 32, owner = lane / 4, place = lane % 4, row = threadIdx.x / 32 * 16 + owner;
  uint32_t a[width / 32][4];
  for (int k = 0; k < width / 32; ++k)
    for (int i = 0; i < 4; ++i) a[k][i] = left[(row + 8 * (i % 2)) * (width / 4) + 8 * k + 4 * (i / 2) + place];
  const auto store = [&](const auto& sums) {
    for (int i = 0; i < kTokens / 2; ++i) {
      const int at = (row + 8 * (i / 2 % 2)) * kTokens + i / 4 * 8 + 2 * place + i % 2;
      if constexpr (type == 0)
        out[at] = sums[i];
      else
        out[at] = int(__float_as_uint(sums[i]));
    }
  };
  if constexpr (type == 0) {
    int sums[kTokens / 2];
    begin_products();
    for (int k = 0; k < width / 32; ++k) wgmma_int8<kTokens>(sums, a[k], Tile<width>{shared + 32 * k}, k > 0);
    commit_products();
    wait_products<0>();
    hold(sums);
    store(sums);
  } else {
    float sums[kTokens / 2];
    begin_products();
    for (int k = 0; k < width / 32; ++k)
      wgmma<type == 2 ? kBFloat16 : kFloat16, kTokens>(sums, a[k], Tile<width>{shared + 32 * k}, k > 0);
    commit_products();
    wait_products<0>();
    hold(sums);
    store(sums);
  }
}

// Two mistakes: products that nothing orders behind what was written to registers, and a write behind 512 bytes.
template <int kTokens>
__global__ void __launch_bounds__(128) unordered(int* __restrict__ out) {
  uint32_t a[4] = {};
  int sums[kTokens / 2];
  wgmma_int8<kTokens>(sums, a, Tile<32>{dynamic_shared()}, false);
  commit_products();
  wait_products<0>();
  hold(sums);
  out[threadIdx.x] = sums[0];
}
__global__ void overrun(int* __restrict__ out) {
  dynamic_shared()[512] = 1;
  out[0] = 1;
}

}  // namespace lowbit
