/* The emulator's settings, for tests in C, C++ and (through ctypes) Python. */
#ifndef FM_EMU_CONTROL_H
#define FM_EMU_CONTROL_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* The order of blocks, and of the threads of a block: "forward", "reverse" or "random[:seed]". False for anything else.
 * The environment variable FM_EMU_ORDER sets the first one; without it, forward. */
bool fm_emu_set_order(const char *order);

/* Makes every barrier a plain statement, as if it were not in the kernel: for tests that it is missed. */
void fm_emu_omit_barriers(bool omit);

/* Launches since the library was loaded. */
int64_t fm_emu_launches(void);

/* Whether accesses are checked for races: race_check.cpp is part of this build. */
bool fm_emu_checks_races(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif
