// Numbers that are vectors of lanes, or dual numbers of them (value and tangent), and functions of both.
//
// For files that are built once per instruction set; see vectors.h. Of dual numbers' gradients only the
// tangents are summed.
#pragma once

#include "vectors.h"

namespace td3_fast::cpu {
namespace {

template <typename V>
struct Dual {
  V v, t;
};

template <typename V>
struct ElementOf;
template <>
struct ElementOf<Vector<float>> {
  using type = float;
};
template <>
struct ElementOf<Vector<double>> {
  using type = double;
};

template <typename V>
TD3_FAST_INLINE Dual<V> operator+(Dual<V> a, Dual<V> b) {
  return {a.v + b.v, a.t + b.t};
}
template <typename V>
TD3_FAST_INLINE Dual<V> operator-(Dual<V> a, Dual<V> b) {
  return {a.v - b.v, a.t - b.t};
}
template <typename V>
TD3_FAST_INLINE Dual<V> operator*(Dual<V> a, Dual<V> b) {
  return {a.v * b.v, a.v * b.t + a.t * b.v};
}
template <typename V>
TD3_FAST_INLINE Dual<V> operator*(Dual<V> a, V b) {
  return {a.v * b, a.t * b};
}

template <typename V, typename F>
TD3_FAST_INLINE V each(V x, F f) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = f(x[i]);
  return x;
}
TD3_FAST_INLINE float scalar_sqrt(float x) {
  return __builtin_sqrtf(x);
}
TD3_FAST_INLINE double scalar_sqrt(double x) {
  return __builtin_sqrt(x);
}

template <typename V>
TD3_FAST_INLINE V exp_of(V x) {
  return exponential(x);
}
template <typename V>
TD3_FAST_INLINE Dual<V> exp_of(Dual<V> x) {
  const V e = exponential(x.v);
  return {e, e * x.t};
}

template <typename V>
TD3_FAST_INLINE V inverse(V x) {
  return 1 / x;
}
template <typename V>
TD3_FAST_INLINE Dual<V> inverse(Dual<V> x) {
  const V i = 1 / x.v;
  return {i, -i * i * x.t};
}

template <typename V>
TD3_FAST_INLINE V inverse_sqrt(V x) {
  return 1 / each(x, [](auto e) { return scalar_sqrt(e); });
}
template <typename V>
TD3_FAST_INLINE Dual<V> inverse_sqrt(Dual<V> x) {
  const V i = inverse_sqrt(x.v);
  return {i, i * i * i * x.t / -2};
}

// erf within 3 ulp: x P(x²) where |x| < 1, elsewhere 1 - e^Q(|x|), which is 1 to rounding from 4 on.
TD3_FAST_INLINE Vector<float> erf_of(Vector<float> x) {
  const Vector<float> square = x * x;
  Vector<float> p = square * 7.85385051e-5f - 8.01019034e-4f;
  p = p * square + 5.18832731e-3f;
  p = p * square - 2.68538117e-2f;
  p = p * square + 1.12835851e-1f;
  p = p * square - 3.76126258e-1f;
  p = p * square + 1.12837917f;
  const Vector<float> size = x < 0 ? -x : x, y = size < 4 ? size : 4 - Vector<float>{};
  Vector<float> q = y * 1.85576948e-4f - 2.93963534e-3f;
  q = q * y + 2.18054275e-2f;
  q = q * y - 1.03037591e-1f;
  q = q * y - 6.38225428e-1f;
  q = q * y - 1.12704018f;
  q = q * y - 3.53684409e-4f;
  const Vector<float> far = 1 - exponential(q);
  return size < 1 ? x * p : (x < 0 ? -far : far);
}
TD3_FAST_INLINE Vector<double> erf_of(Vector<double> x) {
  return each(x, [](double e) { return __builtin_erf(e); });
}

// sigmoid(x) and tanh(x) by exponentials of what is not positive, whatever x; tanh of a small number, which
// would be a difference of nearly equal ones, by a polynomial: 2 ulp.
template <typename V>
TD3_FAST_INLINE V sigmoid_of(V x) {
  const V e = exponential(x < 0 ? x : -x);
  return (x < 0 ? e : 1 - V{}) / (1 + e);
}
TD3_FAST_INLINE Vector<float> tanh_of(Vector<float> x) {
  const Vector<float> size = x < 0 ? -x : x, e = exponential(size * -2);
  const Vector<float> far = (1 - e) / (1 + e), square = x * x;
  Vector<float> p = 2.10036412e-2f - square * 6.104948e-3f;
  p = p * square - 5.38524985e-2f;
  p = p * square + 1.33327827e-1f;
  p = p * square - 3.33333284e-1f;
  return (size < 0.625f) | (x != x) ? x + x * (square * p) : (x < 0 ? -far : far);
}
TD3_FAST_INLINE Vector<double> tanh_of(Vector<double> x) {
  return each(x, [](double e) { return __builtin_tanh(e); });
}
template <typename V>
TD3_FAST_INLINE Dual<V> sigmoid_of(Dual<V> x) {
  const V s = sigmoid_of(x.v);
  return {s, s * (1 - s) * x.t};
}
template <typename V>
TD3_FAST_INLINE Dual<V> tanh_of(Dual<V> x) {
  const V t = tanh_of(x.v);
  return {t, (1 - t * t) * x.t};
}

template <typename V>
TD3_FAST_INLINE V one_minus(V x) {
  return 1 - x;
}
template <typename V>
TD3_FAST_INLINE Dual<V> one_minus(Dual<V> x) {
  return {1 - x.v, -x.t};
}

// gelu(x) = x Φ(x), its slope Φ + x φ, and the slope's slope φ (2 - x²).
template <typename V>
struct Normal {
  V cdf, density;
};
template <typename V>
TD3_FAST_INLINE Normal<V> normal(V x) {
  using T = typename ElementOf<V>::type;
  return {T(0.5) * (1 + erf_of(x * T(0.70710678118654752440))),
          exponential(x * x * T(-0.5)) * T(0.39894228040143267794)};
}
template <typename V>
TD3_FAST_INLINE void gelu(V x, V* value, V* slope) {
  const Normal<V> n = normal(x);
  *value = x * n.cdf;
  *slope = n.cdf + x * n.density;
}
template <typename V>
TD3_FAST_INLINE void gelu(Dual<V> x, Dual<V>* value, Dual<V>* slope) {
  const Normal<V> n = normal(x.v);
  const V first = n.cdf + x.v * n.density;
  *value = {x.v * n.cdf, first * x.t};
  *slope = {first, n.density * (2 - x.v * x.v) * x.t};
}

template <typename V>
TD3_FAST_INLINE V value_of(V x) {
  return x;
}
template <typename V>
TD3_FAST_INLINE V value_of(Dual<V> x) {
  return x.v;
}
template <typename V>
TD3_FAST_INLINE V minus(V x, V constant) {
  return x - constant;
}
template <typename V>
TD3_FAST_INLINE Dual<V> minus(Dual<V> x, V constant) {
  return {x.v - constant, x.t};
}
template <typename V, typename M>
TD3_FAST_INLINE V where(M mask, V x) {
  return mask ? x : V{};
}
template <typename V, typename M>
TD3_FAST_INLINE Dual<V> where(M mask, Dual<V> x) {
  return {mask ? x.v : V{}, mask ? x.t : V{}};
}

// sum += a b
template <typename V>
TD3_FAST_INLINE void add_product(V* sum, V a, V b) {
  *sum += a * b;
}
template <typename V>
TD3_FAST_INLINE void add_product(Dual<V>* sum, Dual<V> a, Dual<V> b) {
  sum->v += a.v * b.v;
  sum->t += a.v * b.t;
  sum->t += a.t * b.v;
}

// sum += a b, of dual numbers the tangent alone.
template <typename V>
TD3_FAST_INLINE void add_gradient(V* sum, V a, V b) {
  *sum += a * b;
}
template <typename V>
TD3_FAST_INLINE void add_gradient(V* sum, Dual<V> a, Dual<V> b) {
  *sum += a.v * b.t + a.t * b.v;
}
template <typename V>
TD3_FAST_INLINE void add_gradient(V* sum, V a) {
  *sum += a;
}
template <typename V>
TD3_FAST_INLINE void add_gradient(V* sum, Dual<V> a) {
  *sum += a.t;
}

// Parameters, one for all lanes.
template <typename T, bool kTangents>
struct Weights;
template <typename T>
struct Weights<T, false> {
  using N = Vector<T>;
  const T* v;
  TD3_FAST_INLINE Weights at(int64_t i) const { return {v + i}; }
  TD3_FAST_INLINE N operator[](int64_t i) const { return v[i] - N{}; }
  // sum += w[i] x
  TD3_FAST_INLINE void add(N* sum, int64_t i, N x) const { *sum += v[i] * x; }
};
template <typename T>
struct Weights<T, true> {
  using N = Dual<Vector<T>>;
  const T *v, *t;
  TD3_FAST_INLINE Weights at(int64_t i) const { return {v + i, t + i}; }
  TD3_FAST_INLINE N operator[](int64_t i) const { return {v[i] - Vector<T>{}, t[i] - Vector<T>{}}; }
  TD3_FAST_INLINE void add(N* sum, int64_t i, N x) const {
    sum->v += v[i] * x.v;
    sum->t += v[i] * x.t + t[i] * x.v;
  }
};

}  // namespace
}  // namespace td3_fast::cpu
