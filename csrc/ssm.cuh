// The state-space step on a GPU, in one pass over u and y: y = x w_out + skip u with x[t] = a x[t-1] + u[t] w_in.
// States stay in shared memory, but for one of every kSsmChunk steps, from which the backward pass computes them again.
//
// A block multiplies a tile of u by w_in, all threads together; then a thread is one state over a segment of
// consecutive steps, folds it to where it ends from zero and, once the state that enters is known, runs the plain
// recurrence again in place; then all multiply the states by w_out. Carries and powers of a are in double precision and
// the states that enter are folded in one fixed order, as in a scan (scan.cuh).
//
// The backward pass is the same in reverse time, from g w_out^T to lambda, and lambda w_in^T + g skip is the cotangent
// of u. Lambda then waits in its threads' own memory while the states are computed again in its place. The cotangents
// of what all steps share are added up over a run of tiles by the block that takes it, over runs by `ssm_sum_kernel`.
#pragma once

#include "gpu_ssm.h"
#include "scan.cuh"

namespace s5eqx {

template <typename T>
struct SsmProblem {
  int64_t length, reset_batch;
  int batch, width, states;
  SsmTiling t;
  bool vector;  // every step of u, y, g and du starts on 16 bytes
  bool split;   // tensor cores: numbers are two terms in TF32
  const T *u, *a, *w_in, *w_out, *skip, *x0;
  const uint8_t* reset;  // null: no resets
  T *y, *last, *kept;    // forward
  const T *kept_states, *g, *g_last;
  T *du, *dx0;
  T* sums;
  int64_t slot_scalars;
  uint64_t *next_run, *run_slots, *group_slots, *super_slots, *run_cuts, *group_cuts;  // null: a block takes rows
};

// Of the gradient of a weight matrix, as far as one pass has it: the first number of a thread, or of its warp with
// tensor cores; and where the thread's sixteen numbers are from there.
struct Place {
  int feature, scalar;
};
template <bool kTensor>
__device__ inline Place place_of(int cell, int states) {
  constexpr int kHeight = kTensor ? 16 : kColumns, kWidth = kTensor ? 32 : kColumns;
  const int square = kTensor ? cell / kWarp : cell, across = (2 * states + kWidth - 1) / kWidth;
  const int down = square / across;
  return {down * kHeight, (square - down * across) * kWidth};
}
template <bool kTensor>
__device__ inline Place number_of(int i, int lane) {
  if constexpr (kTensor) return {i / 8 * 8 + lane / 4, i / 2 % 4 * 8 + lane % 4 * 2 + i % 2};
  return {i / kColumns, i % kColumns};
}

template <typename T, Pass kPass, bool kTensor>
struct SsmWork {
  static constexpr bool kBackward = kPass == Pass::kBackward;
  static constexpr int kRows = rows_a_thread(sizeof(T)), kSteps = steps_a_segment(sizeof(T));
  static constexpr int kVector = 16 / sizeof(T);
  using E = Complex<T>;
  using W = Complex<double>;
  using Piece = Vector<T, kVector>;

  const SsmProblem<T>& p;
  const SsmTiling& t;
  T *const states, *const staged;  // [step][t.pitch]; slices of what is multiplied
  E* const totals;                 // [segment][state]: where it ends from zero, then the state that enters it
  W* const seen;                   // [run or group before][state], in the place of `staged`
  W *const segment_power, *const run_power, *const group_power, *const carry, *const da;
  double* const dskip;
  uint8_t *const flags, *const seen_cut, *const segment_cut;  // flags: of the tile's steps and of the one after
  int* const shared_run;

  const int thread = static_cast<int>(threadIdx.x);
  const int segments = t.steps / kSteps, segment = thread / p.states, state = thread - segment * p.states;
  const bool scans = segment < segments;     // one thread a segment and state
  const bool is_keeper = thread < p.states;  // one thread a state keeps what is between segments and runs
  const int warp = thread / kWarp, lane = thread % kWarp;
  // Of a product of (steps, columns), a warp has 32 by 32; a thread's numbers are in groups of a few columns.
  static constexpr int kAcross = kTensor ? 2 : kColumns, kGroups = kRows * kColumns / kAcross;
  const int row_warps = t.row_groups / 4;
  const int row_group = warp % row_warps * 4 + lane / 8;
  const int column = warp / row_warps * 32 + (kTensor ? 0 : lane % 8 * kColumns);
  const int columns = t.column_groups * kColumns;
  int batch = 0, count = 0;  // count: steps of the tile that exist
  int64_t start = 0;         // its first

