// The tile instructions of native/amx.h, emulated or the processor's, against plain C++; and products of any number of
// words. Exits with 1 and names what differs, with 77 where the system denies the use of tiles.
#include "native/amx.h"
#include "native/tile_permission.h"

#include <cstdio>
#include <random>

// Nothing here runs on several threads.
bool lowbit::run_on_pool(int, void (*)(void*, int), void*) { return false; }

namespace {

using namespace lowbit;

int g_failures = 0;
std::mt19937 g_random(1);

template <class T>
void expect(const char* what, const T* found, const T* wanted, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (found[i] != wanted[i] && ++g_failures <= 40)
      std::printf("%s: at %zu found %d, wanted %d\n", what, i, static_cast<int>(found[i]), static_cast<int>(wanted[i]));
}

// Random bytes, or the limits in all combinations of signs.
template <class T, size_t kCount>
void fill(T (&bytes)[kCount], int round) {
  for (T& byte : bytes) {
    const uint32_t random = g_random();
    byte = static_cast<T>(round % 2 ? random : random & 1 ? 127 : 128);
  }
}

// Tiles of fewer rows and columns than there are: what lies outside is neither read nor written, and zero when loaded.
void test_sizes(int rows, int depth, int columns) {
  amx::Config config{};
  config.palette = 1;
  const auto set = [&](int tile, int of_rows, int bytes) {
    config.rows[tile] = static_cast<uint8_t>(of_rows), config.row_bytes[tile] = static_cast<uint16_t>(bytes);
  };
  set(0, rows, 4 * columns), set(4, rows, 4 * depth), set(7, depth, 4 * columns);
  amx::configure(config);
  int8_t x[16 * 80], w[16 * 72];
  fill(x, 1), fill(w, 0);
  int32_t wanted[16][20], found[16][20];
  for (auto& row : wanted)
    for (int32_t& sum : row) sum = static_cast<int32_t>(g_random());  // so that some sums wrap around
  std::memcpy(found, wanted, sizeof found);
  amx::load<0>(found, sizeof found[0]), amx::load<4>(x, 80), amx::load<7>(w, 72);
  for (int times = 0; times < 2; ++times) amx::add_products<0, 4, 7>();
  amx::store<0>(found, sizeof found[0]);
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n)
      for (int k = 0; k < depth; ++k)
        for (int j = 0; j < 4; ++j)
          wanted[m][n] = static_cast<int32_t>(static_cast<uint32_t>(wanted[m][n]) +
                                              static_cast<uint32_t>(2 * x[m * 80 + 4 * k + j] * w[k * 72 + 4 * n + j]));
  expect("add_products", found[0], wanted[0], 16 * 20);
  amx::zero<0>();
  amx::store<0>(found, sizeof found[0]);
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) wanted[m][n] = 0;
  expect("zero", found[0], wanted[0], 16 * 20);
  amx::release();
}

// Sums of so many words, of which `together` share a scale.
void test_multiply(int64_t words, int64_t together, int round) {
  constexpr int64_t kMost = 40, kStride = 4 * kMost + 12;
  int8_t x[32 * kStride + 64], w[2 * kMost * 64];
  fill(x, round), fill(w, round / 2);
  const int8_t* tokens[2] = {x, x + 15 * kStride};
  const uint32_t* blocks[2] = {reinterpret_cast<uint32_t*>(w), reinterpret_cast<uint32_t*>(w) + kMost * 16};
  amx::Sums<2, 2> sums;
  amx::Tiles(together).multiply(tokens, kStride, blocks, words, sums.found);
  int32_t wanted[2][2][16][16] = {};
  amx::Sums<2, 2>::each([&](int i, int j, int t, int v) {
    for (int row = v * simd::kLanes; row < (v + 1) * simd::kLanes; ++row)
      for (int64_t word = 0; word < words; ++word)
        for (int64_t c = 0; c < 4; ++c)
          wanted[i][j][t][row] += tokens[i][t * kStride + 4 * word + c] * w[(j * kMost + word) * 64 + 4 * row + c];
  });
  expect("multiply", sums.found[0][0][0], wanted[0][0][0], 4 * 256);
  amx::Sums<1, 1> one;
  amx::Tiles(together).multiply<1, 1>({tokens[1]}, kStride, {blocks[1]}, words, one.found);
  expect("multiply one", one.found[0][0][0], wanted[1][1][0], 256);
}

// Every token and block of a product belongs to a tile, and no tile reaches beyond them.
void test_tasks(int64_t m, int64_t n, int64_t k) {
  const int64_t blocks = (n + 15) / 16;
  std::vector<int> seen(static_cast<size_t>(m * blocks));
  amx::for_each_task(m, n, k, 3, [&](const amx::Task& task) {
    task.each<2>([&](const auto& tokens, int64_t block, auto together) {
      for (const int64_t first : tokens)
        for (int64_t token = first; token < first + 16; ++token)
          for (int64_t b = block; b < block + decltype(together)::value; ++b) {
            const bool inside = token >= task.first_token && token < task.last_token && b < task.last_block;
            if (!inside && ++g_failures <= 40) std::printf("tasks: token %d, block %d\n", int(token), int(b));
            if (inside) seen[static_cast<size_t>(token * blocks + b)] = 1;
          }
    });
  });
  const std::vector<int> wanted(seen.size(), 1);
  expect("tasks", seen.data(), wanted.data(), seen.size());
}

}  // namespace

int main() {
#if !defined(LOWBIT_EMULATE)
  if (!why_no_tiles().empty()) {
    std::printf("not run: %s\n", why_no_tiles().c_str());
    return 77;
  }
#endif
  for (const int rows : {1, 7, 16})
    for (const int depth : {1, 8, 15, 16})
      for (const int columns : {1, 8, 16}) test_sizes(rows, depth, columns);
  for (int round = 0; round < 4; ++round)
    for (const int64_t words : {1, 5, 8, 16, 17, 31, 32, 40})
      for (const int64_t together : {int64_t{1}, int64_t{8}, words}) test_multiply(words, together, round);
  for (const int64_t m : {16, 17, 31, 32, 33, 192, 193, 400})
    for (const int64_t n : {1, 16, 17, 100}) test_tasks(m, n, m % 2 ? 64 : 8192);
  std::printf("tiles: %d failures\n", g_failures);
  return g_failures > 0;
}
