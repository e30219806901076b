// Runs kernels of another architecture for a Python on this one: tests/support/kernel_server.py starts it under an
// emulator and sends it calls, so that the tests of the kernels test these, too.
//
//   call:   u32 size and name; u32 count and words; u32 count of regions, each u64 address, u64 size, u64 1 where
//           it is a list of words with pointers among them, else 0, and its bytes
//   answer: u32 0, u64 result, u32 whether it is negative, and the bytes of every region that differ: u32 index and all
//   of it, ended by u32 -1;
//           or u32 size and an error in words
//
// A region is a piece of the caller's memory. It is put into room that ends with it and lies as it does in cache lines.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "native/bind.h"

namespace lowbit {

// One thread: what emulates a processor need not emulate several.
bool run_on_pool(int, void (*)(void*, int), void*) { return false; }
std::string describe_pool(bool& used) {
  used = false;
  return "one thread";
}

#define LOWBIT_BIND(name) void bind_##name(nb::module_& m);
#include "binds.inc"
#undef LOWBIT_BIND

}  // namespace lowbit

namespace {

struct Region {
  uint64_t address, size, has_pointers;
  std::unique_ptr<unsigned char, void (*)(void*)> room{nullptr, std::free};
  std::vector<unsigned char> before;
};

void read(void* to, size_t size) {
  if (size && std::fread(to, size, 1, stdin) != 1) std::exit(0);  // the caller is gone
}
template <class T>
T read() {
  T value;
  read(&value, sizeof value);
  return value;
}
void write(const void* from, size_t size) {
  if (size) std::fwrite(from, size, 1, stdout);
}
template <class T>
void write(T value) {
  write(&value, sizeof value);
}

Region read_region() {
  Region region;
  region.address = read<uint64_t>();
  region.size = read<uint64_t>();
  region.has_pointers = read<uint64_t>();
  const uint64_t into_line = region.address % 64;  // room begins as far into a cache line as it does there
  void* room = nullptr;
  if (posix_memalign(&room, 64, into_line + region.size)) std::exit(2);
  region.room.reset(static_cast<unsigned char*>(room));
  region.before.resize(region.size);
  read(region.before.data(), region.size);
  std::memcpy(region.room.get() + into_line, region.before.data(), region.size);
  return region;
}

unsigned char* begin(const Region& region) { return region.room.get() + region.address % 64; }

}  // namespace

int main() {
  nanobind::Kernels kernels;
  nanobind::module_ module(kernels);
#define LOWBIT_BIND(name) lowbit::bind_##name(module);
#include "binds.inc"
#undef LOWBIT_BIND
  for (;;) {
    std::string name(read<uint32_t>(), ' ');
    read(name.data(), name.size());
    nanobind::Words words(read<uint32_t>());
    read(words.data(), words.size() * sizeof(uint64_t));
    std::vector<Region> regions;
    for (uint32_t left = read<uint32_t>(); left; --left) regions.push_back(read_region());
    const auto here = [&](uint64_t address) -> void* {
      for (const Region& region : regions)
        if (address >= region.address && address - region.address <= region.size)
          return begin(region) + (address - region.address);
      throw std::out_of_range("a pointer to nothing that was sent");
    };
    for (Region& region : regions)
      for (uint64_t at = 0; region.has_pointers && at < region.size; at += sizeof(uint64_t)) {
        uint64_t word;
        std::memcpy(&word, begin(region) + at, sizeof word);
        for (const Region& other : regions)
          if (word >= other.address && word < other.address + other.size) {
            const auto moved = reinterpret_cast<uint64_t>(begin(other) + (word - other.address));
            std::memcpy(begin(region) + at, &moved, sizeof moved);
            break;
          }
      }
    nanobind::Result result{};
    std::string error;
    try {
      const auto found = kernels.by_name.find(name);
      if (found == kernels.by_name.end()) throw std::invalid_argument("no kernel of this name");
      result = found->second(words, here);
    } catch (const std::exception& caught) {
      error = name + ": " + caught.what();
    }
    write(static_cast<uint32_t>(error.size()));
    write(error.data(), error.size());
    if (error.empty()) {
      write(result.word);
      write(static_cast<uint32_t>(result.negative));
      for (size_t i = 0; i < regions.size(); ++i)
        if (!regions[i].has_pointers &&
            std::memcmp(begin(regions[i]), regions[i].before.data(), regions[i].size) != 0) {
          write(static_cast<uint32_t>(i));
          write(begin(regions[i]), regions[i].size);
        }
      write(~uint32_t{0});
    }
    std::fflush(stdout);
  }
}
