// Adam's loops for one instruction set; see adam.h, and vectors.h for what may be used here.

#include "adam.h"
#include "vectors.h"

namespace td3_fast::cpu {
namespace {

TD3_FAST_INLINE float root_of(float x) {
  return __builtin_sqrtf(x);
}
TD3_FAST_INLINE double root_of(double x) {
  return __builtin_sqrt(x);
}

template <typename T>
void step(const AdamRates<T>& rates,
          int64_t count,
          T* __restrict p,
          T* __restrict m,
          T* __restrict v,
          const T* __restrict g) {
  const auto [beta1, share1, beta2, share2, eps, weight_decay, size] = rates;
  for (int64_t i = 0; i < count; ++i) {
    const T gradient = g[i] + weight_decay * p[i];
    m[i] += share1 * (gradient - m[i]);
    v[i] = beta2 * v[i] + share2 * gradient * gradient;
    p[i] -= size * m[i] / (root_of(v[i]) + eps);
  }
}

template <typename T>
void adjoint(const AdamRates<T>& rates,
             int64_t count,
             const T* __restrict p,
             const T* __restrict m,
             const T* __restrict v,
             const T* __restrict g,
             T* __restrict to_p,
             T* __restrict to_m,
             T* __restrict to_v,
             T* __restrict to_g) {
  const auto [beta1, share1, beta2, share2, eps, weight_decay, size] = rates;
  for (int64_t i = 0; i < count; ++i) {
    const T gradient = g[i] + weight_decay * p[i];
    const T new_m = m[i] + share1 * (gradient - m[i]);
    const T new_v = beta2 * v[i] + share2 * gradient * gradient;
    const T root = root_of(new_v);
    const T scaled = size * to_p[i] / (root + eps);
    const T to_new_m = to_m[i] - scaled;
    // the root has an infinite slope at 0
    const T positive = new_v == 0 ? T(1) : root;
    const T to_new_v = new_v == 0 ? T(0) : to_v[i] + scaled * new_m / (2 * positive * (positive + eps));
    const T to_gradient = share1 * to_new_m + 2 * share2 * gradient * to_new_v;
    to_p[i] += weight_decay * to_gradient;
    to_m[i] = beta1 * to_new_m;
    to_v[i] = beta2 * to_new_v;
    to_g[i] = to_gradient;
  }
}

template <typename T>
constexpr Adam<T> kAdam = {step<T>, adjoint<T>};

}  // namespace

extern const Adam<float> TD3_FAST_CONCAT(float_adam_, TD3_FAST_INSTRUCTION_SET);
extern const Adam<double> TD3_FAST_CONCAT(double_adam_, TD3_FAST_INSTRUCTION_SET);
const Adam<float> TD3_FAST_CONCAT(float_adam_, TD3_FAST_INSTRUCTION_SET) = kAdam<float>;
const Adam<double> TD3_FAST_CONCAT(double_adam_, TD3_FAST_INSTRUCTION_SET) = kAdam<double>;

}  // namespace td3_fast::cpu
