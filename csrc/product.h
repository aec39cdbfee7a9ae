// The dense products of the state-space step on blocks that stay in cache, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace s5eqx {

constexpr int64_t kPanelBytes = 128;  // of one row of a panel

template <typename T>
constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(T));

// `n` columns, in whole panels.
template <typename T>
constexpr int64_t padded(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

// c = a b, c += a b, or c = a b + scale * addend. Each entry is summed over k in order, wherever it stands.
template <typename T>
struct Product {
  int64_t m, n, k;
  const T* a;
  int64_t a_step;   // between rows of a, or, transposed, between its columns
  bool transposed;  // a is stored (k, m)
  const T* b;       // in panels of kPanel columns, the last one filled up
  int64_t b_step, b_panel;
  T* c;
  int64_t c_step;
  bool streams;  // c past the cache
  bool accumulate;
  const T* scale;   // (n), or null
  const T* addend;  // (m, n), rows `c_step` apart
};

// sums[j] += sum_i a[i, j] b[i, j]
template <typename T>
struct ColumnSums {
  int64_t m, n;
  const T *a, *b;
  T* sums;
};

struct Products {
  void (*multiply_f32)(Product<float>);
  void (*multiply_f64)(Product<double>);
  void (*sum_f32)(const ColumnSums<float>&);
  void (*sum_f64)(const ColumnSums<double>&);
};

extern const Products products_generic;
extern const Products products_v3;
extern const Products products_v4;

inline void multiply(const Product<float>& p) { S5EQX_OF_ISA(products).multiply_f32(p); }
inline void multiply(const Product<double>& p) { S5EQX_OF_ISA(products).multiply_f64(p); }
inline void sum(const ColumnSums<float>& p) { S5EQX_OF_ISA(products).sum_f32(p); }
inline void sum(const ColumnSums<double>& p) { S5EQX_OF_ISA(products).sum_f64(p); }

}  // namespace s5eqx