  __device__ SsmWork(const SsmProblem<T>& problem, char* memory)
      : p(problem),
        t(problem.t),
        states(reinterpret_cast<T*>(memory)),
        staged(reinterpret_cast<T*>(memory + t.at_staged)),
        totals(reinterpret_cast<E*>(memory + t.at_totals)),
        seen(reinterpret_cast<W*>(memory + t.at_staged)),
        segment_power(reinterpret_cast<W*>(memory + t.at_powers)),
        run_power(segment_power + p.states),
        group_power(run_power + p.states),
        carry(group_power + p.states),
        da(carry + p.states),
        dskip(reinterpret_cast<double*>(memory + t.at_dskip)),
        flags(reinterpret_cast<uint8_t*>(memory + t.at_flags) + 4),
        seen_cut(flags + t.steps + 1),
        segment_cut(seen_cut + kFan),
        shared_run(reinterpret_cast<int*>(memory + t.at_flags)) {}

  __device__ bool looks_back() const { return p.next_run != nullptr; }
  __device__ static E pair(const T* from) { return {from[0], from[1]}; }
  __device__ static void put_pair(T* to, E x) {
    to[0] = x.re;
    to[1] = x.im;
  }
  __device__ E multiplier(bool adjoint) const { return conjugate_if(adjoint, pair(p.a + 2 * state)); }
  __device__ T* state_at(int step) const { return states + step * t.pitch + 2 * state; }

  __device__ void find_powers() {
    if (!is_keeper) return;
    W power = widen(multiplier(kBackward));
    const auto raise = [&](int n) {
#pragma unroll 1
      for (; n > 1; n /= 2) power = multiply(power, power);
      return power;
    };
    segment_power[thread] = raise(kSteps);
    run_power[thread] = raise(segments * t.run);
    group_power[thread] = raise(kFan);
  }

  __device__ void choose(int64_t scan_tile) {
    start = (kBackward ? t.tiles - 1 - scan_tile : scan_tile) * t.steps;
    const int64_t left = p.length - start;
    count = left < t.steps ? static_cast<int>(left) : t.steps;
  }

  // Products.

