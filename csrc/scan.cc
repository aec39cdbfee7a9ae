// How a (B, L, P) scan is cut into sweeps, and who runs them.
//
// Time is cut into blocks that stay in a core's cache. With many rows each row is one task that sweeps its blocks in
// order. With few rows a block is a task: it folds the block to its final state from zero, waits for the state that
// enters the block, hands on the state that leaves it, and only then sweeps the block again, from cache, to write x.
// Tasks are taken from one counter in time order, so whoever waits, waits for a task that is already running. The cut
// depends on the shape alone, hence so do the bits of the result.
#include "scan.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "scan_sweep.h"

namespace s5eqx {
namespace {

constexpr int64_t kBlockBytes = 128 << 10;    // of one operand: two or three such blocks fit a core's L2 cache
constexpr int64_t kSerialScalars = 32 << 10;  // below this a second thread costs more than it brings
constexpr int64_t kManyRows = 8;              // as many rows keep the usual number of cores busy

const Sweeps& pick_sweeps() {
#if defined(S5EQX_X86)
  const char* wish = std::getenv("S5EQX_CPU_ISA");  // for tests: the name of a lesser instruction set
  const auto may = [&](const Sweeps& s) { return !wish || std::strcmp(wish, s.name) == 0; };
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && may(sweeps_v4))
    return sweeps_v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      may(sweeps_v3))
    return sweeps_v3;
#endif
  return sweeps_generic;
}

const Sweeps& sweeps() {
  static const Sweeps& chosen = pick_sweeps();
  return chosen;
}

void sweep(const ForwardSweep<float>& k, bool c) { sweeps().forward_f32(k, c); }
void sweep(const ForwardSweep<double>& k, bool c) { sweeps().forward_f64(k, c); }
void sweep(const BackwardSweep<float>& k, bool c) { sweeps().backward_f32(k, c); }
void sweep(const BackwardSweep<double>& k, bool c) { sweeps().backward_f64(k, c); }

