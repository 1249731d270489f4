/* The emulator itself: that right kernels give the same result in every order, and that wrong ones are caught. */
#include <math.h>
#include <string.h>

#include <initializer_list>
#include <vector>

#include "../c/check.h"
#include "cuda_emu.h"

int fm_failures = 0;

static const char *const orders[] = {"forward", "reverse", "random:1", "random:2", "random"};

static void set_order(const char *order) { CHECK(fm_emu_set_order(order), "%s", order); }

/* The launches since the last of these two must have left an error with this in it. */
static void expect_error(const char *part) {
  const char *error = fm_launch_error();
  CHECK(error != nullptr && strstr(error, part) != nullptr, "'%s' does not say '%s'", error ? error : "", part);
}

static void expect_no_error() {
  const char *error = fm_launch_error();
  CHECK(error == nullptr, "%s", error ? error : "");
}

/* ---- block sums: one right, three wrong ---- */

constexpr int threads = 256;

enum wrong { nothing, no_first_barrier, no_later_barrier, shuffle_for_barrier };

/* Thread 0 of each block writes the sum of its inputs, which a tree in shared memory adds up. */
__global__ void block_sum(const double *in, double *out, wrong what) {
  __shared__ double held[threads];
  const unsigned t = threadIdx.x;
  held[t] = in[blockIdx.x * threads + t];
  if (what != no_first_barrier) {
    __syncthreads();
  }
  for (unsigned step = threads / 2; step > 0; step /= 2) {
    if (t < step) {
      held[t] += held[t + step];
    }
    if (what == shuffle_for_barrier) {
      __shfl_down_sync(0xffffffffu, 0.0, 1);
    } else if (what != no_later_barrier) {
      __syncthreads();
    }
  }
  if (t == 0) {
    out[blockIdx.x] = held[0];
  }
}

constexpr int blocks = 5;

/* Powers of two and small fractions: another order of additions, or a term that is missing, shows in the sum. */
static std::vector<double> block_sums(wrong what) {
  std::vector<double> in(blocks * threads), out(blocks, NAN);
  for (size_t i = 0; i < in.size(); i++) {
    in[i] = ldexp(1.0, static_cast<int>(i % 50)) + 1.0 / static_cast<double>(i + 3);
  }
  FM_LAUNCH(block_sum, blocks, threads, nullptr, in.data(), out.data(), what);
  return out;
}

static bool same(const std::vector<double> &a, const std::vector<double> &b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
}

static void test_right_kernel() {
  set_order("forward");
  const std::vector<double> expected = block_sums(nothing);
  for (const char *order : orders) {
    set_order(order);
    CHECK(same(block_sums(nothing), expected), "%s", order);
    expect_no_error();
  }
}

/* Whether some order shows that this kernel is wrong, by its result alone. */
static bool an_order_shows(wrong what) {
  set_order("forward");
  const std::vector<double> expected = block_sums(nothing);
  bool shown = false;
  for (const char *order : orders) {
    set_order(order);
    shown = shown || !same(block_sums(what), expected);
    expect_no_error();
  }
  return shown;
}

static void test_races_show_in_results() {
  CHECK(an_order_shows(no_first_barrier), "threads read what the others have not written yet");
  CHECK(an_order_shows(no_later_barrier), "threads add what the others have not summed up yet");
}

/* ---- the race check: it needs no wrong result, and finds a race in every order ---- */

static void expect_race(wrong what) {
  for (const char *order : orders) {
    set_order(order);
    block_sums(what);
    expect_error("race: thread ");
  }
}

/* Each block reads what the one before it writes: nothing orders blocks, though all results are right when they run
 * forward. */
__global__ void chain(double *values) {
  if (threadIdx.x == 0) {
    values[blockIdx.x + 1] = values[blockIdx.x] + 1.0;
  }
}

/* All threads write the same: harmless to the result, and still nothing that CUDA defines. */
__global__ void all_write(double *value) { *value = 1.0; }

/* Block 0 reads, the others write what is there already. */
__global__ void write_after_read(double *value, double *copy) {
  if (blockIdx.x == 0) {
    copy[threadIdx.x] = *value;
  } else if (threadIdx.x == 0) {
    *value = 2.0;
  }
}

/* Neighbours share a word but no byte; every thread reads one table; a thread may read what it wrote. */
__global__ void disjoint_bytes(const char *table, char *out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = table[0];
  out[i] = static_cast<char>(out[i] + table[1]);
}

