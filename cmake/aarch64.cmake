# Cross-compiling for 64-bit ARM on Debian and Ubuntu (g++-aarch64-linux-gnu), and running that (qemu-user): scripts/test_neon
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64)