// out = m * s + r, elementwise. Where s = 0 it is r, also if m, the power of a growing multiplier, is infinite.
void multiply_add(const double* m, const double* s, const double* r, double* out, int64_t width, bool is_complex) {
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

bool any(const uint8_t* flags, int64_t step, int64_t count) {
  for (int64_t i = 0; flags && i < count; ++i)
    if (flags[i * step]) return true;
  return false;
}

// Steps numbered in the order of a sweep: `at(i)` is the time of step i.
struct Order {
  int64_t length;
  bool descending;
  int64_t at(int64_t i) const { return descending ? length - 1 - i : i; }
  int64_t sign() const { return descending ? -1 : 1; }
};

// Runs `sweep_block(row, block, in, out)`, which sweeps a block from state `in` to state `out`, over every block of
// every row. `enter(row, in)` gives the state that a row starts from. `fold(row, block, last, product)` gives a block's
// final state from zero and the product of its multipliers; it returns false where a reset keeps the entering state
// from the end.
struct Plan {
  int64_t batch, width, blocks;
  bool is_complex;
  int64_t scalars;

  bool by_block() const { return batch < kManyRows && blocks > 1; }

  template <typename Enter, typename Fold, typename Sweep>
  void run(const Parallel& parallel, Enter enter, Fold fold, Sweep sweep_block) const {
    const int64_t tasks = by_block() ? batch * blocks : batch;
    std::vector<double> scratch(tasks * 2 * width);  // here, so that no task allocates and hence none throws
    if (!by_block()) {
      each(parallel, tasks, [&](int64_t row) {
        double* in = scratch.data() + row * 2 * width;
        double* out = in + width;
        enter(row, in);
        for (int64_t block = 0; block < blocks; ++block) {
          sweep_block(row, block, in, out);
          std::swap(in, out);
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
    each(parallel, tasks, [&](int64_t task) {
      const int64_t row = task % batch, block = task / batch;
      double* const carry = carries.data() + (row * blocks + block) * width;
      double* const last = scratch.data() + task * 2 * width;
      double* const product = last + width;
      const bool hands_on = block + 1 < blocks;
      const bool through = hands_on && fold(row, block, last, product);
      for (int spin = 0; ready[row].load(std::memory_order_acquire) <= block; ++spin)
        if (spin > 64) std::this_thread::yield();
      if (hands_on) {
        if (through)
          multiply_add(product, carry, last, carry + width, width, is_complex);
        else
          std::copy_n(last, width, carry + width);
        ready[row].store(block + 2, std::memory_order_release);
      }
      sweep_block(row, block, carry, last);
    });
  }

  // Hands out tasks 0, 1, … in order to whoever is free; returns when all are done. A helper that the pool starts too
  // late finds none left and touches nothing but the counters.
  template <typename Task>
  void each(const Parallel& parallel, int64_t tasks, Task task) const {
    if (tasks == 1 || scalars < kSerialScalars) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    struct Counters {
      std::atomic<int64_t> next{0}, done{0};
    };
    const auto counters = std::make_shared<Counters>();
    const auto work = [counters, tasks, &task] {
      for (int64_t i; (i = counters->next.fetch_add(1)) < tasks;) {
        task(i);
        counters->done.fetch_add(1, std::memory_order_release);
      }
    };
    try {
      parallel(tasks - 1, work);
    } catch (const std::exception&) {  // no memory to start helpers with: those that run are enough
    }
    work();
    while (counters->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
  }
};

template <typename T>
int64_t steps_a_block(int64_t width) {
  return std::max<int64_t>(16, kBlockBytes / (width * static_cast<int64_t>(sizeof(T))));
}

// The product of a block's multipliers, row by row, for a time-invariant a and more than one block; else empty.
template <typename T>
std::vector<double> block_powers(const ScanShape& s, const T* a, int64_t steps, bool conjugate) {
  if (s.a_time != 0 || s.length <= steps) return {};
  std::vector<double> powers(s.batch * s.width);
  for (int64_t row = 0; row < s.batch; ++row)
    power(a + row * s.a_batch, steps, conjugate, powers.data() + row * s.width, s.width, s.is_complex);
  return powers;
}

template <typename T>
T* offset(T* p, int64_t n) {
  return p ? p + n : nullptr;
}

}  // namespace

const char* instruction_set() { return sweeps().name; }

template <typename T>
void scan_forward(const ScanShape& s, const ForwardArrays<T>& k, const Parallel& parallel) {
  if (s.length == 0 && k.last) std::copy_n(k.x0, s.batch * s.width, k.last);
  if (s.batch == 0 || s.length == 0 || s.width == 0) return;
  const Order order{s.length, s.reverse};
  const int64_t steps = steps_a_block<T>(s.width), step = order.sign() * s.width;
  const Plan plan{s.batch, s.width, (s.length + steps - 1) / steps, s.is_complex, s.batch * s.length * s.width};

  const auto block_sweep = [&](int64_t row, int64_t block) {
    const int64_t first = block * steps, t = order.at(first);
    ForwardSweep<T> f{};
    f.a = k.a + row * s.a_batch + t * s.a_time;
    f.a_step = order.sign() * s.a_time;
    f.b = k.b + (row * s.length + t) * s.width;
    f.step = step;
    f.reset = offset(k.reset, row * s.reset_batch + t);
    f.reset_step = order.sign();
    f.count = std::min(steps, s.length - first);
    f.width = s.width;
    return f;
  };
  const std::vector<double> powers = block_powers(s, k.a, steps, /*conjugate=*/false);
  const std::vector<double> zero(s.width, 0.0);

  plan.run(
      parallel, [&](int64_t row, double* in) { std::copy_n(k.x0 + row * s.width, s.width, in); },
      [&](int64_t row, int64_t block, double* last, double* product) {
        ForwardSweep<T> f = block_sweep(row, block);
        f.in = zero.data();
        f.out = last;
        f.product = product;
        sweep(f, s.is_complex);
        if (s.a_time == 0) std::copy_n(powers.data() + row * s.width, s.width, product);
        return !any(f.reset, f.reset_step, f.count);
      },
      [&](int64_t row, int64_t block, const double* in, double* out) {
        const bool ends = block + 1 == plan.blocks;
        if (!k.x && !ends && plan.by_block()) return;  // the fold has handed on all there is to know
        ForwardSweep<T> f = block_sweep(row, block);
        f.x = offset(k.x, f.b - k.b);
        f.in = in;
        f.out = out;
        sweep(f, s.is_complex);
        if (k.last && ends) std::copy_n(out, s.width, k.last + row * s.width);
      });
}

template <typename T>
void scan_backward(const ScanShape& s, const BackwardArrays<T>& k, const Parallel& parallel) {
  const bool time_varying = s.a_time != 0;
  const int64_t row_da = time_varying ? s.length * s.width : s.width;
  if (s.length == 0) {  // x is empty: nothing depends on a or x0
    std::fill_n(k.da, s.batch * row_da, T(0));
    std::fill_n(k.dx0, s.batch * s.width, T(0));
  }
  if (s.batch == 0 || s.length == 0 || s.width == 0) return;
  const Order order{s.length, !s.reverse};
  const int64_t steps = steps_a_block<T>(s.width), sign = order.sign();
  const Plan plan{s.batch, s.width, (s.length + steps - 1) / steps, s.is_complex, s.batch * s.length * s.width};

  const std::vector<double> powers = block_powers(s, k.a, steps, k.conjugate);
  std::vector<double> sums(time_varying ? 0 : s.batch * plan.blocks * 2 * s.width);
  std::vector<double> first_lambda(s.batch * s.width);
  const std::vector<double> zero(s.width, 0.0);

  plan.run(
      parallel, [&](int64_t, double* in) { std::fill_n(in, s.width, 0.0); },
      [&](int64_t row, int64_t block, double* last, double* product) {
        const int64_t first = block * steps, t = order.at(first);
        ForwardSweep<T> f{};
        f.a = k.a + row * s.a_batch + (t - sign) * s.a_time;
        f.a_step = sign * s.a_time;
        f.b = k.g + (row * s.length + t) * s.width;
        f.step = sign * s.width;
        f.reset = offset(k.reset, row * s.reset_batch + t - sign);
        f.reset_step = sign;
        f.count = std::min(steps, s.length - first);
        f.width = s.width;
        f.fresh = block == 0;
        f.conjugate = k.conjugate;
        f.in = zero.data();
        f.out = last;
        f.product = product;
        sweep(f, s.is_complex);
        if (!time_varying) std::copy_n(powers.data() + row * s.width, s.width, product);
        return !f.fresh && !any(f.reset, f.reset_step, f.count);
      },
      [&](int64_t row, int64_t block, const double* in, double* out) {
        const int64_t first = block * steps, t = order.at(first), at = (row * s.length + t) * s.width;
        BackwardSweep<T> b{};
        b.a = k.a + row * s.a_batch + t * s.a_time;
        b.a_step = sign * s.a_time;
        b.g = k.g + at;
        b.x = k.x + at;
        b.lambda = k.lambda + at;
        b.da = time_varying ? k.da + at : nullptr;
        b.da_sum = time_varying ? nullptr : sums.data() + (row * plan.blocks + block) * 2 * s.width;
        b.step = sign * s.width;
        b.reset = offset(k.reset, row * s.reset_batch + t);
        b.reset_step = sign;
        b.count = std::min(steps, s.length - first);
        b.width = s.width;
        b.fresh = block == 0;
        b.conjugate = k.conjugate;
        b.x_last = block + 1 == plan.blocks ? k.x0 + row * s.width : nullptr;
        b.in = in;
        b.out = out;
        sweep(b, s.is_complex);
        if (block + 1 == plan.blocks) std::copy_n(out, s.width, first_lambda.data() + row * s.width);
      });

  const int64_t t0 = order.at(s.length - 1);  // the first step of the recurrence
  std::vector<double> multiplier(s.width), dx0(s.width), total(2 * s.width);
  for (int64_t row = 0; row < s.batch; ++row) {
    power(k.a + row * s.a_batch + t0 * s.a_time, 1, k.conjugate, multiplier.data(), s.width, s.is_complex);
    multiply_add(multiplier.data(), first_lambda.data() + row * s.width, zero.data(), dx0.data(), s.width,
                 s.is_complex);
    const bool dropped = k.reset && k.reset[row * s.reset_batch + t0];
    for (int64_t p = 0; p < s.width; ++p) k.dx0[row * s.width + p] = dropped ? T(0) : static_cast<T>(dx0[p]);
    if (time_varying) continue;
    std::fill(total.begin(), total.end(), 0.0);  // block by block, in order
    for (int64_t block = 0; block < plan.blocks; ++block)
      for (int64_t p = 0; p < 2 * s.width; ++p) total[p] += sums[(row * plan.blocks + block) * 2 * s.width + p];
    T* const da = k.da + row * s.width;
    const double* const crossed = total.data() + s.width;
    const double sign_of_conjugate = k.conjugate ? -1.0 : 1.0;
    if (!s.is_complex)
      for (int64_t p = 0; p < s.width; ++p) da[p] = static_cast<T>(total[p]);
    else
      for (int64_t p = 0; p < s.width; p += 2) {
        da[p] = static_cast<T>(total[p] - sign_of_conjugate * total[p + 1]);
        da[p + 1] = static_cast<T>(crossed[p] + sign_of_conjugate * crossed[p + 1]);
      }
  }
}

template void scan_forward<float>(const ScanShape&, const ForwardArrays<float>&, const Parallel&);
template void scan_forward<double>(const ScanShape&, const ForwardArrays<double>&, const Parallel&);
template void scan_backward<float>(const ScanShape&, const BackwardArrays<float>&, const Parallel&);
template void scan_backward<double>(const ScanShape&, const BackwardArrays<double>&, const Parallel&);

}  // namespace s5eqx
