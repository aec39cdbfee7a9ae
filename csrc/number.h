// The numbers of the GPU kernels, real or complex, with one set of names for both.
#pragma once

#include "device.h"

namespace s5eqx {

template <typename T>
struct Complex {
  T re, im;
};

template <typename E>
struct NumberOf;
template <>
struct NumberOf<float> {
  using Scalar = float;
  using Wide = double;
};
template <>
struct NumberOf<double> {
  using Scalar = double;
  using Wide = double;
};
template <typename T>
struct NumberOf<Complex<T>> {
  using Scalar = T;
  using Wide = Complex<double>;
};
template <typename E>
using Wide = typename NumberOf<E>::Wide;  // in double precision

template <typename E>
__device__ inline E number(typename NumberOf<E>::Scalar x) {
  if constexpr (sizeof(E) == sizeof(x))
    return x;
  else
    return {x, 0};
}

__device__ inline double widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
template <typename T>
__device__ inline Complex<double> widen(Complex<T> x) {
  return {x.re, x.im};
}

template <typename E>
__device__ inline E narrow(Wide<E> x) {
  using T = typename NumberOf<E>::Scalar;
  if constexpr (sizeof(E) == sizeof(T))
    return static_cast<T>(x);
  else
    return {static_cast<T>(x.re), static_cast<T>(x.im)};
}

// Products and sums are fused by name and not as a compiler likes, so that every way through the kernels rounds alike.
template <typename T>
__device__ inline T multiply(T x, T y) {
  return x * y;
}
template <typename T>
__device__ inline Complex<T> multiply(Complex<T> x, Complex<T> y) {
  return {fused(x.re, y.re, -(x.im * y.im)), fused(x.re, y.im, x.im * y.re)};
}

// m x + v: one step of the recurrence.
template <typename T>
__device__ inline T multiply_add(T m, T x, T v) {
  return fused(m, x, v);
}
template <typename T>
__device__ inline Complex<T> multiply_add(Complex<T> m, Complex<T> x, Complex<T> v) {
  return {fused(m.re, x.re, fused(-m.im, x.im, v.re)), fused(m.re, x.im, fused(m.im, x.re, v.im))};
}

template <typename T>
__device__ inline T add(T x, T y) {
  return x + y;
}
template <typename T>
__device__ inline Complex<T> add(Complex<T> x, Complex<T> y) {
  return {x.re + y.re, x.im + y.im};
}

template <typename T>
__device__ inline bool is_zero(T x) {
  return x == 0;
}
template <typename T>
__device__ inline bool is_zero(Complex<T> x) {
  return x.re == 0 && x.im == 0;
}

// The same over many steps, where m, the product of their multipliers, may have overflowed: nothing entered, nothing
// left.
template <typename E>
__device__ inline E advance(E m, E x, E v) {
  return is_zero(x) ? v : multiply_add(m, x, v);
}

template <typename T>
__device__ inline T conjugate_if(bool, T x) {
  return x;
}
template <typename T>
__device__ inline Complex<T> conjugate_if(bool conjugate, Complex<T> x) {
  return {x.re, conjugate ? -x.im : x.im};
}

template <typename T>
__device__ inline T shuffle_up_number(T x, unsigned lanes) {
  return shuffle_up(x, lanes);
}
template <typename T>
__device__ inline Complex<T> shuffle_up_number(Complex<T> x, unsigned lanes) {
  return {shuffle_up(x.re, lanes), shuffle_up(x.im, lanes)};
}
template <typename T>
__device__ inline T shuffle_down_number(T x, unsigned lanes) {
  return shuffle_down(x, lanes);
}
template <typename T>
__device__ inline Complex<T> shuffle_down_number(Complex<T> x, unsigned lanes) {
  return {shuffle_down(x.re, lanes), shuffle_down(x.im, lanes)};
}

}  // namespace s5eqx
