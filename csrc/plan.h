// How a recurrence over (B, L) is cut into blocks of time, and who runs them.
//
// Blocks stay in a core's cache. With many rows each row is one task that sweeps its blocks in order. With few rows a
// block is a task: it folds the block to its final state from zero, waits for the state that enters the block, hands on
// the state that leaves it, and only then sweeps the block again, from cache. Tasks are taken from one counter in time
// order, so whoever waits, waits for a task that is already running. The cut depends on the shape alone, hence so do
// the bits of the result.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "scan.h"

namespace s5eqx {

// Whether a result is so large that no cache keeps it for whoever reads it next: better written straight to memory,
// since a store into the cache reads the line first.
#if !defined(S5EQX_PAST_CACHE)  // the tests ask for less
#define S5EQX_PAST_CACHE (24 << 20)
#endif
template <typename T>
bool is_past_cache(int64_t scalars) {
  return scalars * static_cast<int64_t>(sizeof(T)) > S5EQX_PAST_CACHE;
}

// out = m * s + r, elementwise. Where s = 0 it is r, also if m, the power of a growing multiplier, is infinite.
inline void multiply_add(const double* m, const double* s, const double* r, double* out, int64_t width,
                         bool is_complex) {
  if (!is_complex) {
    for (int64_t p = 0; p < width; ++p) out[p] = s[p] == 0 ? r[p] : m[p] * s[p] + r[p];
    return;
  }
  for (int64_t p = 0; p < width; p += 2) {
    const bool zero = s[p] == 0 && s[p + 1] == 0;
    const double re = zero ? 0.0 : m[p] * s[p] - m[p + 1] * s[p + 1];
    const double im = zero ? 0.0 : m[p] * s[p + 1] + m[p + 1] * s[p];
    out[p] = re + r[p];
    out[p + 1] = im + r[p + 1];
  }
}

// a^n by squaring, in double: float squaring would be wrong by n rounding errors, always in the same direction.
template <typename T>
void power(const T* a, int64_t n, bool conjugate, double* out, int64_t width, bool is_complex) {
  const std::vector<double> zero(width, 0.0);
  std::vector<double> base(a, a + width), next(width);
  if (conjugate && is_complex)
    for (int64_t p = 1; p < width; p += 2) base[p] = -base[p];
  for (int64_t p = 0; p < width; ++p) out[p] = (is_complex && p % 2) ? 0.0 : 1.0;
  for (; n > 0; n >>= 1) {
    if (n & 1) {
      multiply_add(base.data(), out, zero.data(), next.data(), width, is_complex);
      std::copy(next.begin(), next.end(), out);
    }
    multiply_add(base.data(), base.data(), zero.data(), next.data(), width, is_complex);
    base.swap(next);
  }
}

inline bool any(const uint8_t* flags, int64_t step, int64_t count) {
  for (int64_t i = 0; flags && i < count; ++i)
    if (flags[i * step]) return true;
  return false;
}

template <typename T>
T* offset(T* p, int64_t n) {
  return p ? p + n : nullptr;
}

// Steps numbered in the order of a sweep: `at(i)` is the time of step i.
struct Order {
  int64_t length;
  bool descending;
  int64_t at(int64_t i) const { return descending ? length - 1 - i : i; }
  int64_t sign() const { return descending ? -1 : 1; }
};

// Runs, for every block of every row,
//
//   prepare(worker, row, block)          what needs no state
//   fold(worker, row, block, last, product)
//                                        where blocks are tasks: the block's final state from zero and the product of
//                                        its multipliers; false where a reset keeps the entering state from the end
//   sweep(worker, row, block, in, out)   from state `in` to state `out`
//
// after `enter(row, in)`, which gives the state that a row starts from. A block's calls are made by one worker, without
// another block's between them; `task_of` tells which task a block is part of. Tasks run their blocks in order.
struct Plan {
  int64_t batch, width, blocks;
  bool is_complex;
  bool serial = false;    // too little work for a second thread
  int64_t many_rows = 1;  // as many keep all cores busy
  int64_t rows_a_task = 1;

  bool by_block() const { return !serial && batch < many_rows && blocks > 1; }
  int64_t tasks() const { return by_block() ? batch * blocks : (batch + rows_a_task - 1) / rows_a_task; }
  int64_t task_of(int64_t row, int64_t block) const { return by_block() ? block * batch + row : row / rows_a_task; }
  int64_t workers(const Parallel& parallel, int64_t tasks) const {
    return serial ? 1 : std::min(tasks, parallel.helpers + 1);
  }

  template <typename Enter, typename Prepare, typename Fold, typename Sweep>
  void run(const Parallel& parallel, Enter enter, Prepare prepare, Fold fold, Sweep sweep) const {
    // Here, so that no task allocates and hence none throws.
    std::vector<double> scratch(workers(parallel, tasks()) * 2 * width);
    if (!by_block()) {
      each(parallel, tasks(), [&](int64_t worker, int64_t task) {
        double* in = scratch.data() + worker * 2 * width;
        double* out = in + width;
        for (int64_t row = task * rows_a_task; row < std::min(batch, (task + 1) * rows_a_task); ++row) {
          enter(row, in);
          for (int64_t block = 0; block < blocks; ++block) {
            prepare(worker, row, block);
            sweep(worker, row, block, in, out);
            std::swap(in, out);
          }
        }
      });
      return;
    }
    // carries[row][block] enters the block; ready counts the carries known of a row.
    std::vector<double> carries(batch * blocks * width);
    std::vector<std::atomic<int64_t>> ready(batch);
    for (int64_t row = 0; row < batch; ++row) {
      enter(row, carries.data() + row * blocks * width);
      ready[row].store(1);
    }
    each(parallel, tasks(), [&](int64_t worker, int64_t task) {
      const int64_t row = task % batch, block = task / batch;
      double* const carry = carries.data() + (row * blocks + block) * width;
      double* const last = scratch.data() + worker * 2 * width;
      double* const product = last + width;
      const bool hands_on = block + 1 < blocks;
      prepare(worker, row, block);
      const bool through = hands_on && fold(worker, row, block, last, product);
      for (int spin = 0; ready[row].load(std::memory_order_acquire) <= block; ++spin)
        if (spin > 64) std::this_thread::yield();
      if (hands_on) {
        if (through)
          multiply_add(product, carry, last, carry + width, width, is_complex);
        else
          std::copy_n(last, width, carry + width);
        ready[row].store(block + 2, std::memory_order_release);
      }
      sweep(worker, row, block, carry, last);
    });
  }

  // Hands out tasks 0, 1, … in order to whoever is free, as task(worker, i); returns when all are done. A helper that
  // the pool starts too late finds none left and touches nothing but the counters.
  template <typename Task>
  void each(const Parallel& parallel, int64_t tasks, Task task) const {
    if (tasks <= 1 || serial) {
      for (int64_t i = 0; i < tasks; ++i) task(0, i);
      return;
    }
    struct Counters {
      std::atomic<int64_t> workers{0}, next{0}, done{0};
    };
    const auto counters = std::make_shared<Counters>();
    const auto work = [counters, tasks, &task] {
      const int64_t worker = counters->workers.fetch_add(1);
      for (int64_t i; (i = counters->next.fetch_add(1)) < tasks;) {
        task(worker, i);
        counters->done.fetch_add(1, std::memory_order_release);
      }
    };
    try {
      parallel.start(std::min(tasks - 1, parallel.helpers), work);
    } catch (const std::exception&) {  // no memory to start helpers with: those that run are enough
    }
    work();
    while (counters->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
  }
};

}  // namespace s5eqx
