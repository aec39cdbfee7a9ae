// A host in the place of a GPU, for running the kernels of csrc/ where there is none: every thread is a fiber, and a
// scheduler runs the fibers from barrier to barrier in an order drawn at random, some warps ahead of others, so that a
// missing barrier, or a block that counts on another to be there, shows. It stops with a message where nobody can go
// on.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __launch_bounds__(...)
#define S5EQX_SHARED(type, name) type& name = *s5eqx::host::shared<type>()
#define S5EQX_DYNAMIC_SHARED(name) char* const name = s5eqx::host::dynamic_shared()

namespace s5eqx {
namespace host {

struct Schedule {
  int multiprocessors = 2;  // what a launch that leaves the size of its grid open is told
  int resident = 3;         // blocks that run at the same time
  unsigned seed = 0;
  enum Order { kRandom, kStubborn, kLastFirst } order = kRandom;  // which block runs next
};
inline Schedule schedule;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

// Where a stack was left. swapcontext asks the kernel for the signal mask every time, a jump does not; the address
// sanitizer, which follows swapcontext alone, gets swapcontext.
#if defined(__SANITIZE_ADDRESS__)
using Jump = ucontext_t;
inline void change(Jump& from, Jump& to) { swapcontext(&from, &to); }
#else
struct Jump {
  jmp_buf at;
};
inline void change(Jump& from, Jump& to) {
  if (!_setjmp(from.at)) _longjmp(to.at, 1);
}
#endif

struct Block;
struct Fiber {
  ucontext_t context;  // to begin with
  Jump here;           // to go on from
  bool begun;
  std::unique_ptr<char[]> stack;
  Block* block;
  unsigned thread;
  State state;
  bool paused;  // it waits for memory to change
  void* fake_stack;
};

struct Exchange {  // of one warp
  int arrived = 0;
  uint64_t given[32], taken[32];
};

struct Block {
  unsigned index;
  std::vector<Fiber> fibers;
  std::vector<Exchange> warps;
  int at_barrier = 0, done = 0;
  bool stuck = false;
  std::shared_ptr<void> memory;
};

constexpr size_t kStack = 128 << 10;
struct Index {
  unsigned x;
};
inline Index thread_index, block_index, grid_size;
inline Fiber* running;
inline Jump scheduler;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline void* scheduler_fake_stack;
inline std::function<void()> body;
inline bool changed;  // memory that others wait for

inline void begin_at(ucontext_t& context) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&scheduler, &context);
#else
  if (!_setjmp(scheduler.at)) setcontext(&context);
#endif
}

