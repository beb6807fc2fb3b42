// What the CPU and CUDA implementations of Adam ask of their tensors, and tell autograd of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace td3_fast {

// Tensors alike; rates (beta1, beta2, eps, weight_decay, size), or without the last where `size` holds it.
inline void check_adam(std::initializer_list<const at::Tensor*> tensors,
                       at::ArrayRef<double> rates,
                       const std::optional<at::Tensor>& size) {
  const at::Tensor& first = **tensors.begin();
  for (const at::Tensor* tensor : tensors) {
    TORCH_CHECK_VALUE(tensor->sizes() == first.sizes() && tensor->scalar_type() == first.scalar_type() &&
                          tensor->device() == first.device() && tensor->is_contiguous() &&
                          (first.scalar_type() == at::kFloat || first.scalar_type() == at::kDouble),
                      "expected contiguous tensors alike in shape, all float32 or all float64, got ",
                      tensor->sizes(), " beside ", first.sizes());
  }
  TORCH_CHECK_VALUE(
      rates.size() == (size.has_value() ? 4 : 5),
      "expected rates (beta1, beta2, eps, weight_decay, size), the last in them or in a tensor");
  TORCH_CHECK_VALUE(!size.has_value() || (size->numel() == 1 && size->scalar_type() == first.scalar_type() &&
                                          size->device() == first.device()),
                    "expected a size of one element, of the dtype and on the device of the parameter");
}

// What autograd saved of these tensors is no more: it raises rather than reads them.
inline void overwritten(std::initializer_list<const at::Tensor*> tensors) {
  for (const at::Tensor* tensor : tensors) tensor->unsafeGetTensorImpl()->bump_version();
}

}  // namespace td3_fast
