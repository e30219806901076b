// Hopper's own instructions against plain loops: bulk copies, mailboxes, and products of a warpgroup of int8 and of
// bfloat16 from swizzled shared memory. What they do is read from documents; here a GPU says whether it was read right.
//
// A [64, 64] and B [32, 64] hold small integers that follow from their place, so that every sum is exact in both types.
#include "floats.cuh"
#include "wgmma.cuh"

namespace lowbit {

constexpr int kTokens = 32, kColumns = 64;

LOWBIT_DEVICE int left_value(int row, int column) { return (7 * row + 13 * column) % 23 - 11; }
LOWBIT_DEVICE int right_value(int token, int column) { return (5 * token + 3 * column) % 19 - 9; }

LOWBIT_DEVICE uint32_t bytes_of(int row, int column) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= uint32_t(uint8_t(left_value(row, column + i))) << 8 * i;
  return word;
}
LOWBIT_DEVICE uint32_t pair_of(int first, int second) {
  return uint32_t(float_to_half<kBFloat16>(float(first))) | uint32_t(float_to_half<kBFloat16>(float(second))) << 16;
}

// `tile`: B as int8, 64 bytes a token, swizzled (the host does that). wrong [128]: the wrong sums of each thread.
__global__ void __launch_bounds__(128) hopper_products(const uint4* __restrict__ tile, int* __restrict__ wrong) {
  unsigned char* bytes = dynamic_shared();
  unsigned char* halves = bytes + kTokens * kColumns;
  auto* mailbox = reinterpret_cast<Mailbox*>(halves + 2 * kTokens * kColumns);
  const int thread = threadIdx.x, lane = thread % 32, owner = lane / 4, place = lane % 4;
  const int row = thread / 32 * 16 + owner;
  if (thread == 0) {
    open_mailbox(mailbox, 1);
    publish_mailboxes();
  }
  for (int i = thread; i < kTokens * kColumns / 2; i += 128) {
    const int token = i / (kColumns / 2), column = i % (kColumns / 2) * 2, piece = column / 8 ^ token % 8;
    *reinterpret_cast<uint32_t*>(halves + token * 128 + piece * 16 + column % 8 * 2) =
        pair_of(right_value(token, column), right_value(token, column + 1));
  }
  publish_shared();
  __syncthreads();
  if (thread == 0) {
    arrive_expecting(mailbox, kTokens * kColumns);
    copy_bulk(bytes, tile, kTokens * kColumns, mailbox);
  }
  wait_for(mailbox, 0);

  uint32_t a[2][4], b[4][4];
  for (int k = 0; k < 2; ++k)
    for (int i = 0; i < 4; ++i) a[k][i] = bytes_of(row + 8 * (i % 2), 32 * k + 16 * (i / 2) + 4 * place);
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 4; ++i) {
      const int r = row + 8 * (i % 2), column = 16 * k + 8 * (i / 2) + 2 * place;
      b[k][i] = pair_of(left_value(r, column), left_value(r, column + 1));
    }
  int integers[kTokens / 2];
  float floats[kTokens / 2];
  begin_products();
#pragma unroll
  for (int k = 0; k < 2; ++k) wgmma_int8<kTokens>(integers, a[k], Tile<64>{bytes + 32 * k}, k > 0);
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma<kBFloat16, kTokens>(floats, b[k], Tile<128>{halves + 32 * k}, k > 0);
  commit_products();
  wait_products<0>();
  hold(integers);
  hold(floats);

  int count = 0;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int r = row + 8 * (i / 2 % 2), token = i / 4 * 8 + 2 * place + i % 2;
    int right = 0;
#pragma unroll 1  // it is compiled at the first use of a GPU, and should not take long
    for (int column = 0; column < kColumns; ++column) right += left_value(r, column) * right_value(token, column);
    count += (integers[i] != right) + (floats[i] != float(right));
  }
  wrong[thread] = count;
}

}  // namespace lowbit