inline void leave([[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &running->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  Fiber* const self = running;
  change(self->here, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

inline void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body();
  running->state = State::kDone;
  ++running->block->done;
  leave(/*for_good=*/true);
}

inline void resume(Fiber& f, unsigned grid) {
  running = &f;
  thread_index = {f.thread};
  block_index = {f.block->index};
  grid_size = {grid};
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack.get(), kStack);
#endif
  if (f.begun) {
    change(scheduler, f.here);
  } else {
    f.begun = true;
    begin_at(f.context);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "host device: %s\n", why);
  std::_Exit(3);
}

// All of one block's threads get the same object, filled with rubbish.
template <typename T>
T* shared() {
  std::shared_ptr<void>& memory = running->block->memory;
  if (!memory) {
    memory = std::make_shared<T>();
    std::memset(memory.get(), 0xa5, sizeof(T));
  }
  return static_cast<T*>(memory.get());
}

inline int dynamic_bytes;  // that the launch asked for
inline char* dynamic_shared() {
  std::shared_ptr<void>& memory = running->block->memory;
  if (!memory) {
    memory.reset(new char[dynamic_bytes], std::default_delete<char[]>());
    std::memset(memory.get(), 0xff, dynamic_bytes);  // NaN
  }
  return static_cast<char*>(memory.get());
}

inline void barrier() {
  Block& b = *running->block;
  running->state = State::kAtBarrier;
  if (++b.at_barrier == static_cast<int>(b.fibers.size())) {
    b.at_barrier = 0;
    for (Fiber& f : b.fibers) f.state = State::kReady;
  }
  leave();
}

// Gives a word to the warp and takes that of another lane.
inline uint64_t exchange(uint64_t word, int from) {
  const int lane = running->thread % 32;
  Exchange& e = running->block->warps[running->thread / 32];
  e.given[lane] = word;
  running->state = State::kAtWarp;
  if (++e.arrived == 32) {
    e.arrived = 0;
    std::copy_n(e.given, 32, e.taken);
    Fiber* const first = &running->block->fibers[running->thread - lane];
    for (int i = 0; i < 32; ++i) first[i].state = State::kReady;
  }
  leave();
  return e.taken[from < 0 || from > 31 ? lane : from];
}

inline Block make_block(unsigned index, int threads) {
  Block b;
  b.index = index;
  b.fibers.resize(threads);
  b.warps.resize(threads / 32);
  return b;
}

inline void prepare(Fiber& f) {
  f.state = State::kReady;
  f.begun = false;
  if (!f.stack) f.stack.reset(new char[kStack]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, start, 0);
}

inline void begin(Block& b) {
  for (unsigned i = 0; i < b.fibers.size(); ++i) {
    b.fibers[i].block = &b;
    b.fibers[i].thread = i;
    prepare(b.fibers[i]);
  }
}

inline void run_grid(unsigned grid, int threads) {
  std::mt19937 random(schedule.seed);
  std::vector<std::unique_ptr<Block>> resident;
  unsigned started = 0;
  size_t current = 0;
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  const auto add = [&](std::unique_ptr<Block> b) {
    b->index = started++;
    b->done = 0;
    b->memory.reset();
    begin(*b);
    resident.push_back(std::move(b));
  };
  while (started < grid && static_cast<int>(resident.size()) < schedule.resident)
    add(std::make_unique<Block>(make_block(0, threads)));
  while (!resident.empty()) {
    if (std::all_of(resident.begin(), resident.end(), [](const auto& b) { return b->stuck; })) fail("deadlock");
    if (schedule.order == Schedule::kRandom || current >= resident.size() || resident[current]->stuck) {
      current = random() % resident.size();
      if (schedule.order == Schedule::kLastFirst) current = resident.size() - 1;
      while (resident[current]->stuck) current = (current + resident.size() - 1) % resident.size();
    }
    Block& b = *resident[current];
    std::shuffle(order.begin(), order.end(), random);
    const auto visit = [&](uint64_t warps) {
      bool progress = changed = false;
      for (const int i : order) {
        Fiber& f = b.fibers[i];
        if (f.state != State::kReady || !(warps >> (i / 32) & 1)) continue;
        f.paused = false;
        resume(f, grid);
        progress |= !f.paused;
      }
      return progress || changed;
    };
    const bool progress = visit(random()) || visit(~uint64_t{0});  // some warps, so that they run ahead of others
    b.stuck = !progress;
    if (progress)
      for (const auto& other : resident) other->stuck = false;
    if (b.done > 0 && b.at_barrier > 0 && b.done + b.at_barrier == threads)
      fail("a thread left while others wait for it");
    if (b.done == threads) {
      std::unique_ptr<Block> free = std::move(resident[current]);
      resident.erase(resident.begin() + static_cast<long>(current));
      if (started < grid) add(std::move(free));
    }
  }
}

}  // namespace host

#define threadIdx s5eqx::host::thread_index
#define blockIdx s5eqx::host::block_index
#define gridDim s5eqx::host::grid_size

using Stream = void*;
using Status = int;

inline void __syncthreads() { host::barrier(); }
inline uint64_t load_relaxed(const uint64_t* word) { return *word; }
inline void store_relaxed(uint64_t* word, uint64_t value) {
  *word = value;
  host::changed = true;
}
inline uint64_t fetch_add(uint64_t* word, uint64_t value) { return std::exchange(*word, *word + value); }
inline void pause() {
  host::running->paused = true;
  host::leave();
}

template <typename To, typename From>
To bit_copy(From x) {
  To y{};
  std::memcpy(&y, &x, std::min(sizeof x, sizeof y));
  return y;
}
inline float fused(float x, float y, float z) { return std::fma(x, y, z); }
inline double fused(double x, double y, double z) { return std::fma(x, y, z); }
inline uint64_t bits_of(double x) { return bit_copy<uint64_t>(x); }
inline double double_of(uint64_t bits) { return bit_copy<double>(bits); }

template <typename T>
T shuffle_up(T x, unsigned lanes) {
  return bit_copy<T>(
      host::exchange(bit_copy<uint64_t>(x), static_cast<int>(threadIdx.x % 32) - static_cast<int>(lanes)));
}
template <typename T>
T shuffle_down(T x, unsigned lanes) {
  return bit_copy<T>(host::exchange(bit_copy<uint64_t>(x), static_cast<int>(threadIdx.x % 32 + lanes)));
}
inline uint32_t ballot(bool x) {
  uint32_t all = 0;
  host::exchange(x, 0);
  const host::Exchange& e = host::running->block->warps[threadIdx.x / 32];
  for (int i = 0; i < 32; ++i) all |= static_cast<uint32_t>(e.taken[i] != 0) << i;
  return all;
}

constexpr bool kCompilesTf32 = true;
inline float float_of(uint32_t bits) { return bit_copy<float>(bits); }
inline uint32_t round_to_tf32(float x) {  // halves away from zero
  const uint32_t bits = bit_copy<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits & ~0x1fffu;
}
inline void multiply_tf32(float (&upper)[2], float (&lower)[2], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint64_t words[3][32];
  const uint64_t own[3] = {a[0] | uint64_t{a[1]} << 32, a[2] | uint64_t{a[3]} << 32, b[0] | uint64_t{b[1]} << 32};
  for (int i = 0; i < 3; ++i) {
    host::exchange(own[i], 0);
    std::copy_n(host::running->block->warps[threadIdx.x / 32].taken, 32, words[i]);
  }
  const auto half = [](uint64_t word, int i) {
    const uint32_t bits = static_cast<uint32_t>(word >> 32 * i);
    if (bits & 0x1fff) host::fail("an operand of a tensor core is not in TF32");
    return static_cast<double>(float_of(bits));
  };
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4;
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      float& c = i ? lower[j] : upper[j];
      double sum = c;
      for (int k = 0; k < 8; ++k)
        sum += half(words[k / 4][row * 4 + k % 4], i) * half(words[2][(lane % 4 * 2 + j) * 4 + k % 4], k / 4);
      c = static_cast<float>(sum);
    }
}

inline int multiprocessors() { return host::schedule.multiprocessors; }
template <typename Argument>
bool was_compiled_for_tf32(void (*)(Argument)) {
  return true;
}
inline Status fill_ones(void* memory, int64_t bytes, Stream) {
  std::memset(memory, 0xff, static_cast<size_t>(bytes));
  return 0;
}

template <typename Argument>
Status launch(void (*kernel)(Argument), int64_t blocks, int threads, Stream, Argument argument, int shared_bytes = 0) {
  host::dynamic_bytes = shared_bytes;
  host::body = [=] { kernel(argument); };
  host::run_grid(static_cast<unsigned>(blocks), threads);
  return 0;
}

}  // namespace s5eqx
