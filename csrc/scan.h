// The diagonal linear recurrence x[t] = a[t] x[t-1] + b[t] and its transpose: sizes, strides and entry points.
// Nothing here knows of XLA: `cpu_module.cc` checks buffers and calls `scan_forward` and `scan_backward`.
#pragma once

#include <cstdint>
#include <functional>

namespace s5eqx {

// A (B, L, P) problem. Strides are in scalars and 0 where an operand is shared; `width` counts the scalars of
// one time step, P for real and 2 P for complex data (re and im interleaved).
struct ScanShape {
  int64_t batch, length, width;
  bool is_complex;
  bool reverse;         // run from the last step to the first
  int64_t a_batch;      // 0: one a for all rows
  int64_t a_time;       // 0: time-invariant
  int64_t reset_batch;  // 0: one set of flags for all rows
};

template <typename T>
struct ForwardArrays {
  const T *a, *b, *x0;
  const uint8_t* reset;  // null: no resets
  T* x;                  // all states, or null
  T* last;               // (batch, width): the state after the last step, or null
};

template <typename T>
struct BackwardArrays {
  const T *a, *x, *x0;
  const uint8_t* reset;
  const T* g;            // cotangent of x
  T *lambda, *da, *dx0;  // cotangents of b, of a (one a batch row), of x0
  bool conjugate;        // real gradients of float pairs; JAX's own convention for complex has no conjugates
};

// Some threads beside the caller's: `start` runs `task` on at most `helpers` of them, or on none.
struct Parallel {
  int64_t helpers;
  std::function<void(int64_t helpers, std::function<void()> task)> start;
};

template <typename T>
void scan_forward(const ScanShape&, const ForwardArrays<T>&, const Parallel&);
template <typename T>
void scan_backward(const ScanShape&, const BackwardArrays<T>&, const Parallel&);

}  // namespace s5eqx
