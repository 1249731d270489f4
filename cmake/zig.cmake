# A toolchain of zig cc: clang with headers and symbols of a chosen glibc, for any processor. FM_ZIG is the executable
# (PyPI: ziglang), FM_ZIG_TARGET its target if it is not the one of the file that sets FM_PROCESSOR and FM_GLIBC.
set(FM_ZIG "$ENV{FM_ZIG}" CACHE FILEPATH "The zig executable")
if(NOT FM_ZIG)
  message(FATAL_ERROR "Give the zig executable of `pip install ziglang`: -DFM_ZIG=.../site-packages/ziglang/zig")
endif()
set(FM_ZIG_TARGET "$ENV{FM_ZIG_TARGET}" CACHE STRING "What zig cc compiles for")
if(NOT FM_ZIG_TARGET)
  set(FM_ZIG_TARGET ${FM_PROCESSOR}-linux-gnu.${FM_GLIBC})
endif()
set(ENV{FM_ZIG} ${FM_ZIG}) # for the projects that CMake makes to try the compiler
set(ENV{FM_ZIG_TARGET} ${FM_ZIG_TARGET})

set(CMAKE_C_COMPILER ${FM_ZIG} cc -target ${FM_ZIG_TARGET})
set(CMAKE_C_FLAGS_INIT -g0) # without it zig describes the sources, with their folders
set(FM_SANITIZERS OFF CACHE BOOL "zig has no AddressSanitizer")

if(NOT CMAKE_HOST_SYSTEM_PROCESSOR STREQUAL FM_PROCESSOR)
  set(CMAKE_SYSTEM_NAME Linux)
  set(CMAKE_SYSTEM_PROCESSOR ${FM_PROCESSOR})
  set(CMAKE_CUDA_COMPILER NOTFOUND) # nvcc compiles for the machine that it runs on
  find_program(FM_QEMU NAMES qemu-${FM_PROCESSOR} qemu-${FM_PROCESSOR}-static)
  if(FM_QEMU)
    set(CMAKE_CROSSCOMPILING_EMULATOR ${FM_QEMU})
  endif()
endif()
