// The state-space step on a CPU: a `Plan` of blocks whose states exist in a core's cache alone, between two small
// matrix products. The backward pass computes the states of a block again from the one kept before it.
#include "ssm.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "plan.h"
#include "product.h"
#include "scan_sweep.h"

namespace s5eqx {
namespace {

constexpr int64_t kBlockBytes = 640 << 10;      // of all that a block touches: it stays in a core's L2 cache
constexpr int64_t kMostSteps = 1024;            // so that there are blocks enough to share out
constexpr int64_t kSerialProducts = 256 << 10;  // fewer multiplications than this are not worth a second thread
constexpr int64_t kManyRows = 16;               // so many keep all cores busy; their sums of gradients stay small
constexpr int64_t kFewTasks = 4;                // so many at least, however large the sums
constexpr int64_t kFeatures = 16;               // of the final sums, that one worker takes

// A matrix (rows, columns), given by its strides, in the panels that `Product` wants on its right.
template <typename T>
class Panels {
 public:
  Panels(const T* from, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step)
      : rows_(rows), data_(rows * padded<T>(columns), T(0)) {
    const auto at = [&](int64_t i, int64_t j) {
      return &data_[(j / kPanel<T> * rows + i) * kPanel<T> + j % kPanel<T>];
    };
    if (column_step == 1)  // either way in the order of memory
      for (int64_t j = 0; j < columns; j += kPanel<T>)
        for (int64_t i = 0; i < rows; ++i)
          std::copy_n(from + i * row_step + j, std::min(kPanel<T>, columns - j), at(i, j));
    else
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < rows; ++i) *at(i, j) = from[i * row_step + j * column_step];
  }

  // c = a b, with a (m, rows) and c (m, n)
  Product<T> product(const T* a, int64_t a_step, int64_t m, int64_t n, T* c, int64_t c_step) const {
    Product<T> p{};
    p.m = m;
    p.n = n;
    p.k = rows_;
    p.a = a;
    p.a_step = a_step;
    p.b = data_.data();
    p.b_step = kPanel<T>;
    p.b_panel = rows_ * kPanel<T>;
    p.c = c;
    p.c_step = c_step;
    return p;
  }

 private:
  int64_t rows_;
  std::vector<T> data_;
};

// What both passes share: the sizes, how time is cut, and sweeps over blocks of states.
template <typename T>
struct Layer {
  const SsmShape& s;
  const SsmInputs<T>& in;
  const int64_t pairs = 2 * s.states, row = padded<T>(pairs);  // scalars of a state, and of its row in a block
  const int64_t steps, blocks = (s.length + steps - 1) / steps;
  std::vector<T> a;
  std::vector<double> zero, powers;
  Plan plan;

  Layer(const SsmShape& shape, const SsmInputs<T>& inputs, int64_t scalars_a_step, bool is_backward)
      : s(shape),
        in(inputs),
        steps(steps_a_block(scalars_a_step, is_backward && shape.batch < kManyRows ? 4 * row : 0)),
        a(row, T(0)),
        zero(row, 0.0),
        powers(row, 0.0) {
    std::copy_n(in.a, pairs, a.begin());
    plan = {s.batch, row, blocks, /*is_complex=*/true};
    plan.serial = s.batch * s.length * s.width * pairs < kSerialProducts;
    plan.many_rows = kManyRows;
    const auto over = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
    if (plan.serial)
      plan.rows_a_task = s.batch;
    else if (is_backward)
      plan.rows_a_task = std::max(over(s.batch, kManyRows),
                                  std::min(over(4 * row, s.length), std::max<int64_t>(s.batch / kFewTasks, 1)));
    if (plan.by_block()) power(a.data(), steps, /*conjugate=*/is_backward, powers.data(), row, true);
  }

  // A task has sums of the weights' gradients. In 4 `row` steps they are at most half of what it reads: `least` where a
  // block is a task, and as many rows as that takes where rows are.
  static int64_t steps_a_block(int64_t scalars_a_step, int64_t least) {
    const int64_t fitting = kBlockBytes / (std::max<int64_t>(scalars_a_step, 1) * static_cast<int64_t>(sizeof(T)));
    const int64_t steps = std::max(std::min(fitting, kMostSteps), least);
    return std::max<int64_t>(steps / kSsmChunk, 1) * kSsmChunk;
  }

