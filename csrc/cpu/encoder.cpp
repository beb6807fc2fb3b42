// The causal encoder on the CPU: forward, backward and double backward; the passes are in
// encoder_kernels.cpp.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "encoder_calls.h"

namespace td3_fast::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor causal_encoder_forward(const Tensor& parameters,
                              const Tensor& inputs,
                              const Tensor& positions,
                              at::TensorList words,
                              at::IntArrayRef sizes) {
  const EncoderOptions options(parameters, inputs, positions, words, sizes);
  return with_type(inputs, [&](auto zero) {
    using T = decltype(zero);
    EncoderInputs<T> in(options, parameters, inputs, positions, words);
    const Tensor outputs =
        at::empty({options.batch, options.sizes.asked, options.sizes.width}, inputs.options());
    in.call.outputs = outputs.mutable_data_ptr<T>();
    const Encoder<T>& e = encoder<T>();
    for_groups<T>(options.sizes, options.batch, e.scratch_size(options.sizes, false), kForwardCost, Tensor(),
                  [&](int64_t first, int64_t count, void* scratch, T*) {
                    e.values.forward(in.call, first, count, scratch);
                  });
    return outputs;
  });
}

Tensor encode_histories(const Tensor& parameters,
                        const Tensor& items,
                        const Tensor& histories,
                        const Tensor& lengths,
                        at::TensorList words,
                        at::IntArrayRef sizes) {
  check_histories(items, histories, lengths);
  const Tensor rows = at::index_select(items, 0, histories.reshape(-1));
  const Tensor inputs = rows.view({histories.size(0), histories.size(1), -1});
  return causal_encoder_forward(parameters, inputs, (lengths - 1).unsqueeze(1), words, sizes).squeeze(1);
}

std::tuple<Tensor, Tensor> causal_encoder_backward(const Tensor& grad_outputs,
                                                   const Tensor& parameters,
                                                   const Tensor& inputs,
                                                   const Tensor& positions,
                                                   at::TensorList words,
                                                   at::IntArrayRef sizes,
                                                   bool needs_inputs) {
  const EncoderOptions options(parameters, inputs, positions, words, sizes);
  return with_type(inputs, [&](auto zero) {
    using T = decltype(zero);
    EncoderInputs<T> in(options, parameters, inputs, positions, words);
    const Tensor grad = grad_outputs.contiguous();
    const Tensor grad_parameters = at::empty_like(in.parameters);
    const Tensor grad_inputs =
        needs_inputs ? at::empty(inputs.sizes(), inputs.options()) : at::empty({0}, inputs.options());
    in.call.grad_outputs = grad.const_data_ptr<T>();
    if (needs_inputs) in.call.grad_inputs = grad_inputs.mutable_data_ptr<T>();
    const Encoder<T>& e = encoder<T>();
    for_groups<T>(options.sizes, options.batch, e.scratch_size(options.sizes, false), kBackwardCost,
                  grad_parameters, [&](int64_t first, int64_t count, void* scratch, T* sums) {
                    e.values.forward(in.call, first, count, scratch);
                    e.values.backward(scratch, sums);
                  });
    return std::make_tuple(grad_parameters, grad_inputs);
  });
}

std::tuple<Tensor, Tensor, Tensor> causal_encoder_double_backward(const OptionalTensor& grad_grad_parameters,
                                                                  const OptionalTensor& grad_grad_inputs,
                                                                  const Tensor& grad_outputs,
                                                                  const Tensor& parameters,
                                                                  const Tensor& inputs,
                                                                  const Tensor& positions,
                                                                  at::TensorList words,
                                                                  at::IntArrayRef sizes,
                                                                  bool needs_inputs) {
  const EncoderOptions options(parameters, inputs, positions, words, sizes);
  return with_type(inputs, [&](auto zero) {
    using T = decltype(zero);
    EncoderInputs<T> in(options, parameters, inputs, positions, words);
    const Tensor grad = grad_outputs.contiguous();
    const Tensor to_parameters =
        grad_grad_parameters.has_value() ? grad_grad_parameters->contiguous() : at::zeros_like(in.parameters);
    const Tensor to_inputs = grad_grad_inputs.has_value() ? in.whole_sequences(*grad_grad_inputs) : Tensor();
    const Tensor outputs = at::empty_like(grad), grad_parameters = at::empty_like(in.parameters);
    const Tensor grad_inputs =
        needs_inputs ? at::empty(inputs.sizes(), inputs.options()) : at::empty({0}, inputs.options());
    in.call.parameters_tangent = to_parameters.const_data_ptr<T>();
    if (to_inputs.defined()) in.move_inputs(to_inputs);
    in.call.grad_outputs = grad.const_data_ptr<T>();
    in.call.outputs = outputs.mutable_data_ptr<T>();
    if (needs_inputs) in.call.grad_inputs = grad_inputs.mutable_data_ptr<T>();
    const Encoder<T>& e = encoder<T>();
    for_groups<T>(options.sizes, options.batch, e.scratch_size(options.sizes, true), kDoubleBackwardCost,
                  grad_parameters, [&](int64_t first, int64_t count, void* scratch, T* sums) {
                    e.duals.forward(in.call, first, count, scratch);
                    e.duals.backward(scratch, sums);
                  });
    return std::make_tuple(outputs, grad_parameters, grad_inputs);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(td3_fast, CPU, m) {
  m.impl("causal_encoder_forward", causal_encoder_forward);
  m.impl("causal_encoder_backward", causal_encoder_backward);
  m.impl("causal_encoder_double_backward", causal_encoder_double_backward);
  m.impl("encode_histories", encode_histories);
}

// What it returns has no history: a derivative of it raises instead of being zero.
TORCH_LIBRARY_IMPL(td3_fast, Autograd, m) {
  m.impl("encode_histories", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace td3_fast::cpu