  // N numbers of a row of u and the like, zeros where there are none.
  template <int N = kVector>
  __device__ Vector<T, N> piece(const T* from, int left) const {
    Vector<T, N> x{};
    if (p.vector) {
      if (left > 0) x = *reinterpret_cast<const Vector<T, N>*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i < left) x.at[i] = from[i];
    }
    return x;
  }
  template <int N>
  __device__ void put_piece(T* to, const Vector<T, N>& x, int left) const {
    if (p.vector) {
      if (left > 0) *reinterpret_cast<Vector<T, N>*>(to) = x;
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i < left) to[i] = x.at[i];
    }
  }

  // Some features of `steps` of the tile into shared memory, zeros where there are none, through registers so that all
  // loads are under way at once. Transposed: [feature][pitch], else [step][pitch].
  template <bool kTransposed>
  __device__ void stage(const T* rows, int first_step, int steps, int first_feature, int features, int pitch) {
    constexpr int kAtOnce = 4;
    const int pieces = features / kVector, all = steps * pieces;
    const T* const from = rows + (batch * p.length + start + first_step) * p.width + first_feature;
#pragma unroll 1
    for (int at = thread; at < all; at += kAtOnce * kThreads) {
      Piece held[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int step = (at + i * kThreads) / pieces, feature = (at + i * kThreads - step * pieces) * kVector;
        const bool exists = at + i * kThreads < all && first_step + step < count;
        held[i] = piece(from + step * int64_t{p.width} + feature, exists ? p.width - first_feature - feature : 0);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + i * kThreads >= all) break;
        const int step = (at + i * kThreads) / pieces, feature = (at + i * kThreads - step * pieces) * kVector;
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          staged[kTransposed ? (feature + j) * pitch + step : step * pitch + feature + j] = held[i].at[j];
      }
    }
  }

  // Rows `first` on and `columns` columns of weights into shared memory, in the order in which they lie in memory.
  __device__ void stage_weights(T* to, const T* w, int first, int rows, int64_t row_stride, int first_column, int width,
                                int64_t column_stride) const {
    const int pitch = columns + t.pad;
#pragma unroll 4
    for (int at = thread; at < kSlice * columns; at += kThreads) {
      const int row = column_stride == 1 ? at / columns : at % kSlice;
      const int c = column_stride == 1 ? at - row * columns : at / kSlice;
      const bool exists = first + row < rows && first_column + c < width;
      to[row * pitch + c] = exists ? w[(first + row) * row_stride + (first_column + c) * column_stride] : T{0};
    }
  }

  template <int kCount>
  __device__ static void load(T (&to)[kCount], const T* from) {
#pragma unroll
    for (int i = 0; i < kCount; i += kVector) {
      const Piece x = *reinterpret_cast<const Piece*>(from + i);
#pragma unroll
      for (int j = 0; j < kVector; ++j) to[i + j] = x.at[j];
    }
  }

  // Where the groups of a thread stand. Without tensor cores the rows that are read across follow on each other, for
  // short loads, and those that are read along lie apart, in banks of their own.
  template <bool kAlong>
  __device__ int row_of(int group) const {
    if constexpr (kTensor) return warp % row_warps * 32 + group / 4 * 8 + lane / 4;
    return kAlong ? row_group + group * t.row_groups : row_group * kRows + group;
  }
  __device__ int column_of(int group) const { return kTensor ? column + group % 4 * 8 + lane % 4 * 2 : column; }

  // sum += a b over 8 inputs, of kTiles times 16 rows and 32 columns of a warp.
  template <int kTiles, typename A, typename B>
  __device__ void multiply_tensors(T (&sum)[8 * kTiles][2], A a, B b) const {
    const int row = lane / 4, k = lane % 4;
    uint32_t x[kTiles][2][4], y[2][2];  // [large and small term]
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) find_terms(a(16 * m + row + i % 2 * 8, k + i / 2 * 4), x[m][0][i], x[m][1][i]);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) find_terms(b(k + i * 4, 8 * n + row), y[0][i], y[1][i]);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        T(&upper)[2] = sum[8 * m + n], (&lower)[2] = sum[8 * m + 4 + n];
        if (p.split) {
          multiply_tf32(upper, lower, x[m][1], y[0]);
          multiply_tf32(upper, lower, x[m][0], y[1]);
        }
        multiply_tf32(upper, lower, x[m][0], y[0]);
      }
    }
  }
  __device__ static void find_terms(float x, uint32_t& large, uint32_t& small) {
    large = round_to_tf32(x);
    small = round_to_tf32(x - float_of(large));
  }

  // states = rows w, of (width, 2 states) weights with these strides.
  __device__ void project_in(const T* rows, const T* w, int64_t by_feature, int64_t by_state) {
    const int pitch = t.steps + t.pad, weight_pitch = columns + t.pad, scalars = 2 * p.states;
    T* const weights = staged + kSlice * pitch;
    T sum[kGroups][kAcross] = {};
#pragma unroll 1
    for (int first = 0; first < p.width; first += kSlice) {
      __syncthreads();
      stage<true>(rows, 0, t.steps, first, kSlice, pitch);
      stage_weights(weights, w, first, p.width, by_feature, 0, scalars, by_state);
      __syncthreads();
      if (column >= scalars) continue;
      if constexpr (kTensor) {
#pragma unroll
        for (int k0 = 0; k0 < kSlice; k0 += 8)
          multiply_tensors<2>(
              sum, [&](int row, int k) { return staged[(k0 + k) * pitch + warp % row_warps * 32 + row]; },
              [&](int k, int c) { return weights[(k0 + k) * weight_pitch + column + c]; });
      } else {
#pragma unroll 4
        for (int k = 0; k < kSlice; ++k) {
          T x[kRows], m[kColumns];
          load(x, staged + k * pitch + row_group * kRows);
          load(m, weights + k * weight_pitch + column);
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j) sum[i][j] += x[i] * m[j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; j += 2)
        if (column_of(i) + j < scalars)
          put_pair(states + row_of<false>(i) * t.pitch + column_of(i) + j, {sum[i][j], sum[i][j + 1]});
  }

  // to = states w + skip rows, of (2 states, width) weights with these strides; and dskip += sum of rows `others`.
  __device__ void project_out(T* to, const T* w, int64_t by_state, int64_t by_feature, const T* rows,
                              [[maybe_unused]] const T* others) {
    const int weight_pitch = columns + t.pad, scalars = 2 * p.states;
#pragma unroll 1
    for (int first = 0; first < p.width; first += columns) {
      T sum[kGroups][kAcross] = {};
#pragma unroll 1
      for (int slice = 0; slice < scalars; slice += kSlice) {
        __syncthreads();
        stage_weights(staged, w, slice, scalars, by_state, first, p.width, by_feature);
        __syncthreads();
        const int inputs = scalars - slice < kSlice ? scalars - slice : kSlice;
        if (first + column >= p.width) continue;
        if constexpr (kTensor) {
          for (int k0 = 0; k0 < inputs; k0 += 8)
            multiply_tensors<2>(
                sum,
                [&](int row, int k) {
                  const T x = states[(warp % row_warps * 32 + row) * t.pitch + slice + k0 + k];
                  return k0 + k < inputs ? x : T{0};
                },
                [&](int k, int c) { return staged[(k0 + k) * weight_pitch + column + c]; });
        } else {
#pragma unroll 2
          for (int k = 0; k < inputs; k += 2) {  // state by state
            T re[kColumns], im[kColumns];
            load(re, staged + k * weight_pitch + column);
            load(im, staged + (k + 1) * weight_pitch + column);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const auto x = *reinterpret_cast<const Vector<T, 2>*>(states + row_of<true>(i) * t.pitch + slice + k);
#pragma unroll
              for (int j = 0; j < kColumns; ++j) sum[i][j] = sum[i][j] + x.at[0] * re[j] + x.at[1] * im[j];
            }
          }
        }
      }
      finish_out(to, first, sum, rows, others);
    }
  }

  __device__ void finish_out(T* to, int first, const T (&sum)[kGroups][kAcross], const T* rows,
                             [[maybe_unused]] const T* others) {
    constexpr int N = kAcross < kVector ? kAcross : kVector, kSets = kTensor ? 4 : 1;  // of columns
    [[maybe_unused]] const int slot = kTensor ? warp % row_warps * 8 + lane / 4 : row_group;
    if constexpr (kBackward) __syncthreads();  // all have multiplied by what is staged
#pragma unroll
    for (int set = 0; set < kSets; ++set)
#pragma unroll
      for (int j = 0; j < kAcross; j += N) {
        const int feature = first + column_of(set) + j, left = p.width - feature;
        const int64_t at = (batch * p.length + start) * p.width + feature;
        Vector<T, N> skip{}, share{};
#pragma unroll
        for (int k = 0; k < N; ++k)
          if (k < left) skip.at[k] = p.skip[feature + k];
#pragma unroll
        for (int i = set; i < kGroups; i += kSets) {
          const int step = row_of<true>(i);
          if (step >= count) continue;
          const int64_t here = at + step * int64_t{p.width};
          const Vector<T, N> x = piece<N>(rows + here, left);
          Vector<T, N> result, other{};
          if constexpr (kBackward) other = piece<N>(others + here, left);
#pragma unroll
          for (int k = 0; k < N; ++k) {
            result.at[k] = sum[i][j + k] + skip.at[k] * x.at[k];
            share.at[k] += other.at[k] * x.at[k];
          }
          put_piece<N>(to + here, result, left);
        }
        if constexpr (kBackward)
#pragma unroll
          for (int k = 0; k < N; ++k) staged[slot * columns + feature - first + k] = share.at[k];
      }
    if constexpr (kBackward) {
      __syncthreads();
      if (thread >= columns || first + thread >= p.width) return;
      double total = dskip[first + thread];
#pragma unroll 4
      for (int i = 0; i < (kTensor ? row_warps * 8 : t.row_groups); ++i) total += staged[i * columns + thread];
      dskip[first + thread] = total;
    }
  }

  // sums += rows^T states over the tile, or = at the start of a run.
  __device__ void add_outer(const T* rows, T* sums, bool anew) {
    const int scalars = 2 * p.states, together = kThreads / t.splits, pitch = t.features + t.pad;
    const int split = thread / together, cell = thread - split * together;
    const Place at = place_of<kTensor>(cell, p.states);
#pragma unroll 1
    for (int pass = 0; pass < t.passes; ++pass) {
      const bool is_active = cell < t.cells && pass * t.features + at.feature < p.width;
      constexpr int kDown = kColumns * kColumns / kAcross;
      T sum[kDown][kAcross] = {};
#pragma unroll 1
      for (int first = 0; first < count; first += t.sum_steps) {
        __syncthreads();
        stage<false>(rows, first, t.sum_steps, pass * t.features, t.features, pitch);
        __syncthreads();
        const int steps = count - first < t.sum_steps ? count - first : t.sum_steps;
        if (!is_active) continue;
        if constexpr (kTensor) {
          for (int step = 8 * split; step < steps; step += 8 * t.splits)
            multiply_tensors<1>(
                sum, [&](int row, int k) { return staged[(step + k) * pitch + at.feature + row]; },
                [&](int k, int c) {
                  return at.scalar + c < scalars ? states[(first + step + k) * t.pitch + at.scalar + c] : T{0};
                });
        } else {
#pragma unroll 4
          for (int step = split; step < steps; step += t.splits) {
            T x[kColumns], m[kColumns];
            load(x, staged + step * pitch + at.feature);
            load(m, states + (first + step) * t.pitch + at.scalar);
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
#pragma unroll
              for (int j = 0; j < kColumns; ++j) sum[i][j] += x[i] * m[j];
          }
        }
      }
      if (!is_active) continue;
      T* const to = sums + ((int64_t{pass} * kColumns * kColumns) * t.splits + split) * t.cells + cell;
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          T& total = to[(i * kAcross + j) * t.splits * t.cells];
          total = anew ? sum[i][j] : total + sum[i][j];
        }
    }
  }

  // The recurrence over a tile.

  __device__ void find_flags() {
    for (int step = thread; step <= t.steps; step += kThreads) {
      const int64_t time = start + step;
      flags[step] = time >= p.length || (p.reset && p.reset[batch * p.reset_batch + time] != 0);
    }
  }

  // What drives the recurrence of this pass, into `states`.
  __device__ void find_drive() {
    if constexpr (kBackward)
      project_in(p.g, p.w_out, 1, p.width);
    else
      project_in(p.u, p.w_in, 2 * p.states, 1);
    find_flags();
    __syncthreads();
    if constexpr (kBackward) {
      if (start + t.steps < p.length) return;
      if (is_keeper) {
        T* const last = states + (p.length - 1 - start) * t.pitch + 2 * thread;
        put_pair(last, add(pair(last), pair(p.g_last + (int64_t{batch} * p.states + thread) * 2)));
      }
      __syncthreads();
    }
  }

  // One step of this thread's segment; in reverse time nothing comes from a step that starts anew.
  template <bool kReverse>
  __device__ int step_of(int i) const {
    return segment * kSteps + (kReverse ? kSteps - 1 - i : i);
  }
  template <bool kReverse>
  __device__ E next(E multiplier, E x, int step) const {
    const E drive = pair(state_at(step)), result = multiply_add(multiplier, x, drive);
    return flags[step + kReverse] ? drive : result;
  }

  template <bool kReverse>
  __device__ void find_totals() {
    if (scans) {
      const E m = multiplier(kReverse);
      E end{};
      bool cut = false;
#pragma unroll 4
      for (int i = 0; i < kSteps; ++i) {
        const int step = step_of<kReverse>(i);
        end = next<kReverse>(m, end, step);
        cut |= flags[step + kReverse] != 0;
      }
      totals[segment * p.states + state] = end;
      if (state == 0) segment_cut[segment] = cut;
    }
    __syncthreads();
  }

  __device__ Segment<W> of_segment(int which, int of_state) const {
    return {segment_power[of_state], widen(totals[which * p.states + of_state]), segment_cut[which] != 0};
  }
  __device__ int scan_order(int i) const { return kBackward ? segments - 1 - i : i; }

  // `totals` become the states that enter the segments, and `carry` what leaves the tile.
  __device__ void enter() {
    if (is_keeper) {
      W x = carry[thread];
#pragma unroll 1
      for (int i = 0; i < segments; ++i) {
        const int which = scan_order(i);
        const W after = of_segment(which, thread).after(x);
        totals[which * p.states + thread] = narrow<E>(x);
        x = after;
      }
      carry[thread] = x;
    }
    __syncthreads();
  }

  // Between runs.

  __device__ W start_state() const {
    return kBackward ? number<W>(0) : widen(pair(p.x0 + (int64_t{batch} * p.states + thread) * 2));
  }

  __device__ void publish_entry(uint64_t* slots, uint64_t* cuts, int64_t which, const Segment<W>& s) const {
    publish(slots + which * 2 * p.states + thread, p.states, s.state);
    if (p.reset && thread == 0) store_relaxed(cuts + which, s.cut);
  }

  __device__ void fetch(const uint64_t* slots, const uint64_t* cuts, int64_t first, int entries) {
    __syncthreads();
    for (int at = thread; at < entries * p.states; at += kThreads) {
      const int j = at / p.states, of_state = at - j * p.states;
      receive(slots + (first + j) * 2 * p.states + of_state, p.states, seen[at]);
      if (of_state == 0) seen_cut[j] = p.reset && wait(cuts + first + j) != 0;
    }
    __syncthreads();
  }
  __device__ Segment<W> seen_entry(const W* power, int j) const {
    return {power[thread], seen[j * p.states + thread], seen_cut[j] != 0};
  }

  // Finds the state that enters this run, given where the run itself ends from zero.
  __device__ void look_back(int run, const Segment<W>& own) {
    const int super = run / (kFan * kFan), group = run / kFan;
    const int before = run % kFan, groups_before = group % kFan;
    const int64_t first = batch * t.runs, first_group = batch * t.groups;
    if (is_keeper) publish_entry(p.run_slots, p.run_cuts, first + run, own);

    fetch(p.run_slots, p.run_cuts, first + run - before, before);
    Segment<W> in_group{number<W>(1), number<W>(0), false};
    if (is_keeper) {
      for (int j = 0; j < before; ++j) in_group = in_group.then(seen_entry(run_power, j));
      // Before it waits for others: else every group would wait for the one before.
      if (before == kFan - 1) publish_entry(p.group_slots, p.group_cuts, first_group + group, in_group.then(own));
    }
    fetch(p.group_slots, p.group_cuts, first_group + group - groups_before, groups_before);
    if (!is_keeper) return;
    const auto super_slot = [&](int which) {
      return p.super_slots + (batch * t.super_groups + which) * 2 * p.states + thread;
    };
    W x = start_state();
    if (super > 0) receive(super_slot(super - 1), p.states, x);
    for (int j = 0; j < groups_before; ++j) x = seen_entry(group_power, j).after(x);
    x = in_group.after(x);
    carry[thread] = x;
    if (run % (kFan * kFan) == kFan * kFan - 1) publish(super_slot(super), p.states, own.after(x));
  }

  // The passes.

  // Where the run ends from zero comes before what enters it, and only then what it gives: all tiles of a run that
  // looks back are driven twice, if they are several.
  __device__ void take_run(int row, int run, int64_t first, int tiles, T* sums, bool anew) {
    batch = row;
    if (!looks_back() && is_keeper) carry[thread] = start_state();
    Segment<W> own{number<W>(1), number<W>(0), false};
#pragma unroll 1
    for (int i = looks_back() ? 0 : tiles; i < 2 * tiles; ++i) {
      const bool folds = i < tiles;
      if (folds || !looks_back() || tiles > 1) {
        choose(first + (folds ? i : i - tiles));
        find_drive();
        find_totals<kBackward>();
      }
      if (folds) {
        if (is_keeper)
#pragma unroll 1
          for (int j = 0; j < segments; ++j) own = own.then(of_segment(scan_order(j), thread));
        if (i == tiles - 1) look_back(run, own);
        continue;
      }
      enter();
      if constexpr (kBackward)
        finish_backward(sums, anew && i == tiles);
      else
        finish_forward();
    }
  }

  __device__ void finish_forward() {
    if (scans) {
      const E m = multiplier(false);
      E x = totals[thread];
#pragma unroll 4
      for (int i = 0; i < kSteps; ++i) {
        const int step = step_of<false>(i);
        x = next<false>(m, x, step);
        put_pair(state_at(step), x);
        if (step >= count) continue;
        const int64_t time = start + step;
        const bool is_last = time == p.length - 1;
        if (is_last || (time + 1) % kSsmChunk == 0) put_pair(kept_state(p.kept, time / kSsmChunk), x);
        if (is_last) put_pair(p.last + (int64_t{batch} * p.states + state) * 2, x);
      }
    }
    project_out(p.y, p.w_out, p.width, 1, p.u, nullptr);
  }

  template <typename Q>
  __device__ Q* kept_state(Q* kept, int64_t chunk) const {
    const int64_t chunks = (p.length + kSsmChunk - 1) / kSsmChunk;
    return kept + ((batch * chunks + chunk) * p.states + state) * 2;
  }

  __device__ void finish_backward(T* sums, bool anew) {
    E lambda[kSteps];  // from the last step of the segment to the first
    if (scans) {
      const E m = multiplier(true);
      E x = totals[thread];
#pragma unroll 4
      for (int i = 0; i < kSteps; ++i) {
        lambda[i] = x = next<true>(m, x, step_of<true>(i));
        put_pair(state_at(step_of<true>(i)), x);
      }
      if (start == 0 && segment == 0)
        put_pair(p.dx0 + (int64_t{batch} * p.states + state) * 2, flags[0] ? E{} : multiply(m, x));
    }
    project_out(p.du, p.w_in, 1, 2 * p.states, p.g, p.u);
    add_outer(p.u, sums, anew);

    project_in(p.u, p.w_in, 2 * p.states, 1);
    __syncthreads();
    find_totals<false>();
    E sum{};
    if (scans) {
      constexpr int kChunk = kSsmChunk / kSteps;  // segments
      const E m = multiplier(false);
      const int64_t chunk = (start + segment * kSteps) / kSsmChunk;
      const T* const from =
          chunk > 0 ? kept_state(p.kept_states, chunk - 1) : p.x0 + (int64_t{batch} * p.states + state) * 2;
      W entering = number<W>(0);
      if (segment * kSteps < count) entering = widen(pair(from));
#pragma unroll 1
      for (int i = segment / kChunk * kChunk; i < segment; ++i) {
        Segment<W> before = of_segment(i, state);
        before.product = conjugate_if(true, before.product);  // a power of conj(a) as it stands
        entering = before.after(entering);
      }
      E x = narrow<E>(entering);
#pragma unroll 4
      for (int i = 0; i < kSteps; ++i) {
        const int step = step_of<false>(i);
        const E last = x;
        x = next<false>(m, x, step);
        if (!flags[step]) sum = multiply_add(conjugate_if(true, last), lambda[kSteps - 1 - i], sum);
        put_pair(state_at(step), x);
      }
    }
    __syncthreads();
    if (scans) totals[thread] = sum;
    add_outer(p.g, sums + t.slot_cells, anew);  // it waits for all
    if (is_keeper)
#pragma unroll 1
      for (int i = 0; i < segments; ++i) da[thread] = add(da[thread], widen(totals[i * p.states + thread]));
  }

  __device__ void begin_sums() {
    if (is_keeper) da[thread] = number<W>(0);
    for (int d = thread; d < p.width; d += kThreads) dskip[d] = 0;
  }
  __device__ void end_sums(T* sums) {
    T* const rest = sums + 2 * t.slot_cells;
    for (int d = thread; d < p.width; d += kThreads) rest[d] = static_cast<T>(dskip[d]);
    if (is_keeper) put_pair(rest + p.width + 2 * thread, narrow<E>(da[thread]));
  }

  __device__ bool takes_runs() const { return looks_back() && thread == kThreads - 1; }
  __device__ int next_run() const { return static_cast<int>(fetch_add(p.next_run, 1) + 1); }  // it starts at -1

  __device__ void work() {
    find_powers();
    if (takes_runs()) *shared_run = next_run();
    for (int slot = static_cast<int>(blockIdx.x);; slot += static_cast<int>(gridDim.x)) {
      __syncthreads();
      if (looks_back()) slot = *shared_run;
      if (slot >= t.slots) return;
      int next = 0;  // asked for here, its way there and back hides behind the run
      if (takes_runs()) next = next_run();
      T* const sums = kBackward ? p.sums + slot * p.slot_scalars : nullptr;
      if constexpr (kBackward) begin_sums();
      const int run = looks_back() ? slot / p.batch : 0;  // time first
      const int64_t first = int64_t{run} * t.run, left = t.tiles - first;
      const int tiles = static_cast<int>(looks_back() && left > t.run ? t.run : left);
      const int64_t first_row = looks_back() ? slot - run * p.batch : slot * t.rows, end_row = first_row + t.rows;
#pragma unroll 1
      for (int64_t row = first_row; row < end_row && row < p.batch; ++row)
        take_run(static_cast<int>(row), run, first, tiles, sums, row == first_row);
      if constexpr (kBackward) end_sums(sums);
      if (takes_runs()) *shared_run = next;
    }
  }
};

