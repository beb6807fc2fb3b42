// Adam's step and its vector-Jacobian product: a thread for each element, in the arithmetic of the tensors'
// type. A size that lies on the device is read there, so that a captured graph takes the one of its replay.

#include "../adam_rates.h"
#include "device.cuh"
#include "kernels.h"

namespace td3_fast::cuda {
namespace {

constexpr int kThreads = 256;

// One element, and what a step makes of it.
template <typename T>
struct Stepped {
  T size, gradient, first_moment, second_moment;

  __device__ Stepped(const AdamCall& call, const AdamRates<T>& rates, int64_t i) {
    size = call.size_on_device == nullptr ? rates.size : *static_cast<const T*>(call.size_on_device);
    const T before = static_cast<const T*>(call.first_moment)[i];
    gradient = static_cast<const T*>(call.gradient)[i] +
               rates.weight_decay * static_cast<const T*>(call.parameter)[i];
    first_moment = before + rates.share1 * (gradient - before);
    second_moment =
        rates.beta2 * static_cast<const T*>(call.second_moment)[i] + rates.share2 * gradient * gradient;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) adam_step_kernel(AdamCall call, AdamRates<T> rates) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= call.count) return;
  const Stepped<T> after(call, rates, i);
  static_cast<T*>(call.overwritten[0])[i] -=
      after.size * after.first_moment / (square_root(after.second_moment) + rates.eps);
  static_cast<T*>(call.overwritten[1])[i] = after.first_moment;
  static_cast<T*>(call.overwritten[2])[i] = after.second_moment;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) adam_adjoint_kernel(AdamCall call, AdamRates<T> rates) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= call.count) return;
  const Stepped<T> after(call, rates, i);
  T& to_parameter = static_cast<T*>(call.overwritten[0])[i];
  T& to_first_moment = static_cast<T*>(call.overwritten[1])[i];
  T& to_second_moment = static_cast<T*>(call.overwritten[2])[i];
  const T root = square_root(after.second_moment), divisor = root + rates.eps;
  const T scaled = after.size * to_parameter / divisor;
  const T to_new_first = to_first_moment - scaled;
  // the root has an infinite slope at 0
  T to_new_second = 0;
  if (after.second_moment != 0) {
    to_new_second = to_second_moment + scaled * after.first_moment / (2 * root * divisor);
  }
  const T to_gradient = rates.share1 * to_new_first + 2 * rates.share2 * after.gradient * to_new_second;
  to_parameter += rates.weight_decay * to_gradient;
  to_first_moment = rates.beta1 * to_new_first;
  to_second_moment = rates.beta2 * to_new_second;
  static_cast<T*>(call.to_gradient)[i] = to_gradient;
}

template <typename T>
const char* run(void (*kernel)(AdamCall, AdamRates<T>), const AdamCall& call, void* stream) {
  const dim3 grid(static_cast<unsigned>((call.count + kThreads - 1) / kThreads));
  return launch(kernel, grid, kThreads, 0, stream, call,
                rounded_rates<T>(call.beta1, call.beta2, call.eps, call.weight_decay, call.size));
}

}  // namespace

const char* adam_step(const AdamCall& call, void* stream) {
  return call.float64 ? run(adam_step_kernel<double>, call, stream)
                      : run(adam_step_kernel<float>, call, stream);
}

const char* adam_adjoint(const AdamCall& call, void* stream) {
  return call.float64 ? run(adam_adjoint_kernel<double>, call, stream)
                      : run(adam_adjoint_kernel<float>, call, stream);
}

}  // namespace td3_fast::cuda
