/* The emulator's scheduler: fibers for the threads of one block, rounds between the points where they meet. */
#include "cuda_emu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "race_check.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

fm_emu_index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr int warp_size = 32;
constexpr int most_threads = 1024;          /* of a block, as on every GPU */
constexpr int64_t most_blocks = 2147483647; /* of a grid */
constexpr size_t page_size = 4096;
constexpr size_t stack_size = 64 * page_size; /* 32 KiB of arguments, and room for a sanitizer's frames */

/* ---- errors: the first one is kept, and nothing runs until it is asked for ---- */

char pending_error[512];

__attribute__((format(printf, 1, 2))) void fail(const char *format, ...) {
  if (pending_error[0] == '\0') {
    va_list values;
    va_start(values, format);
    vsnprintf(pending_error, sizeof pending_error, format, values);
    va_end(values);
  }
}

/* ---- fibers: each runs one CUDA thread after another, until one has to wait ---- */

/* Where to go on. ucontext starts a fiber, but its swapcontext saves the signal mask too, by two system calls that take
 * half of the emulator's time; the compiler's own jumps do without. */
typedef void *resume_point[5];

struct fiber {
  char *stack;
  bool started;
  resume_point left;
  void *fake_stack; /* AddressSanitizer's */
};

char *stacks; /* most_threads of them, each above a page that faults */
std::vector<fiber> fibers;
std::vector<fiber *> idle;
fiber *running;
resume_point scheduler;
void *scheduler_fake_stack;
const void *scheduler_stack;
size_t scheduler_stack_size;

/* Tells AddressSanitizer which stack comes next, and that it is there. */
void before_switch(void **fake_stack, const void *stack, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, stack, size);
#else
  (void)fake_stack, (void)stack, (void)size;
#endif
}

void after_switch(void *fake_stack, const void **old_stack, size_t *old_size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, old_stack, old_size);
#else
  (void)fake_stack, (void)old_stack, (void)old_size;
#endif
}

void make_fibers() {
  const size_t step = stack_size + page_size;
  stacks = static_cast<char *>(mmap(nullptr, most_threads * step, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0));
  if (stacks == MAP_FAILED) {
    fputs("CUDA emulator: no memory for stacks\n", stderr);
    abort();
  }
  fibers.resize(most_threads);
  for (int i = most_threads - 1; i >= 0; i--) {
    mprotect(stacks + i * step, page_size, PROT_NONE);
    fibers[i].stack = stacks + i * step + page_size;
    idle.push_back(&fibers[i]);
  }
}

void run_threads();

void fiber_main() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_size);
  run_threads();
}

/* Not instrumented: AddressSanitizer takes a jump for the end of frames that are in fact only left for a while. */
__attribute__((noipa, no_sanitize_address)) void go_on(resume_point at) { __builtin_longjmp(at, 1); }