template <typename T, Pass kPass, bool kTensor>
__global__ void __launch_bounds__(kThreads, 2) ssm_kernel(SsmProblem<T> p) {
  S5EQX_DYNAMIC_SHARED(memory);
  if constexpr (!kTensor || kCompilesTf32) SsmWork<T, kPass, kTensor>(p, memory).work();
}

// What the runs leave, added up in double precision and in the order of the runs: a block has 32 cells, a warp every
// kWarps-th run.
template <typename T>
struct SsmSums {
  SsmTiling t;
  int width, states;
  int64_t slot_scalars;
  const T* sums;
  T *da, *dw_in, *dw_out, *dskip;
};

template <typename T, bool kTensor>
__global__ void __launch_bounds__(kThreads) ssm_sum_kernel(SsmSums<T> p) {
  struct Memory {
    double sum[kWarps][kWarp];
  };
  S5EQX_SHARED(Memory, sh);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int cells = p.t.passes * kColumns * kColumns * p.t.cells;  // of one weight matrix
  const int which = static_cast<int>(blockIdx.x) * kWarp + lane, matrix = which / cells < 2 ? which / cells : 2;
  const int at = which - matrix * cells, rest = p.width + 2 * p.states;
  const int part = at / p.t.cells, cell = at - part * p.t.cells;
  const Place first = place_of<kTensor>(cell, p.states);
  const Place own = number_of<kTensor>(part % (kColumns * kColumns), cell % kWarp);
  const int feature = part / (kColumns * kColumns) * p.t.features + first.feature + own.feature;
  const int scalar = first.scalar + own.scalar;
  // Cells beyond the width or the states are nobody's, and never written.
  const bool exists = matrix < 2 ? feature < p.width && scalar < 2 * p.states : at < rest;
  int64_t from = matrix * p.t.slot_cells + at;
  int splits = 1;
  if (matrix < 2) {
    from += at / p.t.cells * (p.t.splits - 1) * int64_t{p.t.cells};
    splits = p.t.splits;
  }
  double sum = 0;
  if (exists)
#pragma unroll 4
    for (int64_t slot = warp; slot < p.t.slots; slot += kWarps)
      for (int split = 0; split < splits; ++split) sum += p.sums[slot * p.slot_scalars + from + split * p.t.cells];
  sh.sum[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || !exists) return;
  for (int i = 1; i < kWarps; ++i) sum += sh.sum[i][lane];
  const T total = static_cast<T>(sum);
  if (matrix == 2) {
    (at < p.width ? p.dskip[at] : p.da[at - p.width]) = total;
    return;
  }
  if (matrix == 0)
    p.dw_in[feature * 2 * p.states + scalar] = total;
  else
    p.dw_out[scalar * p.width + feature] = total;
}

