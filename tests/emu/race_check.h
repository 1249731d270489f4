/* Between the scheduler and the race check. */
#ifndef FM_RACE_CHECK_H
#define FM_RACE_CHECK_H

#include <stddef.h>
#include <stdint.h>

typedef struct fm_race_range {
  const char *begin, *end;
} fm_race_range;

/* A launch begins: accesses count from here on. Those to the stacks of fibers never do: a thread keeps its own
 * variables there, and the next thread finds the same addresses. Shared memory is another for each block, at the same
 * address. */
void fm_race_begin_launch(fm_race_range stacks, fm_race_range shared);
void fm_race_begin_block(int64_t block);
void fm_race_barrier(void);
void fm_race_end_launch(void);

/* The thread whose accesses follow. */
void fm_race_switch_to(unsigned thread);

/* What the first race of this launch was, or NULL. */
const char *fm_race_found(void);

#endif
