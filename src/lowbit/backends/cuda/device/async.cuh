// Copies from global to shared memory that go on by themselves, and what waits for them.
//
// Each thread's own (cp.async, from sm_80): copies of 16 bytes are committed in groups, and a thread waits until at
// most so many of its groups are left; after a barrier the others see them, too. Bulk copies (cp.async.bulk, from
// sm_90): one thread asks for any number of bytes, and a mailbox (an mbarrier) in shared memory tells when they are
// there.
#pragma once

#include "primitives.cuh"

namespace lowbit {

#ifdef __CUDACC_RTC__
LOWBIT_DEVICE uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }
#endif

// 16 bytes, both addresses multiples of 16; zeros unless `valid` (then `from` is not read, but must be an address).
LOWBIT_DEVICE void copy_async(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  simulator::copy_async(to, from, 16, valid);
#endif
}

// 4 bytes, likewise.
LOWBIT_DEVICE void copy_async_word(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
#else
  simulator::copy_async(to, from, 4, valid);
#endif
}

LOWBIT_DEVICE void commit_copies() {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simulator::commit_copies();
#endif
}

// Waits until at most `left` of this thread's groups of copies are under way.
template <int left>
LOWBIT_DEVICE void wait_copies() {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#else
  simulator::wait_copies(left);
#endif
}

// Some of a block's threads, a multiple of 32, meet. `id`: 1..15, one for each set of threads that may wait at a time.
LOWBIT_DEVICE void meet(int id, int threads) {
#ifdef __CUDACC_RTC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  simulator::Barrier& barrier = simulator::block().named[id];
  barrier.members = threads;
  barrier.wait();
#endif
}

// ---- mailboxes and bulk copies: sm_90 and later ---------------------------------------------------------------------

// 8 bytes of shared memory. Its phase ends when `count` threads arrived and all announced bytes landed; then the next
// begins. The phases have the parities 0, 1, 0, ..
using Mailbox = unsigned long long;

LOWBIT_DEVICE void open_mailbox(Mailbox* mailbox, int count) {
#ifdef __CUDACC_RTC__
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(mailbox)), "r"(count) : "memory");
#else
  auto* made = reinterpret_cast<simulator::Mailbox*>(mailbox);
  made->bytes = 0;
  made->phase = 0;
  made->count = made->pending = unsigned(count);
#endif
}

// After opening mailboxes and before a barrier of the block: asynchronous copies see them, too.
LOWBIT_DEVICE void publish_mailboxes() {
#ifdef __CUDACC_RTC__
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// This thread has arrived.
LOWBIT_DEVICE void arrive(Mailbox* mailbox) {
#ifdef __CUDACC_RTC__
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(mailbox)) : "memory");
#else
  reinterpret_cast<simulator::Mailbox*>(mailbox)->arrived(1, 0);
  simulator::maybe_yield();
#endif
}

// This thread has arrived, and so many bytes are to land in this phase.
LOWBIT_DEVICE void arrive_expecting(Mailbox* mailbox, uint32_t bytes) {
#ifdef __CUDACC_RTC__
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(mailbox)), "r"(bytes)
               : "memory");
#else
  auto* found = reinterpret_cast<simulator::Mailbox*>(mailbox);
  found->bytes += int(bytes);
  found->arrived(1, 0);
#endif
}

// Waits until the phase of this parity has ended: a mailbox just opened has ended the one of parity 1.
LOWBIT_DEVICE void wait_for(Mailbox* mailbox, int parity) {
#ifdef __CUDACC_RTC__
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(mailbox)),
      "r"(parity)
      : "memory");
#else
  const auto* found = reinterpret_cast<const simulator::Mailbox*>(mailbox);
  while (int(found->phase) == parity) simulator::yield();
#endif
}

// Bytes side by side, addresses and number multiples of 16. One thread asks; the mailbox must expect them.
LOWBIT_DEVICE void copy_bulk(void* to, const void* from, uint32_t bytes, Mailbox* mailbox) {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(mailbox))
               : "memory");
#else
  simulator::copy_bulk(to, from, bytes, mailbox);
#endif
}

// What this thread wrote to shared memory is seen by asynchronous products and copies that start after the next
// barrier.
LOWBIT_DEVICE void publish_shared() {
#ifdef __CUDACC_RTC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace lowbit