static void test_races_are_found() {
  CHECK(fm_emu_checks_races(), "race_check.cpp is not part of this build");
  expect_race(no_first_barrier);
  expect_race(no_later_barrier);
  expect_race(shuffle_for_barrier);
  for (const char *order : orders) {
    double values[10] = {0}, copy[32];
    set_order(order);
    FM_LAUNCH(chain, 9, 32, nullptr, values);
    expect_error("race: thread 0");
    FM_LAUNCH(all_write, 1, 2, nullptr, values);
    expect_error("of the same block wrote");
    FM_LAUNCH(all_write, 2, 1, nullptr, values);
    expect_error("of another block wrote");
    FM_LAUNCH(write_after_read, 2, 32, nullptr, values, copy);
    expect_error("race: thread ");
    FM_LAUNCH(all_write, 1, 1, nullptr, values); /* another launch is ordered after the first */
    FM_LAUNCH(all_write, 1, 1, nullptr, values);
    char bytes[96];
    FM_LAUNCH(disjoint_bytes, 3, 32, nullptr, "ab", bytes);
    expect_no_error();
  }
}

/* Barriers that the emulator itself leaves out are missed as those that the text leaves out. */
static void test_omitted_barriers() {
  fm_emu_omit_barriers(true);
  expect_race(nothing);
  fm_emu_omit_barriers(false);
  block_sums(nothing);
  expect_no_error();
}

/* Shared memory has no value before a thread writes it, in the second block no more than in the first. */
__global__ void reads_shared(double *out, bool write) {
  __shared__ double held[4];
  out[blockIdx.x] = held[2];
  if (write) {
    held[2] = 1.0;
  }
}

static void test_shared_memory_is_undefined() {
  double out[3] = {0};
  FM_LAUNCH(reads_shared, 3, 1, nullptr, out, true);
  for (double x : out) {
    CHECK(isnan(x), "%g", x);
  }
}

/* ---- threads that do not meet ---- */

__global__ void some_leave(unsigned staying) {
  if (threadIdx.x < staying) {
    __syncthreads();
  }
}

__global__ void two_barriers() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void some_shuffle(unsigned mask, unsigned by, unsigned count) {
  if (threadIdx.x < count) {
    __shfl_down_sync(mask, 1.0, by);
  }
}

__global__ void shuffle_or_barrier() {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    __shfl_down_sync(0xffffffffu, 1.0, 1);
  }
}

static void test_divergence() {
  for (const char *order : orders) {
    set_order(order);
    FM_LAUNCH(some_leave, 2, 64, nullptr, 63u);
    expect_error("some_leave: divergent barrier: thread 0 of block");
    FM_LAUNCH(some_leave, 2, 64, nullptr, 1u);
    expect_error("and thread 1 has ended");
    FM_LAUNCH(two_barriers, 1, 64, nullptr);
    expect_error("two_barriers: divergent barrier");
    FM_LAUNCH(some_shuffle, 1, 32, nullptr, 0xffffffffu, 1u, 31u);
    expect_error("thread 31 has ended");
    FM_LAUNCH(shuffle_or_barrier, 1, 64, nullptr);
    expect_error("thread 5 waits at the barrier of test_emu.cpp:");
    FM_LAUNCH(some_shuffle, 1, 16, nullptr, 0xffffffffu, 1u, 16u);
    expect_error("mask names lane 16, but the block has 16 threads");
    FM_LAUNCH(some_shuffle, 1, 32, nullptr, 0xfffffffeu, 1u, 32u);
    expect_error("thread 0 is in a shuffle whose mask leaves it out");
    FM_LAUNCH(some_shuffle, 1, 32, nullptr, 0x0000ffffu, 1u, 16u);
    expect_error("thread 15 reads lane 16, which its mask leaves out");
    FM_LAUNCH(some_leave, 2, 64, nullptr, 64u); /* what was abandoned leaves nothing behind */
    expect_no_error();
  }
}

/* ---- what threads see ---- */

__global__ void shuffle_all(double *out, unsigned by) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __shfl_down_sync(0xffffffffu, static_cast<double>(i), by);
}

static void test_shuffles() {
  for (const char *order : orders) {
    set_order(order);
    for (unsigned by : {0u, 1u, 2u, 16u, 31u, 32u}) {
      double out[2 * 96];
      FM_LAUNCH(shuffle_all, 2, 96, nullptr, out, by);
      for (unsigned i = 0; i < 2 * 96; i++) {
        const unsigned from = i % 32 + by < 32 ? i + by : i;
        CHECK(out[i] == from, "%s by %u: thread %u has %g", order, by, i, out[i]);
      }
    }
  }
}

struct arguments {
  int value[100];
};

__global__ void changes_its_arguments(arguments a, int *seen) {
  seen[blockIdx.x * blockDim.x + threadIdx.x] = a.value[99];
  a.value[99] = -1;
}

static void test_arguments_are_copied() {
  arguments a = {};
  int seen[64];
  a.value[99] = 7;
  FM_LAUNCH(changes_its_arguments, 2, 32, nullptr, a, seen);
  CHECK(a.value[99] == 7, "%d", a.value[99]);
  for (int s : seen) {
    CHECK(s == 7, "%d", s);
  }
}

/* ---- orders ---- */

/* Each thread takes the next number: a race on purpose, which tells the order (not in a build that checks for races).
 */
__global__ void take_numbers(int *next, int *number) { number[blockIdx.x * blockDim.x + threadIdx.x] = (*next)++; }

