/* A check that says where it failed and lets the rest run. */
#ifndef FM_CHECK_H
#define FM_CHECK_H

#include <stdbool.h>
#include <stdio.h>

extern int fm_failures;

#define CHECK(condition, ...)                                         \
  do {                                                                \
    if (!(condition) && fm_failures++ < 20) {                         \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                   \
      fputc('\n', stderr);                                            \
    }                                                                 \
  } while (0)

#endif
