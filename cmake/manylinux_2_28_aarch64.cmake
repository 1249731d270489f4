# The platform of a wheel is the name of its toolchain file.
set(FM_PROCESSOR aarch64)
set(FM_GLIBC 2.28)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
