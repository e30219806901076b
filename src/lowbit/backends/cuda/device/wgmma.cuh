// Hopper's asynchronous products of a warpgroup (wgmma, sm_90a): D [64, kTokens] += A B, A from registers.
//
// K is 32 bytes: 32 of int8, 16 floats of 16 bits. Warp w of the four has rows 16 w .. + 15 of A and D; which lane has
// what of them is as for m16n8 (mma.cuh), and of D a lane has, for each eight columns j, sums[4 j .. 4 j + 3]: row
// `group` columns 2 place, 2 place + 1 and row `group` + 8 the same. B is in shared memory, its columns (tokens) one
// behind another, each with K side by side in 32, 64 or 128 bytes, and 16-byte pieces swizzled over eight columns as
// the hardware does: piece p of column c lies at piece p ^ (c * width / 128) % (width / 16). Eight columns begin at a
// multiple of 8 * width bytes; a product may begin at a multiple of 32 bytes within the width.
//
// Order: begin_products(); any number of products; commit_products(); .. wait_products<n>(). Until then sums and
// registers of A must not be touched, and shared memory not be written. Every thread of the four warps takes part.
#pragma once

#include "async.cuh"
#include "primitives.cuh"
#include "words.cuh"

namespace lowbit {

// Where operand B begins, and the width of its swizzle.
template <int width>
struct Tile {
  static_assert(width == 32 || width == 64 || width == 128, "the hardware swizzles 32, 64 and 128 bytes");
  const void* at;

#ifdef __CUDACC_RTC__
  // PTX ISA, "Matrix Descriptor Format": address, (unused here) 1, distance of eight columns, swizzle.
  LOWBIT_DEVICE unsigned long long descriptor() const {
    constexpr unsigned long long swizzle = width == 128 ? 1 : width == 64 ? 2 : 3;
    return (unsigned long long)(shared_address(at) >> 4 & 0x3FFF) | 1ull << 16 |
           (unsigned long long)(8 * width >> 4) << 32 | swizzle << 62;
  }
#endif
};

LOWBIT_DEVICE void begin_products() {
#ifdef __CUDACC_RTC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  simulator::begin_products();
#endif
}

LOWBIT_DEVICE void commit_products() {
#ifdef __CUDACC_RTC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  simulator::commit_products();
#endif
}

// Waits until at most `left` committed groups of products are under way.
template <int left>
LOWBIT_DEVICE void wait_products() {
#ifdef __CUDACC_RTC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#else
  simulator::wait_products(left);
#endif
}

// Registers of a thread of this warpgroup from now on, a multiple of 8: fewer, before others can have more.
template <int count>
LOWBIT_DEVICE void give_registers() {
#ifdef __CUDACC_RTC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
template <int count>
LOWBIT_DEVICE void take_registers() {
#ifdef __CUDACC_RTC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

// clang-format off
#define LOWBIT_IN_8(kind, s, o) kind(s[o]), kind(s[o + 1]), kind(s[o + 2]), kind(s[o + 3]), \
  kind(s[o + 4]), kind(s[o + 5]), kind(s[o + 6]), kind(s[o + 7])
#define LOWBIT_INT(value) "+r"(value)
#define LOWBIT_FLOAT(value) "+f"(value)
#define LOWBIT_IN_16(kind, s, o) LOWBIT_IN_8(kind, s, o), LOWBIT_IN_8(kind, s, o + 8)
#define LOWBIT_IN_32(kind, s, o) LOWBIT_IN_16(kind, s, o), LOWBIT_IN_16(kind, s, o + 16)
#define LOWBIT_IN_64(kind, s, o) LOWBIT_IN_32(kind, s, o), LOWBIT_IN_32(kind, s, o + 32)
#define LOWBIT_IN_128(kind, s, o) LOWBIT_IN_64(kind, s, o), LOWBIT_IN_64(kind, s, o + 64)
#define LOWBIT_SUMS_4 \
  "%0, %1, %2, %3"
#define LOWBIT_SUMS_8 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define LOWBIT_SUMS_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LOWBIT_SUMS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LOWBIT_SUMS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LOWBIT_SUMS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// A product with so many sums a lane: `first` is the number of the operand behind the sums.
#define LOWBIT_WGMMA(shape, types, kind, scales, count, i0, i1, i2, i3, i4, i5)                                        \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " i5 ", 0;\nwgmma.mma_async.sync.aligned." shape "." types " {"   \
               LOWBIT_SUMS_##count "}, {" i0 ", " i1 ", " i2 ", " i3 "}, " i4 ", adds" scales ";\n}\n"                 \
               : LOWBIT_IN_##count(kind, sums, 0)                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "r"(int(adds)))
#define LOWBIT_IN_4(kind, s, o) kind(s[o]), kind(s[o + 1]), kind(s[o + 2]), kind(s[o + 3])

// sums (+)= A B for int8: added to what is there, or written over it.
template <int kTokens, int width>
LOWBIT_DEVICE void wgmma_int8(int (&sums)[kTokens / 2], const uint32_t (&a)[4], Tile<width> b, bool adds) {
#ifdef __CUDACC_RTC__
  if constexpr (kTokens == 8)
    LOWBIT_WGMMA("m64n8k32", "s32.s8.s8", LOWBIT_INT, "", 4, "%4", "%5", "%6", "%7", "%8", "%9");
  else if constexpr (kTokens == 16)
    LOWBIT_WGMMA("m64n16k32", "s32.s8.s8", LOWBIT_INT, "", 8, "%8", "%9", "%10", "%11", "%12", "%13");
  else if constexpr (kTokens == 32)
    LOWBIT_WGMMA("m64n32k32", "s32.s8.s8", LOWBIT_INT, "", 16, "%16", "%17", "%18", "%19", "%20", "%21");
  else if constexpr (kTokens == 64)
    LOWBIT_WGMMA("m64n64k32", "s32.s8.s8", LOWBIT_INT, "", 32, "%32", "%33", "%34", "%35", "%36", "%37");
  else if constexpr (kTokens == 128)
    LOWBIT_WGMMA("m64n128k32", "s32.s8.s8", LOWBIT_INT, "", 64, "%64", "%65", "%66", "%67", "%68", "%69");
  else if constexpr (kTokens == 256)
    LOWBIT_WGMMA("m64n256k32", "s32.s8.s8", LOWBIT_INT, "", 128, "%128", "%129", "%130", "%131", "%132", "%133");
  else
    static_assert(kTokens == 8, "kTokens is 8, 16, 32, 64, 128 or 256");
#else
  simulator::wgmma<kTokens>(sums, a, b.at, width, adds, simulator::dot_bytes);
#endif
}

// The same for float16 or bfloat16.
template <Half half, int kTokens, int width>
LOWBIT_DEVICE void wgmma(float (&sums)[kTokens / 2], const uint32_t (&a)[4], Tile<width> b, bool adds) {
#ifdef __CUDACC_RTC__
  if constexpr (half == kBFloat16) {
  if constexpr (kTokens == 8)
    LOWBIT_WGMMA("m64n8k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 4, "%4", "%5", "%6", "%7", "%8", "%9");
  else if constexpr (kTokens == 16)
    LOWBIT_WGMMA("m64n16k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 8, "%8", "%9", "%10", "%11", "%12", "%13");
  else if constexpr (kTokens == 32)
    LOWBIT_WGMMA("m64n32k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 16, "%16", "%17", "%18", "%19", "%20", "%21");
  else if constexpr (kTokens == 64)
    LOWBIT_WGMMA("m64n64k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 32, "%32", "%33", "%34", "%35", "%36", "%37");
  else if constexpr (kTokens == 128)
    LOWBIT_WGMMA("m64n128k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 64, "%64", "%65", "%66", "%67", "%68", "%69");
  else if constexpr (kTokens == 256)
    LOWBIT_WGMMA("m64n256k16", "f32.bf16.bf16", LOWBIT_FLOAT, ", 1, 1, 0", 128, "%128", "%129", "%130", "%131", "%132", "%133");
  } else {
  if constexpr (kTokens == 8)
    LOWBIT_WGMMA("m64n8k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 4, "%4", "%5", "%6", "%7", "%8", "%9");
  else if constexpr (kTokens == 16)
    LOWBIT_WGMMA("m64n16k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 8, "%8", "%9", "%10", "%11", "%12", "%13");
  else if constexpr (kTokens == 32)
    LOWBIT_WGMMA("m64n32k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 16, "%16", "%17", "%18", "%19", "%20", "%21");
  else if constexpr (kTokens == 64)
    LOWBIT_WGMMA("m64n64k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 32, "%32", "%33", "%34", "%35", "%36", "%37");
  else if constexpr (kTokens == 128)
    LOWBIT_WGMMA("m64n128k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 64, "%64", "%65", "%66", "%67", "%68", "%69");
  else if constexpr (kTokens == 256)
    LOWBIT_WGMMA("m64n256k16", "f32.f16.f16", LOWBIT_FLOAT, ", 1, 1, 0", 128, "%128", "%129", "%130", "%131", "%132", "%133");
  }
#else
  simulator::wgmma<kTokens>(sums, a, b.at, width, adds, simulator::dot_halves<half == kBFloat16>);
#endif
}
// clang-format on

}  // namespace lowbit