/* Never returns, and leaves nothing behind on the scheduler's stack. */
void start(fiber *f) {
  static ucontext_t context;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(f->stack, stack_size); /* an abandoned thread may have left its frames marked */
#endif
  f->started = true;
  getcontext(&context);
  context.uc_stack.ss_sp = f->stack;
  context.uc_stack.ss_size = stack_size;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

/* noipa: by the time that these two return, all registers are another's. */
__attribute__((noipa)) void enter(fiber *f) {
  running = f;
  before_switch(&scheduler_fake_stack, f->stack, stack_size);
  if (__builtin_setjmp(scheduler) == 0) {
    f->started ? go_on(f->left) : start(f);
  }
  after_switch(scheduler_fake_stack, nullptr, nullptr);
}

__attribute__((noipa)) void leave() {
  before_switch(&running->fake_stack, scheduler_stack, scheduler_stack_size);
  if (__builtin_setjmp(running->left) == 0) {
    go_on(scheduler);
  }
  after_switch(running->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

/* ---- the order of blocks and threads ---- */

struct {
  enum { forward, reverse, random } kind;
  std::mt19937_64 generator;
} order;

void put_in_order(std::vector<int> *ids) {
  if (order.kind == order.reverse) {
    std::reverse(ids->begin(), ids->end());
  } else if (order.kind == order.random) {
    std::shuffle(ids->begin(), ids->end(), order.generator);
  }
}

/* ---- shared memory ---- */

extern "C" {
/* The linker's names for the bounds of the section. No such section, no such names: no kernel has shared memory. */
extern char __start_fm_emu_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_fm_emu_shared[] __attribute__((weak, visibility("hidden")));
}

/* To not-a-number, whatever type it is read as. */
void fill_shared_memory() {
  if (__start_fm_emu_shared != nullptr) {
    memset(__start_fm_emu_shared, 0xff, static_cast<size_t>(__stop_fm_emu_shared - __start_fm_emu_shared));
  }
}

/* ---- one block ---- */

enum thread_state { not_started, runnable, at_barrier, at_shuffle, ended };

struct thread {
  thread_state state;
  fm_emu_site site; /* where it waits */
  fiber *on;
  unsigned mask, by; /* of a shuffle */
  double value;      /* goes in, and comes out */
};

struct {
  const char *kernel;
  fm_emu_body *body;
  const void *call;
  std::vector<thread> threads;
  std::vector<int> order;
  size_t next; /* in order: the first thread that has not started */
  int current;
} block;

bool omit_barriers;
int64_t launches;

void become(int id) {
  block.current = id;
  threadIdx.x = static_cast<unsigned>(id);
  fm_race_switch_to(threadIdx.x);
}

/* What every fiber does: a thread that waits is left in the middle, and another fiber goes on with the rest. Most
 * kernels never wait, and one fiber runs the whole block. */
void run_threads() {
  for (;;) {
    while (block.next < block.order.size()) {
      const int id = block.order[block.next++];
      block.threads[id].on = running;
      become(id);
      block.body(block.call);
      block.threads[id].state = ended;
    }
    idle.push_back(running);
    leave();
  }
}

void wait(thread_state state, fm_emu_site site) {
  thread *t = &block.threads[block.current];
  t->state = state;
  t->site = site;
  leave();
}

bool same_site(const fm_emu_site &a, const fm_emu_site &b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

std::string doing(int id) {
  const thread &t = block.threads[id];
  if (t.state == ended) {
    return "has ended";
  }
  const char *file = strrchr(t.site.file, '/');
  return (t.state == at_barrier ? "waits at the barrier of " : "waits in the shuffle of ") +
         std::string(file != nullptr ? file + 1 : t.site.file) + ":" + std::to_string(t.site.line);
}

void fail_divergent(const char *what, int a, int b) {
  fail("%s: divergent %s: thread %d of block %u %s and thread %d %s", block.kernel, what, a, blockIdx.x,
       doing(a).c_str(), b, doing(b).c_str());
}

/* Whether all lanes of this thread's mask wait in the same shuffle as it. */
bool is_complete_shuffle(int id) {
  const thread &t = block.threads[id];
  const int first = id / warp_size * warp_size, count = static_cast<int>(block.threads.size());
  for (int lane = 0; lane < warp_size; lane++) {
    if ((t.mask >> lane & 1u) == 0) {
      continue;
    }
    if (first + lane >= count) {
      fail("%s: a shuffle's mask names lane %d, but the block has %d threads", block.kernel, lane, count);
      return false;
    }
    const thread &other = block.threads[first + lane];
    if (other.state != at_shuffle || !same_site(other.site, t.site) || other.mask != t.mask) {
      fail_divergent("shuffle", id, first + lane);
      return false;
    }
  }
  if ((t.mask >> (id - first) & 1u) == 0) {
    fail("%s: thread %d is in a shuffle whose mask leaves it out", block.kernel, id);
    return false;
  }
  return true;
}

/* Exchanges values in every warp that waits in a shuffle; the number of threads that can go on, or -1. */
int finish_shuffles() {
  const int count = static_cast<int>(block.threads.size());
  std::vector<double> values(count);
  int released = 0;
  for (int id = 0; id < count; id++) {
    if (block.threads[id].state == at_shuffle && !is_complete_shuffle(id)) {
      return -1;
    }
    values[id] = block.threads[id].value;
  }
  for (int id = 0; id < count; id++) {
    thread &t = block.threads[id];
    if (t.state != at_shuffle) {
      continue;
    }
    const unsigned lane = static_cast<unsigned>(id % warp_size), from = lane + t.by;
    if (t.by < warp_size && from < warp_size) { /* beyond the warp a lane keeps its own value */
      if ((t.mask >> from & 1u) == 0) {
        fail("%s: thread %d reads lane %u, which its mask leaves out", block.kernel, id, from);
        return -1;
      }
      t.value = values[id + static_cast<int>(t.by)];
    }
    t.state = runnable;
    released++;
  }
  return released;
}

/* Opens the barrier at which all threads wait; false if one of them is elsewhere. */
bool open_barrier() {
  for (size_t id = 1; id < block.threads.size(); id++) {
    if (block.threads[id].state != block.threads[0].state ||
        !same_site(block.threads[id].site, block.threads[0].site)) {
      fail_divergent("barrier", 0, static_cast<int>(id));
      return false;
    }
  }
  for (thread &t : block.threads) {
    t.state = runnable;
  }
  fm_race_barrier();
  return true;
}

/* Every thread has ended or waits: lets those go on that may. False if the block is done, or can do no more. */
bool release() {
  const auto has_ended = [](const thread &t) { return t.state == ended; };
  if (std::all_of(block.threads.begin(), block.threads.end(), has_ended)) {
    return false;
  }
  const int released = finish_shuffles();
  return released > 0 || (released == 0 && open_barrier());
}

void run_block(int64_t threads) {
  fill_shared_memory();
  fm_race_begin_block(blockIdx.x);
  block.threads.assign(static_cast<size_t>(threads), thread());
  block.order.resize(static_cast<size_t>(threads));
  std::iota(block.order.begin(), block.order.end(), 0);
  put_in_order(&block.order);
  block.next = 0;
  while (block.next < block.order.size()) {
    fiber *f = idle.back();
    idle.pop_back();
    enter(f);
  }
  while (release()) {
    std::vector<int> ids(static_cast<size_t>(threads));
    std::iota(ids.begin(), ids.end(), 0);
    put_in_order(&ids);
    for (const int id : ids) {
      if (block.threads[id].state == runnable) {
        become(id);
        enter(block.threads[id].on);
      }
    }
  }
  for (thread &t : block.threads) { /* after an error: its frames are forgotten */
    if (t.state != ended) {
      t.on->started = false;
      idle.push_back(t.on);
    }
  }
}

/* A wrong value is the first launch's error. */
const bool environment_is_read = [] {
  const char *wanted = getenv("FM_EMU_ORDER");
  if (wanted != nullptr && !fm_emu_set_order(wanted)) {
    fail("FM_EMU_ORDER: '%s' is none of forward, reverse, random, random:SEED", wanted);
  }
  return true;
}();

}  // namespace

/* ---- what kernels call ---- */

void fm_emu_barrier(fm_emu_site site) {
  if (!omit_barriers) {
    wait(at_barrier, site);
  }
}

double fm_emu_shuffle_down(fm_emu_site site, unsigned mask, double value, unsigned by) {
  thread *t = &block.threads[block.current];
  t->mask = mask;
  t->by = by;
  t->value = value;
  wait(at_shuffle, site);
  return t->value;
}

/* ---- what the host calls ---- */

void fm_emu_run(const char *kernel, int64_t blocks, int64_t threads, fm_emu_body *body, const void *call) {
  if (blocks < 1 || blocks > most_blocks || threads < 1 || threads > most_threads) {
    fail("%s: no GPU launches %lld blocks of %lld threads", kernel, (long long)blocks, (long long)threads);
  }
  if (pending_error[0] != '\0') {
    return;
  }
  if (fibers.empty()) {
    make_fibers();
  }
  launches++;
  block.kernel = kernel;
  block.body = body;
  block.call = call;
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  std::vector<int> ids(static_cast<size_t>(blocks));
  std::iota(ids.begin(), ids.end(), 0);
  put_in_order(&ids);
  fm_race_begin_launch({stacks, stacks + most_threads * (stack_size + page_size)},
                       {__start_fm_emu_shared, __stop_fm_emu_shared});
  for (size_t i = 0; i < ids.size() && pending_error[0] == '\0'; i++) {
    blockIdx.x = static_cast<unsigned>(ids[i]);
    run_block(threads);
    if (fm_race_found() != nullptr) {
      fail("%s: %s", kernel, fm_race_found());
    }
  }
  fm_race_end_launch();
}

const char *fm_launch_error(void) {
  static char reported[sizeof pending_error];
  memcpy(reported, pending_error, sizeof reported);
  pending_error[0] = '\0';
  return reported[0] == '\0' ? nullptr : reported;
}

bool fm_emu_set_order(const char *name) {
  const std::string wanted = name;
  char *end = nullptr;
  const unsigned long long seed = wanted.rfind("random:", 0) == 0 ? strtoull(name + 7, &end, 10) : 0;
  if (wanted == "forward") {
    order.kind = order.forward;
  } else if (wanted == "reverse") {
    order.kind = order.reverse;
  } else if (wanted == "random" || (end != nullptr && end != name + 7 && *end == '\0')) {
    order.kind = order.random;
    order.generator.seed(seed);
  } else {
    return false;
  }
  return true;
}

void fm_emu_omit_barriers(bool omit) { omit_barriers = omit; }

int64_t fm_emu_launches(void) { return launches; }
