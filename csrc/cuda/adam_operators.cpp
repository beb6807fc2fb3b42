// The CUDA operators of Adam's step and its adjoint; see adam.cu.

#include <c10/core/DeviceGuard.h>

#include "../adam_arguments.h"
#include "kernels.h"
#include "operators.h"

namespace td3_fast::cuda {
namespace {

AdamCall adam_call(const Tensor& gradient, at::ArrayRef<double> rates, const OptionalTensor& size) {
  AdamCall call{};
  call.float64 = gradient.scalar_type() == at::kDouble;
  call.count = gradient.numel();
  call.beta1 = rates[0];
  call.beta2 = rates[1];
  call.eps = rates[2];
  call.weight_decay = rates[3];
  if (size.has_value()) {
    call.size_on_device = size->const_data_ptr();
  } else {
    call.size = rates[4];
  }
  call.gradient = gradient.const_data_ptr();
  return call;
}

}  // namespace

void adam_step_(const Tensor& parameter,
                const Tensor& first_moment,
                const Tensor& second_moment,
                const Tensor& gradient,
                at::ArrayRef<double> rates,
                const OptionalTensor& size) {
  check_adam({&parameter, &first_moment, &second_moment, &gradient}, rates, size);
  overwritten({&parameter, &first_moment, &second_moment});
  const c10::OptionalDeviceGuard guard(parameter.device());
  AdamCall call = adam_call(gradient, rates, size);
  call.parameter = call.overwritten[0] = parameter.mutable_data_ptr();
  call.first_moment = call.overwritten[1] = first_moment.mutable_data_ptr();
  call.second_moment = call.overwritten[2] = second_moment.mutable_data_ptr();
  if (call.count > 0) check_launch(adam_step(call, current_stream(parameter)));
}

Tensor adam_adjoint_(const Tensor& parameter,
                     const Tensor& first_moment,
                     const Tensor& second_moment,
                     const Tensor& gradient,
                     const Tensor& to_parameter,
                     const Tensor& to_first_moment,
                     const Tensor& to_second_moment,
                     at::ArrayRef<double> rates,
                     const OptionalTensor& size) {
  check_adam({&parameter, &first_moment, &second_moment, &gradient, &to_parameter, &to_first_moment,
              &to_second_moment},
             rates, size);
  overwritten({&to_parameter, &to_first_moment, &to_second_moment});
  const c10::OptionalDeviceGuard guard(parameter.device());
  const Tensor to_gradient = gradient.new_empty(gradient.sizes());
  AdamCall call = adam_call(gradient, rates, size);
  call.parameter = parameter.const_data_ptr();
  call.first_moment = first_moment.const_data_ptr();
  call.second_moment = second_moment.const_data_ptr();
  call.overwritten[0] = to_parameter.mutable_data_ptr();
  call.overwritten[1] = to_first_moment.mutable_data_ptr();
  call.overwritten[2] = to_second_moment.mutable_data_ptr();
  call.to_gradient = to_gradient.mutable_data_ptr();
  if (call.count > 0) check_launch(adam_adjoint(call, current_stream(parameter)));
  return to_gradient;
}

}  // namespace td3_fast::cuda
