// The encoder on the CPU: forward, backward and double backward; the passes are in
// encoder_kernels.cpp.

#include "encoder_calls.h"
#include "registration.h"

namespace td3_fast::cpu {

Tensor transformer_encoder_forward(const Tensor& parameters,
                                   const Tensor& inputs,
                                   const Tensor& positions,
                                   at::TensorList words,
                                   at::IntArrayRef sizes) {
  const EncoderOptions options(parameters, inputs, positions, words, sizes);
  return with_type(inputs, [&](auto zero) {
    using T = decltype(zero);
    EncoderInputs<T> in(options, parameters, inputs, positions, words);
    const Tensor outputs = inputs.new_empty({options.batch, options.sizes.asked, options.sizes.width});
    in.call.outputs = outputs.mutable_data_ptr<T>();
    const Encoder<T>& e = encoder<T>();
    for_groups<T>(
        options.sizes, options.batch, e.scratch_size(options.sizes, false), kForwardCost, Tensor(),
        [&](int64_t first, int64_t count, void* scratch, T*) { e.outputs(in.call, first, count, scratch); });
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
  const Tensor rows = items.index_select(0, histories.reshape(-1));
  const Tensor inputs = rows.view({histories.size(0), histories.size(1), items.size(1)});
  const Tensor positions = lengths.sub(1).unsqueeze(1);
  EncoderOptions(parameters, inputs, positions, words, sizes).check_causal();
  return transformer_encoder_forward(parameters, inputs, positions, words, sizes).squeeze(1);
}

std::tuple<Tensor, Tensor> transformer_encoder_backward(const Tensor& grad_outputs,
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
    const Tensor grad_parameters = parameters.new_empty(parameters.sizes());
    const Tensor grad_inputs = needs_inputs ? inputs.new_empty(inputs.sizes()) : inputs.new_empty({0});
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

std::tuple<Tensor, Tensor, Tensor> transformer_encoder_double_backward(
    const OptionalTensor& grad_grad_parameters,
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
    const Tensor to_parameters = grad_grad_parameters.has_value() ? grad_grad_parameters->contiguous()
                                                                  : parameters.new_zeros(parameters.sizes());
    const Tensor to_inputs = grad_grad_inputs.has_value() ? in.whole_sequences(*grad_grad_inputs) : Tensor();
    const Tensor outputs = grad.new_empty(grad.sizes());
    const Tensor grad_parameters = parameters.new_empty(parameters.sizes());
    const Tensor grad_inputs = needs_inputs ? inputs.new_empty(inputs.sizes()) : inputs.new_empty({0});
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

}  // namespace td3_fast::cpu
