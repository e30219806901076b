// May this process use tile registers? Linux gives a process their 8 KB only on request.
#pragma once

#include <string>

#if defined(__linux__) && defined(__x86_64__)
#include <cerrno>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbit {

// Asks the operating system, once a process: its threads have the permission then, those of later and those of forked
// processes as well. "" or why it is denied, in words.
inline const std::string& why_no_tiles() {
  static const std::string answer = []() -> std::string {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
    return std::string("Linux does not let this process use tile registers (arch_prctl ARCH_REQ_XCOMP_PERM: ") +
           std::strerror(errno) + ")";
#else
    return "only Linux is asked for tile registers";
#endif
  }();
  return answer;
}

}  // namespace lowbit
