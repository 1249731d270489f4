/* Finds accesses of two CUDA threads to one address that nothing orders. A missing __syncthreads is found whatever the
 * order in which the emulator runs the threads, and whether or not the result comes out wrong.
 *
 * The kernels are compiled with -fsanitize=thread, which makes the compiler call __tsan_read4(address) and the like for
 * every access to memory. They are linked with this file in place of ThreadSanitizer's own library, whose model is
 * another one (host threads, locks). CUDA's is simple: two accesses of one launch, at least one of them a write, are
 * ordered if one thread makes both, or if a barrier of their common block lies between; blocks are never ordered, and a
 * shuffle orders no memory. Time is cut into intervals at launches, blocks and barriers. As blocks run one after
 * another, comparing the intervals of two accesses tells all of that. */
#include "race_check.h"

#include <stdio.h>

#include <array>
#include <memory>
#include <unordered_map>

#include "emu_control.h"

namespace {

/* What happened to one byte. Interval 0: nothing yet. */
struct history {
  uint32_t write, read, first_read; /* intervals: of the last write, the last read, the first read of the launch */
  uint16_t writer, reader;          /* threads; several readers in the same interval are `many` */
};
constexpr uint16_t many = UINT16_MAX;

constexpr uintptr_t page_size = 4096;
constexpr size_t most_pages = 2048; /* of 64 KiB each: beyond it a launch starts with an empty table */
typedef std::array<history, page_size> page;

struct {
  bool instrumented, active;
  fm_race_range stacks, shared;
  int64_t block;
  uint16_t thread;
  uint32_t now, block_start, launch_start; /* intervals */
  std::unordered_map<uintptr_t, std::unique_ptr<page>> pages;
  page *last; /* the page that was asked for last, and its number: most accesses stay in it */
  uintptr_t last_number;
  char message[256];
} state;

history &history_in_table(uintptr_t address) {
  const uintptr_t number = address / page_size;
  if (state.last == nullptr || number != state.last_number) {
    std::unique_ptr<page> &slot = state.pages[number];
    if (slot == nullptr) {
      slot = std::make_unique<page>();
    }
    state.last = slot.get();
    state.last_number = number;
  }
  return (*state.last)[address % page_size];
}

bool is_in(fm_race_range range, uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(range.begin) < static_cast<uintptr_t>(range.end - range.begin);
}

bool is_other_block(uint32_t interval) { return interval >= state.launch_start && interval < state.block_start; }

/* Shared memory's past ends where its block begins. */
history &history_of(uintptr_t address) {
  history &h = history_in_table(address);
  if (is_in(state.shared, address) && h.write < state.block_start && h.read < state.block_start) {
    h = history();
  }
  return h;
}

/* Whether an access in this interval by this thread (or several) races with one by the running thread now. */
bool is_unordered(uint32_t interval, uint16_t thread) {
  return is_other_block(interval) || (interval == state.now && thread != state.thread);
}

void report(const char *access, uintptr_t address, const char *earlier, uint32_t interval, uint16_t thread) {
  if (state.message[0] != '\0') {
    return;
  }
  char other[64];
  snprintf(other, sizeof other, thread == many ? "several threads" : "thread %u", thread);
  snprintf(state.message, sizeof state.message, "race: thread %u of block %lld %s %#llx, which %s of %s %s, unordered",
           state.thread, (long long)state.block, access, (unsigned long long)address, other,
           is_other_block(interval) ? "another block" : "the same block", earlier);
}

void read_byte(uintptr_t address) {
  history &h = history_of(address);
  if (is_unordered(h.write, h.writer)) {
    report("reads", address, "wrote", h.write, h.writer);
  }
  h.reader = h.read == state.now && h.reader != state.thread ? many : state.thread;
  h.read = state.now;
  h.first_read = h.first_read < state.launch_start ? state.now : h.first_read;
}

void write_byte(uintptr_t address) {
  history &h = history_of(address);
  if (is_unordered(h.write, h.writer)) {
    report("writes", address, "wrote", h.write, h.writer);
  } else if (is_unordered(h.read, h.reader)) {
    report("writes", address, "read", h.read, h.reader);
  } else if (is_other_block(h.first_read)) {
    report("writes", address, "read", h.first_read, many);
  }
  h.write = state.now;
  h.writer = state.thread;
}

void access(const void *at, size_t size, void (*byte)(uintptr_t)) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  if (!state.active || is_in(state.stacks, address)) {
    return;
  }
  for (size_t i = 0; i < size; i++) {
    byte(address + i);
  }
}

}  // namespace

void fm_race_begin_launch(fm_race_range stacks, fm_race_range shared) {
  if (state.pages.size() > most_pages) {
    state.pages.clear();
    state.last = nullptr;
  }
  state.stacks = stacks;
  state.shared = shared;
  state.message[0] = '\0';
  state.launch_start = state.now + 1;
  state.active = state.instrumented;
}

void fm_race_begin_block(int64_t block) {
  state.block = block;
  state.block_start = ++state.now;
}

void fm_race_barrier(void) { state.now++; }

void fm_race_end_launch(void) { state.active = false; }

void fm_race_switch_to(unsigned thread) { state.thread = static_cast<uint16_t>(thread); }

const char *fm_race_found(void) { return state.message[0] == '\0' ? nullptr : state.message; }

bool fm_emu_checks_races(void) { return state.instrumented; }

/* ---- what the compiler calls; instrumented files call __tsan_init when they are loaded ---- */

extern "C" {

void __tsan_init(void) { state.instrumented = true; }
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}

#define FM_RACE_HOOKS(size)                                                   \
  void __tsan_read##size(void *at) { access(at, size, read_byte); }           \
  void __tsan_write##size(void *at) { access(at, size, write_byte); }         \
  void __tsan_unaligned_read##size(void *at) { access(at, size, read_byte); } \
  void __tsan_unaligned_write##size(void *at) { access(at, size, write_byte); }
FM_RACE_HOOKS(1)
FM_RACE_HOOKS(2)
FM_RACE_HOOKS(4)
FM_RACE_HOOKS(8)
FM_RACE_HOOKS(16)
void __tsan_read_range(void *at, size_t size) { access(at, size, read_byte); }
void __tsan_write_range(void *at, size_t size) { access(at, size, write_byte); }
}
