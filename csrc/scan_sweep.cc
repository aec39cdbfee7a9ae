// The inner loops of the scan, on GCC and Clang vectors of doubles. CMake compiles this file once per instruction
// set with S5EQX_SWEEPS set to the table's name. Everything but the table has internal linkage, so that code built for
// one instruction set never stands in for another's.
#include "scan_sweep.h"

#include <cstring>
#include <type_traits>

#include "stream.h"

#ifndef S5EQX_SWEEPS
#define S5EQX_SWEEPS sweeps_generic
#endif

namespace s5eqx {
namespace {

#if defined(__AVX512F__)
constexpr int kWide = 8, kMostForward = 16, kMostBackward = 8;  // scalars a vector; vectors side by side
#elif defined(__AVX2__)
constexpr int kWide = 4, kMostForward = 4, kMostBackward = 4;
#else
constexpr int kWide = 2, kMostForward = 4, kMostBackward = 4;
#endif

constexpr int64_t kStripBytes = 8 << 10;
constexpr int64_t kWideRow = 64;  // scalars

template <int W>
using Lanes = std::integral_constant<int, W>;
template <int N>
using Count = std::integral_constant<int, N>;

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
#if defined(__AVX512F__)
    // GCC 12 makes two conversions and an insertion of the general form, and warns of the plain one.
    if constexpr (W == 8) return _mm512_maskz_cvtps_pd(0xff, v);
#endif
    return __builtin_convertvector(v, typename Vec<W>::D);
  } else {
    typename Vec<W>::D v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <int W, typename T>
inline auto in_type(typename Vec<W>::D v) {
  if constexpr (sizeof(T) == 4)
    return __builtin_convertvector(v, typename Vec<W>::F);
  else
    return v;
}

template <int W, typename T>
inline void store(T* p, typename Vec<W>::D v) {
  const auto stored = in_type<W, T>(v);
  std::memcpy(p, &stored, sizeof stored);
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

// N vectors of W scalars, from scalar `at` of every row. What the loops read of `k` is copied first: for all a compiler
// knows, a store to x may change it.
template <typename T, int W, int N, bool Complex, bool TimeVarying, bool Write>
void forward_tile(const ForwardSweep<T>& k, int64_t at) {
  using D = typename Vec<W>::D;
  const T *a = k.a + at, *b = k.b + at;
  T* x = Write ? k.x + at : nullptr;
  const uint8_t* reset = k.reset;
  const int64_t a_step = k.a_step, step = k.step, reset_step = k.reset_step, count = k.count;
  const bool conjugate = k.conjugate, multiplies = TimeVarying && !Write && k.product;
  bool fresh = k.fresh;
  D s[N], product[N];
  Multiplier<W, Complex> m[N];
  for (int n = 0; n < N; ++n) {
    s[n] = load<W>(k.in + at + n * W);
    if constexpr (!TimeVarying) m[n] = {load<W>(a + n * W), conjugate};
    product[n] = Complex ? (Vec<W>::alternate() * -0.5 + 0.5) : D{} + 1.0;  // 1 + 0i, or 1
  }
  const auto run = [&](auto streams) {
    for (int64_t i = 0; i < count; ++i) {
      if (fresh || (reset && *reset)) {
        for (int n = 0; n < N; ++n) s[n] = load<W>(b + n * W);
      } else {
        for (int n = 0; n < N; ++n) {
          if constexpr (TimeVarying) m[n] = {load<W>(a + n * W), conjugate};
          s[n] = m[n].multiply_add(s[n], load<W>(b + n * W));
          if constexpr (TimeVarying && !Write)
            if (multiplies) product[n] = m[n].multiply_add(product[n], D{});
        }
      }
      if constexpr (Write) {
        for (int n = 0; n < N; ++n) {
          if constexpr (streams.value)
            stream(x + n * W, in_type<W, T>(s[n]));
          else
            store<W>(x + n * W, s[n]);
        }
        x += step;
      }
      fresh = false;
      a += a_step;
      b += step;
      if (reset) reset += reset_step;
    }
  };
  if (Write && k.streams && is_streamable(x, step * sizeof(T), W * sizeof(T)))
    run(std::bool_constant<Write>{});
  else
    run(std::false_type{});
  for (int n = 0; n < N; ++n) {
    store<W>(k.out + at + n * W, s[n]);
    if (multiplies) store<W>(k.product + at + n * W, product[n]);
  }
}

template <typename T, int W, int N, bool Complex, bool TimeVarying>
void backward_tile(const BackwardSweep<T>& k, int64_t at) {
  using D = typename Vec<W>::D;
  // The multiplier and the flag of a step stand one step before it; x_prev one step after.
  const T *a = k.a + at - k.a_step, *g = k.g + at, *x = k.x + k.step + at, *x_last = k.x_last;
  T *lambda = k.lambda + at, *da = TimeVarying ? k.da + at : nullptr;
  const uint8_t* reset = k.reset;
  const int64_t a_step = k.a_step, step = k.step, reset_step = k.reset_step, count = k.count;
  const bool conjugate = k.conjugate;
  bool drop = k.fresh || (reset && *(reset - reset_step));
  D s[N], straight[N], crossed[N];
  Multiplier<W, Complex> m[N];
  for (int n = 0; n < N; ++n) {
    s[n] = load<W>(k.in + at + n * W);
    straight[n] = crossed[n] = D{};
    if constexpr (!TimeVarying) m[n] = {load<W>(k.a + at + n * W), conjugate};
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool dropped_here = reset && *reset;
    if (x_last && i == count - 1) x = x_last + at;
    for (int n = 0; n < N; ++n) {
      const D v = load<W>(g + n * W);
      if (drop) {
        s[n] = v;
      } else {
        if constexpr (TimeVarying) m[n] = {load<W>(a + n * W), conjugate};
        s[n] = m[n].multiply_add(s[n], v);
      }
      store<W>(lambda + n * W, s[n]);
      if constexpr (TimeVarying) {
        const D da_n = Multiplier<W, Complex>(load<W>(x + n * W), conjugate).multiply_add(s[n], D{});
        store<W>(da + n * W, dropped_here ? D{} : da_n);
      } else if (!dropped_here) {
        const D xv = load<W>(x + n * W);
        straight[n] += xv * s[n];
        if constexpr (Complex) crossed[n] += xv * Vec<W>::swap(s[n]);
      }
    }
    drop = dropped_here;
    a += a_step;
    g += step;
    x += step;
    lambda += step;
    if constexpr (TimeVarying) da += step;
    if (reset) reset += reset_step;
  }
  for (int n = 0; n < N; ++n) {
    store<W>(k.out + at + n * W, s[n]);
    if constexpr (!TimeVarying) {
      double* const sum = k.da_sum + at + n * W;
      store<W>(sum, k.adds ? load<W>(sum) + straight[n] : straight[n]);
      store<W>(sum + k.width, k.adds ? load<W>(sum + k.width) + crossed[n] : crossed[n]);
    }
  }
}

// Covers `width` scalars with tiles of as many vectors of W as there are: memory likes to be read along its rows. The
// last vector overlaps the one before it where W does not divide (it computes the same numbers again). Rows narrower
// than a vector fall to one complex or real number at a time.
template <int Most, int Narrow, typename Tile>
inline void cover(int64_t width, Tile tile) {
  constexpr int W = kWide;
  if (width < W) {
    for (int64_t at = 0; at < width; at += Narrow) tile(Lanes<Narrow>{}, Count<1>{}, at);
    return;
  }
  int64_t at = 0;
  for (; Most >= 16 && at + 16 * W <= width; at += 16 * W) tile(Lanes<W>{}, Count<Most >= 16 ? 16 : 1>{}, at);
  for (; Most >= 8 && at + 8 * W <= width; at += 8 * W) tile(Lanes<W>{}, Count<Most >= 8 ? 8 : 1>{}, at);
  for (; at + 4 * W <= width; at += 4 * W) tile(Lanes<W>{}, Count<4>{}, at);
  for (; at + W <= width; at += W) tile(Lanes<W>{}, Count<1>{}, at);
  if (at < width) tile(Lanes<W>{}, Count<1>{}, width - W);
}

// Steps first .. first + steps - 1 of a sweep, which follow on what its `out` holds. Not where a product is wanted.
template <typename T>
ForwardSweep<T> part(const ForwardSweep<T>& k, int64_t first, int64_t steps) {
  ForwardSweep<T> p = k;
  p.count = steps;
  if (first == 0) return p;
  p.a += first * k.a_step;
  p.b += first * k.step;
  if (k.x) p.x += first * k.step;
  if (k.reset) p.reset += first * k.reset_step;
  p.fresh = false;
  p.in = k.out;
  return p;
}

template <typename T>
BackwardSweep<T> part(const BackwardSweep<T>& k, int64_t first, int64_t steps) {
  BackwardSweep<T> p = k;
  p.count = steps;
  if (first + steps < k.count) p.x_last = nullptr;
  if (first == 0) return p;
  p.a += first * k.a_step;
  p.g += first * k.step;
  p.x += first * k.step;
  p.lambda += first * k.step;
  if (k.da) p.da += first * k.step;
  if (k.reset) p.reset += first * k.reset_step;
  p.fresh = false;
  p.adds = true;
  p.in = k.out;
  return p;
}

// Rows wider than a tile are swept some steps at a time, so that memory is read in order and not in stripes. Not where
// vectors overlap: what one has left behind, the next must not take up.
template <typename K, typename Rows>
inline void in_strips(const K& k, bool may, int64_t row_bytes, Rows rows) {
  const bool does = may && k.width > 4 * kWide && k.width % kWide == 0;
  const int64_t fitting = does ? kStripBytes / row_bytes : k.count, most = does && fitting < 8 ? 8 : fitting;
  for (int64_t first = 0; first < k.count; first += most)
    rows(part(k, first, first + most < k.count ? most : k.count - first));
}

template <typename T, bool Complex, bool TimeVarying, bool Write>
void forward_rows(const ForwardSweep<T>& k) {
  in_strips(k, !TimeVarying || Write, k.width * sizeof(T), [](const ForwardSweep<T>& part) {
    cover<kMostForward, Complex ? 2 : 1>(part.width, [&](auto lanes, auto count, int64_t at) {
      forward_tile<T, lanes.value, count.value, Complex, TimeVarying, Write>(part, at);
    });
  });
}

// da_sum over steps whose lambda is known already.
template <typename T, int W, int N, bool Complex>
void sum_tile(const BackwardSweep<T>& k, int64_t at) {
  using D = typename Vec<W>::D;
  const T *lambda = k.lambda + at, *x = k.x + k.step + at;
  D straight[N], crossed[N];
  for (int n = 0; n < N; ++n) straight[n] = crossed[n] = D{};
  for (int64_t i = 0; i < k.count; ++i, lambda += k.step, x += k.step) {
    if (k.reset && k.reset[i * k.reset_step]) continue;
    const T* const before = k.x_last && i == k.count - 1 ? k.x_last + at : x;
    for (int n = 0; n < N; ++n) {
      const D s = load<W>(lambda + n * W), xv = load<W>(before + n * W);
      straight[n] += xv * s;
      if constexpr (Complex) crossed[n] += xv * Vec<W>::swap(s);
    }
  }
  for (int n = 0; n < N; ++n) {
    double* const sum = k.da_sum + at + n * W;
    store<W>(sum, k.adds ? load<W>(sum) + straight[n] : straight[n]);
    store<W>(sum + k.width, k.adds ? load<W>(sum + k.width) + crossed[n] : crossed[n]);
  }
}

// The sums need registers that a whole row wants for itself, and follow on a strip that is in cache by then.
template <typename T, bool Complex>
void backward_wide(const BackwardSweep<T>& k) {
  ForwardSweep<T> f{};
  f.a = k.a;
  f.b = k.g;
  f.x = k.lambda;
  f.step = k.step;
  f.reset = k.reset ? k.reset - k.reset_step : nullptr;
  f.reset_step = k.reset_step;
  f.count = k.count;
  f.width = k.width;
  f.fresh = k.fresh;
  f.conjugate = k.conjugate;
  f.in = k.in;
  f.out = k.out;
  cover<kMostForward, Complex ? 2 : 1>(k.width, [&](auto lanes, auto count, int64_t at) {
    forward_tile<T, lanes.value, count.value, Complex, false, true>(f, at);
  });
  cover<kMostBackward, Complex ? 2 : 1>(
      k.width, [&](auto lanes, auto count, int64_t at) { sum_tile<T, lanes.value, count.value, Complex>(k, at); });
}

template <typename T, bool Complex, bool TimeVarying>
void backward_rows(const BackwardSweep<T>& k) {
  in_strips(k, true, k.width * sizeof(T), [](const BackwardSweep<T>& part) {
    if (!TimeVarying && part.width > kWideRow && part.width % kWide == 0) {
      backward_wide<T, Complex>(part);
      return;
    }
    cover<kMostBackward, Complex ? 2 : 1>(part.width, [&](auto lanes, auto count, int64_t at) {
      backward_tile<T, lanes.value, count.value, Complex, TimeVarying>(part, at);
    });
  });
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
  if (k.streams) finish_streams();
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
