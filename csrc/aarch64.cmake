# Cross-compiling csrc/ for 64-bit ARM with Debian's g++-aarch64-linux-gnu, to run under qemu-user:
#   cmake -S . -B build/aarch64 -D CMAKE_TOOLCHAIN_FILE=csrc/aarch64.cmake -D FUSEENGINE_SELFTEST=ON
#   cmake --build build/aarch64 && qemu-aarch64-static build/aarch64/fuse_selftest
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# qemu-user then needs no C library of that architecture.
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
