// The whole state-space step: drive = u w_in, x[t] = a x[t-1] + drive[t], y = x w_out + skip u, and its transpose.
// Nothing here knows of XLA.
#pragma once

#include <cstdint>

#include "scan.h"

namespace s5eqx {

constexpr int64_t kSsmChunk = 64;  // steps between the states that the forward pass keeps, where it does not keep all

// Complex numbers are (re, im) pairs: a row of states is 2 `states` scalars.
struct SsmShape {
  int64_t batch, length, width, states;
  int64_t chunk;        // kSsmChunk, or 1 to keep all states
  int64_t reset_batch;  // 0: one set of flags for all rows

  int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

template <typename T>
struct SsmInputs {
  const T* u;            // (batch, length, width)
  const T* a;            // (states, 2)
  const T* w_in;         // (width, 2 states)
  const T* w_out;        // (2 states, width)
  const T* skip;         // (width)
  const T* x0;           // (batch, states, 2)
  const uint8_t* reset;  // null: no resets
};

template <typename T>
struct SsmOutputs {
  T* y;     // (batch, length, width)
  T* last;  // (batch, states, 2)
  T* kept;  // (batch, chunks, states, 2): the state after each chunk
};

template <typename T>
struct SsmCotangents {
  const T* kept;
  const T *y, *last;                          // of the results
  T *du, *da, *dw_in, *dw_out, *dskip, *dx0;  // of the inputs, summed over the batch where they are shared by it
};

template <typename T>
void ssm_forward(const SsmShape&, const SsmInputs<T>&, const SsmOutputs<T>&, const Parallel&);
template <typename T>
void ssm_backward(const SsmShape&, const SsmInputs<T>&, const SsmCotangents<T>&, const Parallel&);

}  // namespace s5eqx
