// One sweep over consecutive steps of one sequence: the inner loop, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace s5eqx {

// s <- a[i] s + b[i] for i = 0 .. count-1, and x[i] = s. The state is held in double. A reset, and a `fresh` first
// step, select b[i] and leave the state out, so that no NaN or infinity crosses.
template <typename T>
struct ForwardSweep {
  const T* a;
  int64_t a_step;  // scalars between steps; negative backwards in time; 0: time-invariant
  const T* b;
  T* x;          // null: only the final state is wanted
  bool streams;  // x past the cache
  int64_t step;
  const uint8_t* reset;  // null: none
  int64_t reset_step;
  int64_t count, width;
  bool fresh;
  bool conjugate;    // multiply by conj(a)
  const double* in;  // (width)
  double* out;       // (width), apart from `in` where vectors overlap
  double* product;   // (width) or null: the product of the a[i], for time-varying a
};

// s <- a[i-1] s + g[i], lambda[i] = s, da[i] = s x_prev[i], where x_prev[i] = x[i+1] in the order of the sweep,
// which runs against the recurrence. The multiplier and the flag of step i stand one step before it.
template <typename T>
struct BackwardSweep {
  const T* a;
  int64_t a_step;
  const T* g;
  const T* x;
  const T* x_last;  // x_prev of the last step where it is not in x (the initial state), or null
  T* lambda;
  T* da;           // time-varying: (count, width)
  double* da_sum;  // time-invariant: (2, width), sums of x_prev * s and of x_prev * swap(s)
  bool adds;       // to what da_sum holds
  int64_t step;
  const uint8_t* reset;
  int64_t reset_step;
  int64_t count, width;
  bool fresh;
  bool conjugate;
  const double* in;
  double* out;
};

struct Sweeps {
  void (*forward_f32)(const ForwardSweep<float>&, bool is_complex);
  void (*forward_f64)(const ForwardSweep<double>&, bool is_complex);
  void (*backward_f32)(const BackwardSweep<float>&, bool is_complex);
  void (*backward_f64)(const BackwardSweep<double>&, bool is_complex);
};

extern const Sweeps sweeps_generic;
extern const Sweeps sweeps_v3;
extern const Sweeps sweeps_v4;

inline void sweep(const ForwardSweep<float>& k, bool c) { S5EQX_OF_ISA(sweeps).forward_f32(k, c); }
inline void sweep(const ForwardSweep<double>& k, bool c) { S5EQX_OF_ISA(sweeps).forward_f64(k, c); }
inline void sweep(const BackwardSweep<float>& k, bool c) { S5EQX_OF_ISA(sweeps).backward_f32(k, c); }
inline void sweep(const BackwardSweep<double>& k, bool c) { S5EQX_OF_ISA(sweeps).backward_f64(k, c); }

}  // namespace s5eqx
