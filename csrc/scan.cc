// The scan on a CPU: a `Plan` of sweeps over blocks of time.
#include "scan.h"

#include <algorithm>
#include <vector>

#include "plan.h"
#include "scan_sweep.h"

namespace s5eqx {
namespace {

constexpr int64_t kBlockBytes = 128 << 10;    // of one operand: two or three such blocks fit a core's L2 cache
constexpr int64_t kManyRows = 8;              // as many rows keep the usual number of cores busy
constexpr int64_t kSerialScalars = 32 << 10;  // below this a second thread costs more than it brings
constexpr int64_t kTaskScalars = 4 << 10;     // below this a task costs more to hand out than to do

template <typename T>
int64_t steps_a_block(int64_t width) {
  return std::max<int64_t>(16, kBlockBytes / (width * static_cast<int64_t>(sizeof(T))));
}

// The product of a block's multipliers, row by row, for a time-invariant a where blocks are tasks; else empty.
template <typename T>
std::vector<double> block_powers(const ScanShape& s, const Plan& plan, const T* a, int64_t steps, bool conjugate) {
  if (s.a_time != 0 || !plan.by_block()) return {};
  std::vector<double> powers(s.batch * s.width);
  for (int64_t row = 0; row < s.batch; ++row)
    power(a + row * s.a_batch, steps, conjugate, powers.data() + row * s.width, s.width, s.is_complex);
  return powers;
}

Plan plan_of(const ScanShape& s, int64_t steps) {
  Plan plan{s.batch, s.width, (s.length + steps - 1) / steps, s.is_complex};
  plan.serial = s.batch * s.length * s.width < kSerialScalars;
  plan.many_rows = kManyRows;
  plan.rows_a_task = std::max<int64_t>(kTaskScalars / (s.length * s.width), 1);
  return plan;
}

const auto nothing = [](int64_t, int64_t, int64_t) {};

}  // namespace

template <typename T>
void scan_forward(const ScanShape& s, const ForwardArrays<T>& k, const Parallel& parallel) {
  if (s.length == 0 && k.last) std::copy_n(k.x0, s.batch * s.width, k.last);
  if (s.batch == 0 || s.length == 0 || s.width == 0) return;
  const Order order{s.length, s.reverse};
  const int64_t steps = steps_a_block<T>(s.width), step = order.sign() * s.width;
  const Plan plan = plan_of(s, steps);

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
  const std::vector<double> powers = block_powers(s, plan, k.a, steps, /*conjugate=*/false);
  const std::vector<double> zero(s.width, 0.0);

  plan.run(
      parallel, [&](int64_t row, double* in) { std::copy_n(k.x0 + row * s.width, s.width, in); }, nothing,
      [&](int64_t, int64_t row, int64_t block, double* last, double* product) {
        ForwardSweep<T> f = block_sweep(row, block);
        f.in = zero.data();
        f.out = last;
        f.product = product;
        sweep(f, s.is_complex);
        if (s.a_time == 0) std::copy_n(powers.data() + row * s.width, s.width, product);
        return !any(f.reset, f.reset_step, f.count);
      },
      [&](int64_t, int64_t row, int64_t block, const double* in, double* out) {
        const bool ends = block + 1 == plan.blocks;
        if (!k.x && !ends && plan.by_block()) return;  // the fold has handed on all there is to know
        ForwardSweep<T> f = block_sweep(row, block);
        f.x = offset(k.x, f.b - k.b);
        f.streams = is_past_cache<T>(s.batch * s.length * s.width);
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
  const Plan plan = plan_of(s, steps);

  const std::vector<double> powers = block_powers(s, plan, k.a, steps, k.conjugate);
  std::vector<double> sums(time_varying ? 0 : s.batch * plan.blocks * 2 * s.width);
  std::vector<double> first_lambda(s.batch * s.width);
  const std::vector<double> zero(s.width, 0.0);

  plan.run(
      parallel, [&](int64_t, double* in) { std::fill_n(in, s.width, 0.0); }, nothing,
      [&](int64_t, int64_t row, int64_t block, double* last, double* product) {
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
      [&](int64_t, int64_t row, int64_t block, const double* in, double* out) {
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
