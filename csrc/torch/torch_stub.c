/* Empty: linked with the SONAME of libtorch_cpu.so, so that the library names torch as needed and builds without it. */
typedef int fm_torch_stub;
