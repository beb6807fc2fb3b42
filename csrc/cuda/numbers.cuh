// Dual numbers (value and tangent) beside plain ones: what is written for either gives a derivative in a
// direction when it is run on the first.
#pragma once

#include "elements.cuh"

namespace td3_fast::cuda {

template <typename T>
struct alignas(2 * sizeof(T)) Dual {
  T v, t;
};

template <typename T>
__device__ inline Dual<T> operator+(Dual<T> a, Dual<T> b) {
  return {a.v + b.v, a.t + b.t};
}
template <typename T>
__device__ inline Dual<T> operator-(Dual<T> a, Dual<T> b) {
  return {a.v - b.v, a.t - b.t};
}
template <typename T>
__device__ inline Dual<T> operator*(Dual<T> a, Dual<T> b) {
  return {a.v * b.v, a.v * b.t + a.t * b.v};
}
template <typename T>
__device__ inline Dual<T> operator*(Dual<T> a, T b) {
  return {a.v * b, a.t * b};
}

template <typename T>
__device__ inline T value_of(T x) {
  return x;
}
template <typename T>
__device__ inline T value_of(Dual<T> x) {
  return x.v;
}
// What of a gradient is summed and stored: of dual numbers the tangent.
template <typename T>
__device__ inline T stored(T x) {
  return x;
}
template <typename T>
__device__ inline T stored(Dual<T> x) {
  return x.t;
}
// `x` less a constant.
template <typename T>
__device__ inline T minus(T x, T constant) {
  return x - constant;
}
template <typename T>
__device__ inline Dual<T> minus(Dual<T> x, T constant) {
  return {x.v - constant, x.t};
}

template <typename T>
__device__ inline Dual<T> exponential(Dual<T> x) {
  const T e = exponential(x.v);
  return {e, e * x.t};
}
template <typename T>
__device__ inline T inverse(T x) {
  return T(1) / x;
}
template <typename T>
__device__ inline Dual<T> inverse(Dual<T> x) {
  const T i = T(1) / x.v;
  return {i, -i * i * x.t};
}
template <typename T>
__device__ inline T inverse_square_root(T x) {
  return T(1) / square_root(x);
}
template <typename T>
__device__ inline Dual<T> inverse_square_root(Dual<T> x) {
  const T i = T(1) / square_root(x.v);
  return {i, i * i * i * x.t / T(-2)};
}

// gelu(x) = x Φ(x), its slope Φ + x φ, and the slope's slope φ (2 - x²).
template <typename T>
__device__ inline T normal_cdf(T x) {
  return T(0.5) * (T(1) + error_function(x * T(0.70710678118654752440)));
}
template <typename T>
__device__ inline T normal_density(T x) {
  return exponential(x * x * T(-0.5)) * T(0.39894228040143267794);
}
template <typename T>
__device__ inline void gelu(T x, T* value, T* slope) {
  const T cdf = normal_cdf(x);
  *value = x * cdf;
  *slope = cdf + x * normal_density(x);
}
template <typename T>
__device__ inline void gelu(Dual<T> x, Dual<T>* value, Dual<T>* slope) {
  const T cdf = normal_cdf(x.v), density = normal_density(x.v), first = cdf + x.v * density;
  *value = {x.v * cdf, first * x.t};
  *slope = {first, density * (T(2) - x.v * x.v) * x.t};
}

// sum + a b; of gradients (`stored` of the product) likewise.
template <typename T>
__device__ inline T multiply_add(T a, T b, T sum) {
  return fused_multiply_add(a, b, sum);
}
template <typename T>
__device__ inline Dual<T> multiply_add(Dual<T> a, Dual<T> b, Dual<T> sum) {
  return {fused_multiply_add(a.v, b.v, sum.v),
          fused_multiply_add(a.v, b.t, fused_multiply_add(a.t, b.v, sum.t))};
}
template <typename T>
__device__ inline Dual<T> multiply_add(Dual<T> a, T b, Dual<T> sum) {
  return {fused_multiply_add(a.v, b, sum.v), fused_multiply_add(a.t, b, sum.t)};
}
template <typename T>
__device__ inline T add_gradient(T a, T b, T sum) {
  return fused_multiply_add(a, b, sum);
}
template <typename T>
__device__ inline T add_gradient(Dual<T> a, Dual<T> b, T sum) {
  return fused_multiply_add(a.v, b.t, fused_multiply_add(a.t, b.v, sum));
}

template <typename T>
__device__ inline Dual<T> warp_sum(Dual<T> x) {
  return {warp_sum(x.v), warp_sum(x.t)};
}
}  // namespace td3_fast::cuda
