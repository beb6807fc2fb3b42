// Of adam.cpp, what is called with no operator in between.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <array>

namespace td3_fast::cpu {

// The step of adam_step_ from a parameter and its moments to others, which are written.
void adam_step_from(const std::array<const at::Tensor*, 3>& state,
                    const std::array<const at::Tensor*, 3>& to,
                    const at::Tensor& gradient,
                    at::ArrayRef<double> rates);

}  // namespace td3_fast::cpu