// On the host.

template <typename T, Pass kPass, bool kTensor>
Status launch_ssm(const SsmShape& s, const SsmInputs<T>& k, SsmProblem<T> p, bool aligned, const SsmCotangents<T>* r,
                  void* memory, int64_t blocks, Stream stream) {
  const SsmTiling t = p.t = ssm_tiling(s, sizeof(T), kPass, kTensor);
  const SsmWorkspace w = ssm_workspace(s, t, sizeof(T), kPass);
  p.length = s.length;
  p.reset_batch = s.reset_batch;
  p.batch = static_cast<int>(s.batch);
  p.width = static_cast<int>(s.width);
  p.states = static_cast<int>(s.states);
  p.vector = aligned && s.width * sizeof(T) % 16 == 0;
  p.u = k.u;
  p.a = k.a;
  p.w_in = k.w_in;
  p.w_out = k.w_out;
  p.skip = k.skip;
  p.x0 = k.x0;
  p.reset = k.reset;
  uint64_t* const words = static_cast<uint64_t*>(memory);
  p.sums = reinterpret_cast<T*>(words + w.sums);
  p.slot_scalars = w.slot_scalars;
  if (t.look_back) {
    p.next_run = words;
    p.run_slots = words + w.runs;
    p.group_slots = words + w.groups;
    p.super_slots = words + w.super_groups;
    p.run_cuts = words + w.run_cuts;
    p.group_cuts = words + w.group_cuts;
    const Status status = fill_ones(memory, 8 * w.sums, stream);
    if (status != Status{}) return status;
  }
  if (blocks == 0) blocks = int64_t{multiprocessors()} * 2;
  const Status status =
      launch(ssm_kernel<T, kPass, kTensor>, std::min(blocks, t.slots), kThreads, stream, p, t.shared_bytes);
  if (status != Status{} || kPass == Pass::kForward) return status;
  const int64_t cells = 2 * int64_t{t.passes} * kColumns * kColumns * t.cells + s.width + 2 * s.states;
  return launch(ssm_sum_kernel<T, kTensor>, (cells + kWarp - 1) / kWarp, kThreads, stream,
                SsmSums<T>{t, p.width, p.states, p.slot_scalars, p.sums, r->da, r->dw_in, r->dw_out, r->dskip});
}

