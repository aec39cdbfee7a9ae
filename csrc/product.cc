// Small matrix products on GCC and Clang vectors. CMake compiles this file once per instruction set, with
// S5EQX_PRODUCTS set to the table's name. Everything but the table has internal linkage.
#include "product.h"

#include <cstring>
#include <utility>

#include "stream.h"

#ifndef S5EQX_PRODUCTS
#define S5EQX_PRODUCTS products_generic
#endif

namespace s5eqx {
namespace {

// Entries of c that stay in registers: kRows x 2 vectors, and room for two of b and one of a.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 12;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kRows = 6;
#else
constexpr int kBytes = 16, kRows = 6;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// What becomes of a vector of a b.
template <typename T>
inline void finish(const Product<T>& p, int64_t column, int64_t at, Vector<T> v) {
  if (p.accumulate) v += load(p.c + at);
  if (p.scale) v += load(p.scale + column) * load(p.addend + at);
  if (p.streams)
    stream(p.c + at, v);
  else
    std::memcpy(p.c + at, &v, sizeof v);
}

// The same where the columns end within the vector.
template <typename T>
void finish_some(const Product<T>& p, int64_t column, int64_t at, Vector<T> v) {
  for (int64_t j = 0; j < kLanes<T> && column + j < p.n; ++j) {
    T x = v[j];
    if (p.accumulate) x += p.c[at + j];
    if (p.scale) x += p.scale[column + j] * p.addend[at + j];
    p.c[at + j] = x;
  }
}

// M rows by two vectors of c.
template <typename T, int M, bool Transposed>
void tile(const Product<T>& p, int64_t row, int64_t column) {
  constexpr int W = kLanes<T>;
  const T* a = p.a + (Transposed ? row : row * p.a_step);
  const T* b = p.b + column / kPanel<T> * p.b_panel + column % kPanel<T>;
  const int64_t step = p.a_step;
  Vector<T> sum[M][2] = {};
  for (int64_t k = 0; k < p.k; ++k) {
    const Vector<T> b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const T x = Transposed ? a[i] : a[i * step];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
    a += Transposed ? step : 1;
    b += p.b_step;
  }
  const bool whole = column + 2 * W <= p.n;
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    const int64_t at = (row + i) * p.c_step + column;
    if (whole) {
      finish(p, column, at, sum[i][0]);
      finish(p, column + W, at + W, sum[i][1]);
    } else {
      finish_some(p, column, at, sum[i][0]);
      finish_some(p, column + W, at + W, sum[i][1]);
    }
  }
}

template <typename T, bool Transposed, int... M>
void tiles(const Product<T>& p, std::integer_sequence<int, M...>) {
  using Tile = void (*)(const Product<T>&, int64_t, int64_t);
  static constexpr Tile of_height[] = {tile<T, M + 1, Transposed>...};
  for (int64_t row = 0; row < p.m; row += kRows) {
    const Tile run = of_height[(p.m - row < kRows ? p.m - row : kRows) - 1];
    for (int64_t column = 0; column < p.n; column += 2 * kLanes<T>) run(p, row, column);
  }
}

template <typename T>
void multiply_all(Product<T> p) {
  constexpr std::make_integer_sequence<int, kRows> heights{};
  p.streams = p.streams && is_streamable(p.c, p.c_step * static_cast<int64_t>(sizeof(T)), kBytes);
  p.transposed ? tiles<T, true>(p, heights) : tiles<T, false>(p, heights);
  if (p.streams) finish_streams();
}

template <typename T>
void sum_all(const ColumnSums<T>& p) {
  int64_t column = 0;
  for (; column + kLanes<T> <= p.n; column += kLanes<T>) {
    Vector<T> sum{};
    for (int64_t i = 0; i < p.m; ++i) sum += load(p.a + i * p.n + column) * load(p.b + i * p.n + column);
    sum += load(p.sums + column);
    std::memcpy(p.sums + column, &sum, sizeof sum);
  }
  for (; column < p.n; ++column) {
    T sum = 0;
    for (int64_t i = 0; i < p.m; ++i) sum += p.a[i * p.n + column] * p.b[i * p.n + column];
    p.sums[column] += sum;
  }
}

}  // namespace

extern const Products S5EQX_PRODUCTS = {multiply_all<float>, multiply_all<double>, sum_all<float>, sum_all<double>};

}  // namespace s5eqx
