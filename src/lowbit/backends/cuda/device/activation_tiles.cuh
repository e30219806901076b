// Where the 4-bit codes of activations lie in memory: by rows, or as the tensor cores of one architecture take them.
//
// A group has 64 columns, eight eights of columns. A word holds the codes of an eight: all of them as nibbles, the
// first in the lowest, or, where a code takes a byte, those of its even or of its odd columns. What is multiplied with
// 4-bit weights by int8 products takes even and odd columns apart, as the weights' low and high nibbles are.
#pragma once

#include "primitives.cuh"

namespace lowbit {

enum Storage {
  kPlain = 0,       // nibbles, [tokens, K / 2]
  kFragments4 = 1,  // nibbles, operand B of two m16n8k64: 512 bytes for a group of 16 tokens, 16 a lane
  kFragments8 = 2,  // bytes, operand B of two m16n8k32: 512 bytes for a group of 8 tokens, 16 a lane
  kSwizzled8 = 3    // bytes, [K / 64, tokens, 64] with the 64-byte swizzle of wgmma
};

template <Storage storage>
constexpr bool kTakesBytes = storage == kFragments8 || storage == kSwizzled8;

// The byte at which a word begins. `eight`: 0..7, of the group; `odd`: 0 or 1, where codes take bytes. `tokens`: all
// that there is room for, a multiple of 16 but for kPlain.
template <Storage storage>
LOWBIT_DEVICE int64_t word_at(int group, int groups, int tokens, int token, int eight, int odd) {
  if constexpr (storage == kPlain) return (int64_t(token) * groups + group) * 32 + eight * 4;
  if constexpr (storage == kSwizzled8) {
    const int sixteen = (odd * 2 + eight / 4) ^ (token / 2 % 4);
    return (int64_t(group) * tokens + token) * 64 + sixteen * 16 + eight % 4 * 4;
  }
  const int lane = token % 8 * 4 + eight % 4;
  if constexpr (storage == kFragments4) {
    const int64_t tile = int64_t(group) * (tokens / 16) + token / 16;
    return tile * 512 + lane * 16 + token % 16 / 8 * 8 + eight / 4 * 4;
  }
  const int64_t tile = int64_t(group) * (tokens / 8) + token / 8;
  return tile * 512 + lane * 16 + odd * 8 + eight / 4 * 4;
}

// The bytes from a group to the next.
template <Storage storage>
LOWBIT_DEVICE int64_t group_bytes(int tokens) {
  return storage == kPlain ? 32 : int64_t(tokens) * (kTakesBytes<storage> ? 64 : 32);
}

}  // namespace lowbit