  int64_t first(int64_t block) const { return block * steps; }
  int64_t count(int64_t block) const { return std::min(steps, s.length - first(block)); }
  const T* u(int64_t b, int64_t t) const { return in.u + (b * s.length + t) * s.width; }
  const uint8_t* reset(int64_t b, int64_t t) const { return offset(in.reset, b * s.reset_batch + t); }

  // x[t] = a x[t-1] + drive[t] over a block, in place.
  void states(int64_t b, int64_t block, T* x, const double* enter, double* out) const {
    ForwardSweep<T> f = recurrence(b, block, x, enter, out);
    f.x = x;
    sweep(f, true);
  }
  // The last of them alone, from zero; false where a reset keeps out what enters.
  bool fold(int64_t b, int64_t block, const T* drive, double* last, double* product) const {
    const ForwardSweep<T> f = recurrence(b, block, drive, zero.data(), last);
    sweep(f, true);
    std::copy_n(powers.data(), row, product);
    return !any(f.reset, 1, f.count);
  }

 private:
  ForwardSweep<T> recurrence(int64_t b, int64_t block, const T* drive, const double* enter, double* out) const {
    ForwardSweep<T> f{};
    f.a = a.data();
    f.b = drive;
    f.step = row;
    f.reset = reset(b, first(block));
    f.reset_step = 1;
    f.count = count(block);
    f.width = row;
    f.in = enter;
    f.out = out;
    return f;
  }
};

// sums = [sum_t u[t]^T lambda[t], sum_t g[t]^T x[t], sum_t u[t] g[t]] over a block, or added to what they are. `lambda`
// and `x` have rows of `row`; so many steps at a time as stay in the first cache.
template <typename T>
void weight_gradients(const SsmShape& s, int64_t row, int64_t count, const T* u, const T* g, const T* lambda,
                      const T* x, T* sums, bool adds) {
  T *const in = sums, *const out = in + s.width * row, *const skip = out + s.width * row;
  if (!adds) std::fill_n(skip, s.width, T(0));
  const auto outer = [&](const T* left, const T* right, int64_t steps, T* c) {
    Product<T> p{};
    p.m = s.width;
    p.n = row;
    p.k = steps;
    p.a = left;
    p.a_step = s.width;
    p.transposed = true;
    p.b = right;
    p.b_step = row;
    p.b_panel = kPanel<T>;
    p.c = c;
    p.c_step = row;
    p.accumulate = adds;
    multiply(p);
  };
  for (int64_t t = 0; t < count; t += kSsmChunk, adds = true) {
    const int64_t steps = std::min(kSsmChunk, count - t);
    const T *const u_t = u + t * s.width, *const g_t = g + t * s.width;
    outer(u_t, lambda + t * row, steps, in);
    outer(g_t, x + t * row, steps, out);
    sum(ColumnSums<T>{steps, s.width, u_t, g_t, skip});
  }
}

// One a worker, uninitialised.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t workers, int64_t size) : size_(size), memory_(new T[workers * size]) {}
  T* of(int64_t worker) const { return memory_.get() + worker * size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> memory_;
};

}  // namespace

template <typename T>
void ssm_forward(const SsmShape& s, const SsmInputs<T>& in, const SsmOutputs<T>& out, const Parallel& parallel) {
  if (s.length == 0) std::copy_n(in.x0, s.batch * s.states * 2, out.last);
  if (s.batch == 0 || s.length == 0) return;
  const int64_t pairs = 2 * s.states, row = padded<T>(pairs);
  const Layer<T> layer(s, in, row + 2 * s.width, /*is_backward=*/false);
  const Panels<T> w_in(in.w_in, s.width, pairs, pairs, 1), w_out(in.w_out, pairs, s.width, s.width, 1);
  const bool streams = is_past_cache<T>(s.batch * s.length * s.width);
  const Scratch<T> scratch(layer.plan.workers(parallel, layer.plan.tasks()), layer.steps * row);

  layer.plan.run(
      parallel,
      [&](int64_t b, double* enter) {
        std::fill_n(enter, row, 0.0);
        std::copy_n(in.x0 + b * pairs, pairs, enter);
      },
      [&](int64_t worker, int64_t b, int64_t block) {
        multiply(
            w_in.product(layer.u(b, layer.first(block)), s.width, layer.count(block), row, scratch.of(worker), row));
      },
      [&](int64_t worker, int64_t b, int64_t block, double* last, double* product) {
        return layer.fold(b, block, scratch.of(worker), last, product);
      },
      [&](int64_t worker, int64_t b, int64_t block, const double* enter, double* leave) {
        T* const x = scratch.of(worker);
        const int64_t first = layer.first(block), count = layer.count(block);
        layer.states(b, block, x, enter, leave);
        T* kept = out.kept + (b * s.chunks() + first / s.chunk) * pairs;
        for (int64_t t = 0; t < count; t += s.chunk, kept += pairs)
          std::copy_n(x + (std::min(t + s.chunk, count) - 1) * row, pairs, kept);
        if (block + 1 == layer.blocks) std::copy_n(x + (count - 1) * row, pairs, out.last + b * pairs);
        Product<T> y = w_out.product(x, row, count, s.width, out.y + (b * s.length + first) * s.width, s.width);
        y.streams = streams;
        y.scale = in.skip;
        y.addend = layer.u(b, first);
        multiply(y);
      });
}