template <typename T, Pass kPass>
Status launch_ssm(const SsmShape& s, const SsmInputs<T>& k, SsmProblem<T>& p, bool aligned, const SsmCotangents<T>* r,
                  Projection projection, void* memory, int64_t blocks, Stream stream) {
  if constexpr (sizeof(T) == sizeof(float))
    if (projection != Projection::kPlain && was_compiled_for_tf32(ssm_kernel<T, kPass, true>)) {
      p.split = projection == Projection::kSplitTf32;
      return launch_ssm<T, kPass, true>(s, k, p, aligned, r, memory, blocks, stream);
    }
  return launch_ssm<T, kPass, false>(s, k, p, aligned, r, memory, blocks, stream);
}

template <typename T>
Status ssm_forward_on_gpu(const SsmShape& s, const SsmInputs<T>& k, const SsmOutputs<T>& r, Projection projection,
                          void* memory, int64_t blocks, Stream stream) {
  SsmProblem<T> p{};
  p.y = r.y;
  p.last = r.last;
  p.kept = r.kept;
  const bool aligned = is_aligned(k.u, 16) && is_aligned(r.y, 16);
  return launch_ssm<T, Pass::kForward>(s, k, p, aligned, nullptr, projection, memory, blocks, stream);
}

template <typename T>
Status ssm_backward_on_gpu(const SsmShape& s, const SsmInputs<T>& k, const SsmCotangents<T>& r, Projection projection,
                           void* memory, int64_t blocks, Stream stream) {
  SsmProblem<T> p{};
  p.kept_states = r.kept;
  p.g = r.y;
  p.g_last = r.last;
  p.du = r.du;
  p.dx0 = r.dx0;
  const bool aligned = is_aligned(k.u, 16) && is_aligned(r.y, 16) && is_aligned(r.du, 16);
  return launch_ssm<T, Pass::kBackward>(s, k, p, aligned, &r, projection, memory, blocks, stream);
}

#define S5EQX_INSTANTIATE_SSM(T)                                                                                       \
  template Status ssm_forward_on_gpu<T>(const SsmShape&, const SsmInputs<T>&, const SsmOutputs<T>&, Projection, void*, \
                                        int64_t, Stream);                                                              \
  template Status ssm_backward_on_gpu<T>(const SsmShape&, const SsmInputs<T>&, const SsmCotangents<T>&, Projection,    \
                                         void*, int64_t, Stream);

}  // namespace s5eqx
