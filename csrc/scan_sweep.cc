// The inner loops of the scan, on GCC and Clang vectors of doubles. CMake compiles this file once per instruction
// set with S5EQX_SWEEPS set to the table's name. Everything but the table has internal linkage, so that code built for
// one instruction set never stands in for another's.
#include "scan_sweep.h"

#include <cstring>

#ifndef S5EQX_SWEEPS
#define S5EQX_SWEEPS sweeps_generic
#endif

namespace s5eqx {
namespace {

#if defined(__AVX512F__)
constexpr int kWide = 8;
#elif defined(__AVX2__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif

#if defined(__clang__)
#define S5EQX_SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else  // GCC has the other only since version 12
#define S5EQX_SHUFFLE(v, ...) __builtin_shuffle(v, I{__VA_ARGS__})
#endif

// A vector of W doubles: W/2 interleaved complex numbers, or W real ones.
template <int W>
struct Vec;
#define S5EQX_VEC(W, SWAP, EVEN, ODD, ALTERNATE)             \
  template <>                                                \
  struct Vec<W> {                                            \
    typedef double D __attribute__((vector_size(W * 8)));    \
    typedef float F __attribute__((vector_size(W * 4)));     \
    typedef long long I __attribute__((vector_size(W * 8))); \
    static D swap(D v) { return S5EQX_SHUFFLE(v, SWAP); }    \
    static D even(D v) { return S5EQX_SHUFFLE(v, EVEN); }    \
    static D odd(D v) { return S5EQX_SHUFFLE(v, ODD); }      \
    static D alternate() { return D{ALTERNATE}; }            \
  }
#define S5EQX_LIST(...) __VA_ARGS__
S5EQX_VEC(2, S5EQX_LIST(1, 0), S5EQX_LIST(0, 0), S5EQX_LIST(1, 1), S5EQX_LIST(-1, 1));
#if defined(__AVX512F__)
S5EQX_VEC(8, S5EQX_LIST(1, 0, 3, 2, 5, 4, 7, 6), S5EQX_LIST(0, 0, 2, 2, 4, 4, 6, 6), S5EQX_LIST(1, 1, 3, 3, 5, 5, 7, 7),
          S5EQX_LIST(-1, 1, -1, 1, -1, 1, -1, 1));
#elif defined(__AVX2__)
S5EQX_VEC(4, S5EQX_LIST(1, 0, 3, 2), S5EQX_LIST(0, 0, 2, 2), S5EQX_LIST(1, 1, 3, 3), S5EQX_LIST(-1, 1, -1, 1));
#endif
template <>
struct Vec<1> {
  typedef double D __attribute__((vector_size(8)));
  typedef float F __attribute__((vector_size(4)));
  static D swap(D v) { return v; }
  static D even(D v) { return v; }
  static D odd(D v) { return v; }
  static D alternate() { return D{1}; }
};

template <int W, typename T>
inline typename Vec<W>::D load(const T* p) {
  if constexpr (sizeof(T) == 4) {
    typename Vec<W>::F v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, typename Vec<W>::D);
  } else {
    typename Vec<W>::D v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <int W, typename T>
inline void store(T* p, typename Vec<W>::D v) {
  if constexpr (sizeof(T) == 4) {
    const auto f = __builtin_convertvector(v, typename Vec<W>::F);
    std::memcpy(p, &f, sizeof f);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// A multiplier, split so that a product is two fused multiply-adds: m * s = re * s + im * swap(s).
template <int W, bool Complex>
struct Multiplier {
  typename Vec<W>::D re, im;
  Multiplier() = default;
  Multiplier(typename Vec<W>::D m, bool conjugate) {
    re = Complex ? Vec<W>::even(m) : m;
    if constexpr (Complex) im = Vec<W>::odd(m) * (conjugate ? -Vec<W>::alternate() : Vec<W>::alternate());
  }
  typename Vec<W>::D multiply_add(typename Vec<W>::D s, typename Vec<W>::D b) const {
    if constexpr (Complex) return (b + re * s) + im * Vec<W>::swap(s);
    return b + re * s;
  }
};

// N vectors of W scalars, from scalar `at` of every row.
template <typename T, int W, int N, bool Complex, bool TimeVarying, bool Write>
void forward_tile(const ForwardSweep<T>& k, int64_t at) {
  using D = typename Vec<W>::D;
  D s[N], product[N];
  Multiplier<W, Complex> m[N];
  for (int n = 0; n < N; ++n) {
    s[n] = load<W>(k.in + at + n * W);
    if constexpr (!TimeVarying) m[n] = {load<W>(k.a + at + n * W), k.conjugate};
    product[n] = Complex ? (Vec<W>::alternate() * -0.5 + 0.5) : D{} + 1.0;  // 1 + 0i, or 1
  }
  for (int64_t i = 0; i < k.count; ++i) {
    const T* b = k.b + i * k.step + at;
    const bool drop = (k.fresh && i == 0) || (k.reset && k.reset[i * k.reset_step]);
    if (drop) {
      for (int n = 0; n < N; ++n) s[n] = load<W>(b + n * W);
    } else {
      const T* a = k.a + i * k.a_step + at;
      for (int n = 0; n < N; ++n) {
        if constexpr (TimeVarying) m[n] = {load<W>(a + n * W), k.conjugate};
        s[n] = m[n].multiply_add(s[n], load<W>(b + n * W));
        if constexpr (TimeVarying && !Write)
          if (k.product) product[n] = m[n].multiply_add(product[n], D{});
      }
    }
    if constexpr (Write)
      for (int n = 0; n < N; ++n) store<W>(k.x + i * k.step + at + n * W, s[n]);
  }
  for (int n = 0; n < N; ++n) {
    store<W>(k.out + at + n * W, s[n]);
    if constexpr (TimeVarying && !Write)
      if (k.product) store<W>(k.product + at + n * W, product[n]);
  }
}

template <typename T, int W, int N, bool Complex, bool TimeVarying>
void backward_tile(const BackwardSweep<T>& k, int64_t at) {
  using D = typename Vec<W>::D;
  D s[N], straight[N], crossed[N];
  Multiplier<W, Complex> m[N];
  for (int n = 0; n < N; ++n) {
    s[n] = load<W>(k.in + at + n * W);
    straight[n] = crossed[n] = D{};
    if constexpr (!TimeVarying) m[n] = {load<W>(k.a + at + n * W), k.conjugate};
  }
  for (int64_t i = 0; i < k.count; ++i) {
    const T* g = k.g + i * k.step + at;
    const bool drop = (k.fresh && i == 0) || (k.reset && k.reset[(i - 1) * k.reset_step]);
    const bool dropped_here = k.reset && k.reset[i * k.reset_step];
    const T* a = k.a + (i - 1) * k.a_step + at;
    const T* x = (k.x_last && i == k.count - 1) ? k.x_last + at : k.x + (i + 1) * k.step + at;
    for (int n = 0; n < N; ++n) {
      const D v = load<W>(g + n * W);
      if (drop) {
        s[n] = v;
      } else {
        if constexpr (TimeVarying) m[n] = {load<W>(a + n * W), k.conjugate};
        s[n] = m[n].multiply_add(s[n], v);
      }
      store<W>(k.lambda + i * k.step + at + n * W, s[n]);
      if constexpr (TimeVarying) {
        const D da = Multiplier<W, Complex>(load<W>(x + n * W), k.conjugate).multiply_add(s[n], D{});
        store<W>(k.da + i * k.step + at + n * W, dropped_here ? D{} : da);
      } else if (!dropped_here) {
        const D xv = load<W>(x + n * W);
        straight[n] += xv * s[n];
        if constexpr (Complex) crossed[n] += xv * Vec<W>::swap(s[n]);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    store<W>(k.out + at + n * W, s[n]);
    if constexpr (!TimeVarying) {
      store<W>(k.da_sum + at + n * W, straight[n]);
      store<W>(k.da_sum + k.width + at + n * W, crossed[n]);
    }
  }
}

// Covers `width` scalars with tiles of 4 and 1 vectors of W; the last vector overlaps the one before it where W does
// not divide (it computes the same numbers again). Rows narrower than a vector fall to one complex or real number at a
// time.
template <int W, int Narrow, typename Tile4, typename Tile1, typename TileNarrow>
inline void cover(int64_t width, Tile4 tile4, Tile1 tile1, TileNarrow narrow) {
  if (width < W) {
    for (int64_t at = 0; at < width; at += Narrow) narrow(at);
    return;
  }
  int64_t at = 0;
  for (; at + 4 * W <= width; at += 4 * W) tile4(at);
  for (; at + W <= width; at += W) tile1(at);
  if (at < width) tile1(width - W);
}

template <typename T, bool Complex, bool TimeVarying, bool Write>
void forward_rows(const ForwardSweep<T>& k) {
  constexpr int narrow = Complex ? 2 : 1;
  cover<kWide, narrow>(
      k.width, [&](int64_t at) { forward_tile<T, kWide, 4, Complex, TimeVarying, Write>(k, at); },
      [&](int64_t at) { forward_tile<T, kWide, 1, Complex, TimeVarying, Write>(k, at); },
      [&](int64_t at) { forward_tile<T, narrow, 1, Complex, TimeVarying, Write>(k, at); });
}

template <typename T, bool Complex, bool TimeVarying>
void backward_rows(const BackwardSweep<T>& k) {
  constexpr int narrow = Complex ? 2 : 1;
  cover<kWide, narrow>(
      k.width, [&](int64_t at) { backward_tile<T, kWide, 4, Complex, TimeVarying>(k, at); },
      [&](int64_t at) { backward_tile<T, kWide, 1, Complex, TimeVarying>(k, at); },
      [&](int64_t at) { backward_tile<T, narrow, 1, Complex, TimeVarying>(k, at); });
}

template <typename T, bool Complex>
void forward_kind(const ForwardSweep<T>& k) {
  if (k.a_step == 0)
    k.x ? forward_rows<T, Complex, false, true>(k) : forward_rows<T, Complex, false, false>(k);
  else
    k.x ? forward_rows<T, Complex, true, true>(k) : forward_rows<T, Complex, true, false>(k);
}

template <typename T>
void forward(const ForwardSweep<T>& k, bool is_complex) {
  is_complex ? forward_kind<T, true>(k) : forward_kind<T, false>(k);
}

template <typename T>
void backward(const BackwardSweep<T>& k, bool is_complex) {
  if (is_complex)
    k.a_step == 0 ? backward_rows<T, true, false>(k) : backward_rows<T, true, true>(k);
  else
    k.a_step == 0 ? backward_rows<T, false, false>(k) : backward_rows<T, false, true>(k);
}

}  // namespace

extern const Sweeps S5EQX_SWEEPS = {forward<float>, forward<double>, backward<float>, backward<double>};

}  // namespace s5eqx
