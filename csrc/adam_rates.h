// The numbers of an optimiser step, for the CPU and for CUDA.
#pragma once

namespace td3_fast {

// As td3_fast/unroll/adam.py has them; `size` is what m / (sqrt(v) + eps) is multiplied by.
template <typename T>
struct AdamRates {
  T beta1, share1, beta2, share2, eps, weight_decay, size;
};

namespace {  // built once per instruction set, see cpu/vectors.h

// The shares of the new gradient, 1 - beta, are rounded after they are taken.
template <typename T>
AdamRates<T> rounded_rates(double beta1, double beta2, double eps, double weight_decay, double size) {
  return {static_cast<T>(beta1),     static_cast<T>(1 - beta1), static_cast<T>(beta2),
          static_cast<T>(1 - beta2), static_cast<T>(eps),       static_cast<T>(weight_decay),
          static_cast<T>(size)};
}

}  // namespace
}  // namespace td3_fast