template <typename T>
void ssm_backward(const SsmShape& s, const SsmInputs<T>& in, const SsmCotangents<T>& ct, const Parallel& parallel) {
  const int64_t pairs = 2 * s.states, row = padded<T>(pairs), weights = s.width * row;
  if (s.batch == 0 || s.length == 0) {  // nothing depends on the weights, and the last state is x0
    std::copy_n(ct.last, s.batch * pairs, ct.dx0);
    std::fill_n(ct.da, pairs, T(0));
    std::fill_n(ct.dw_in, s.width * pairs, T(0));
    std::fill_n(ct.dw_out, s.width * pairs, T(0));
    std::fill_n(ct.dskip, s.width, T(0));
    return;
  }
  const Layer<T> layer(s, in, 2 * row + 3 * s.width, /*is_backward=*/true);
  const Plan& plan = layer.plan;
  const Panels<T> w_in(in.w_in, s.width, pairs, pairs, 1), w_in_t(in.w_in, pairs, s.width, 1, pairs);
  const Panels<T> w_out_t(in.w_out, s.width, pairs, 1, s.width);
  const bool streams = is_past_cache<T>(s.batch * s.length * s.width);
  // lambda, then x with the state that enters the block in front
  const int64_t states = layer.steps * row;
  const int64_t workers = plan.workers(parallel, plan.tasks());
  const Scratch<T> scratch(workers, 2 * states + row);
  // Over the blocks of each task: `weight_gradients`, and da in double.
  const Scratch<T> sums(plan.tasks(), 2 * weights + s.width);
  std::vector<double> da(plan.tasks() * 2 * row), enters(workers * row);

  const auto at = [&](int64_t block) { return layer.blocks - 1 - block; };  // the plan runs against time
  const auto g_at = [&](int64_t b, int64_t t) { return ct.y + (b * s.length + t) * s.width; };

  plan.run(
      parallel, [&](int64_t, double* enter) { std::fill_n(enter, row, 0.0); },
      [&](int64_t worker, int64_t b, int64_t i) {
        const int64_t block = at(i), count = layer.count(block);
        T* const lambda = scratch.of(worker);
        multiply(w_out_t.product(g_at(b, layer.first(block)), s.width, count, row, lambda, row));
        if (block + 1 == layer.blocks)
          for (int64_t p = 0; p < pairs; ++p) lambda[(count - 1) * row + p] += ct.last[b * pairs + p];
      },
      [&](int64_t worker, int64_t b, int64_t i, double* last, double* product) {
        const int64_t block = at(i), count = layer.count(block), end = layer.first(block) + count;
        ForwardSweep<T> f{};
        f.a = layer.a.data();
        f.b = scratch.of(worker) + (count - 1) * row;
        f.step = -row;
        f.reset = layer.reset(b, end);
        f.reset_step = -1;
        f.count = count;
        f.width = row;
        f.fresh = i == 0;
        f.conjugate = true;
        f.in = layer.zero.data();
        f.out = last;
        sweep(f, true);
        std::copy_n(layer.powers.data(), row, product);
        return !f.fresh && !any(f.reset, -1, count);
      },
      [&](int64_t worker, int64_t b, int64_t i, const double* enter, double* leave) {
        const int64_t block = at(i), first = layer.first(block), count = layer.count(block);
        T *const lambda = scratch.of(worker), *const before = lambda + states, *const x = before + row;
        const T *const u = layer.u(b, first), *const g = g_at(b, first);

        const T* const kept = ct.kept + (b * s.chunks() + first / s.chunk) * pairs;
        std::fill_n(before, row, T(0));
        std::copy_n(block == 0 ? in.x0 + b * pairs : kept - pairs, pairs, before);
        if (s.chunk == 1) {
          for (int64_t t = 0; t < count; ++t) std::copy_n(kept + t * pairs, pairs, x + t * row);
        } else {
          multiply(w_in.product(u, s.width, count, row, x, row));
          double* const entering = enters.data() + worker * row;
          std::copy_n(before, row, entering);
          layer.states(b, block, x, entering, leave);
        }

        const int64_t task = plan.task_of(b, i);
        const bool begins = plan.by_block() || (i == 0 && b % plan.rows_a_task == 0);
        BackwardSweep<T> back{};
        back.a = layer.a.data();
        back.g = lambda + (count - 1) * row;
        back.x = x + (count - 1) * row;
        back.lambda = lambda + (count - 1) * row;
        back.da_sum = da.data() + task * 2 * row;
        back.adds = !begins;
        back.step = -row;
        back.reset = layer.reset(b, first + count - 1);
        back.reset_step = -1;
        back.count = count;
        back.width = row;
        back.fresh = i == 0;
        back.conjugate = true;
        back.in = enter;
        back.out = leave;
        sweep(back, true);
        if (block == 0) {
          const bool dropped = in.reset && *layer.reset(b, 0);
          for (int64_t p = 0; p < pairs; p += 2) {
            const double re = in.a[p], im = -static_cast<double>(in.a[p + 1]);
            ct.dx0[b * pairs + p] = dropped ? T(0) : static_cast<T>(re * leave[p] - im * leave[p + 1]);
            ct.dx0[b * pairs + p + 1] = dropped ? T(0) : static_cast<T>(re * leave[p + 1] + im * leave[p]);
          }
        }

        Product<T> du = w_in_t.product(lambda, row, count, s.width, ct.du + (b * s.length + first) * s.width, s.width);
        du.streams = streams;
        du.scale = in.skip;
        du.addend = g;
        multiply(du);
        weight_gradients(s, row, count, u, g, lambda, x, sums.of(task), !begins);
      });

  // Task by task, in order, in double.
  const int64_t parts = (s.width + kFeatures - 1) / kFeatures;
  std::vector<double> totals(plan.workers(parallel, parts) * 2 * row);
  const auto total_of = [&](int64_t worker, int64_t d) {
    double *const of_in = totals.data() + worker * 2 * row, *const of_out = of_in + row;
    double of_skip = 0;
    std::fill_n(of_in, 2 * row, 0.0);
    for (int64_t task = 0; task < plan.tasks(); ++task) {
      const T* const dw = sums.of(task);
      for (int64_t p = 0; p < pairs; ++p) of_in[p] += dw[d * row + p];
      for (int64_t p = 0; p < pairs; ++p) of_out[p] += dw[weights + d * row + p];
      of_skip += dw[2 * weights + d];
    }
    for (int64_t p = 0; p < pairs; ++p) {
      ct.dw_in[d * pairs + p] = static_cast<T>(of_in[p]);
      ct.dw_out[p * s.width + d] = static_cast<T>(of_out[p]);
    }
    ct.dskip[d] = static_cast<T>(of_skip);
  };
  plan.each(parallel, parts, [&](int64_t worker, int64_t part) {
    const int64_t end = std::min((part + 1) * kFeatures, s.width);
    for (int64_t d = part * kFeatures; d < end; ++d) total_of(worker, d);
  });
  for (int64_t task = 1; task < plan.tasks(); ++task)
    for (int64_t p = 0; p < 2 * row; ++p) da[p] += da[task * 2 * row + p];
  for (int64_t p = 0; p < pairs; p += 2) {  // conj(x) lambda
    ct.da[p] = static_cast<T>(da[p] + da[p + 1]);
    ct.da[p + 1] = static_cast<T>(da[row + p] - da[row + p + 1]);
  }
}

template void ssm_forward<float>(const SsmShape&, const SsmInputs<float>&, const SsmOutputs<float>&, const Parallel&);
template void ssm_forward<double>(const SsmShape&, const SsmInputs<double>&, const SsmOutputs<double>&,
                                  const Parallel&);
template void ssm_backward<float>(const SsmShape&, const SsmInputs<float>&, const SsmCotangents<float>&,
                                  const Parallel&);
template void ssm_backward<double>(const SsmShape&, const SsmInputs<double>&, const SsmCotangents<double>&,
                                   const Parallel&);

}  // namespace s5eqx