constexpr int takers = 4 * 32;

static std::vector<int> numbers() {
  int next = 0;
  std::vector<int> number(takers);
  FM_LAUNCH(take_numbers, 4, 32, nullptr, &next, number.data());
  CHECK(next == takers, "%d threads ran", next);
  return number;
}

static std::vector<int> numbers(const char *order) {
  set_order(order);
  return numbers();
}

static void test_orders() {
  const std::vector<int> forward = numbers("forward"), reverse = numbers("reverse");
  for (int i = 0; i < takers; i++) {
    CHECK(forward[i] == i, "thread %d was number %d", i, forward[i]);
    CHECK(reverse[i] == takers - 1 - i, "thread %d was number %d", i, reverse[i]);
  }
  CHECK(numbers("random:7") == numbers("random:7"), "a seed is an order");
  CHECK(numbers("random:7") != numbers("random:8"), "another seed, another order");
  CHECK(numbers("random") != forward, "random");
  for (const char *wrong : {"", "backward", "random:", "random:x", "random:1x", "reverse "}) {
    CHECK(!fm_emu_set_order(wrong), "'%s' is no order", wrong);
  }
}

/* With FM_EMU_ORDER=reverse, and with a value that names no order. */
static void test_order_from_environment() { CHECK(numbers() == numbers("reverse"), "FM_EMU_ORDER=reverse"); }

static void test_wrong_environment() {
  double value = 0.0;
  FM_LAUNCH(all_write, 1, 1, nullptr, &value);
  expect_error("FM_EMU_ORDER: 'sideways' is none of forward, reverse, random, random:SEED");
  CHECK(value == 0.0, "nothing runs after an error");
}

/* ---- launches ---- */

static void test_launches() {
  double value = 0.0;
  const int64_t before = fm_emu_launches();
  for (int64_t size : {int64_t{0}, int64_t{-1}, int64_t{1025}}) {
    FM_LAUNCH(all_write, 1, size, nullptr, &value);
    expect_error("no GPU launches 1 blocks of");
  }
  for (int64_t size : {int64_t{0}, int64_t{-1}, int64_t{1} << 31}) {
    FM_LAUNCH(all_write, size, 1, nullptr, &value);
    expect_error("blocks of 1 threads");
  }
  FM_LAUNCH(all_write, 0, 1, nullptr, &value);
  FM_LAUNCH(all_write, 1, 1, nullptr, &value);
  CHECK(value == 0.0 && fm_emu_launches() == before, "nothing runs after an error");
  expect_error("all_write");
  FM_LAUNCH(all_write, 1, 1, nullptr, &value);
  CHECK(value == 1.0 && fm_emu_launches() == before + 1, "and all is well when it was asked for");
  expect_no_error();
}

/* ---- for AddressSanitizer: each of these must end the program ---- */

__global__ void reads_at(const double *values, int64_t at, double *out) { *out = values[at]; }

static void test_out_of_bounds() {
  const std::vector<double> values(10);
  double out;
  FM_LAUNCH(reads_at, 1, 1, nullptr, values.data(), 10, &out);
}

__global__ void writes_shared_at(int at, int *out) {
  __shared__ int held[32];
  held[at] = 1;
  *out = held[at / 2];
}

static void test_out_of_shared_bounds() {
  int out;
  FM_LAUNCH(writes_shared_at, 1, 1, nullptr, 32, &out);
}

/* After a barrier, so on a fiber that was left and entered again. */
__global__ void writes_own_at(int at, int *out) {
  int own[8] = {0};
  __syncthreads();
  static_cast<volatile int *>(own)[at] = 1;
  out[threadIdx.x] = static_cast<volatile int *>(own)[threadIdx.x % 8];
}

static void test_out_of_stack_bounds() {
  int out[2];
  FM_LAUNCH(writes_own_at, 1, 2, nullptr, 8, out);
}

int main(int argc, char **argv) {
  const struct {
    const char *name;
    void (*run)();
  } tests[] = {{"right_kernel", test_right_kernel},
               {"races_show_in_results", test_races_show_in_results},
               {"races_are_found", test_races_are_found},
               {"omitted_barriers", test_omitted_barriers},
               {"shared_memory_is_undefined", test_shared_memory_is_undefined},
               {"divergence", test_divergence},
               {"shuffles", test_shuffles},
               {"arguments_are_copied", test_arguments_are_copied},
               {"orders", test_orders},
               {"order_from_environment", test_order_from_environment},
               {"wrong_environment", test_wrong_environment},
               {"launches", test_launches},
               {"out_of_bounds", test_out_of_bounds},
               {"out_of_shared_bounds", test_out_of_shared_bounds},
               {"out_of_stack_bounds", test_out_of_stack_bounds}};
  for (const auto &test : tests) {
    if (argc == 2 && strcmp(argv[1], test.name) == 0) {
      test.run();
      return fm_failures == 0 ? 0 : 1;
    }
  }
  fputs("give the name of one test\n", stderr);
  return 2;
}
