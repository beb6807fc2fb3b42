// The encoder on CUDA, at every order. Compiled against any PyTorch; no header of CUDA is included.

#include "encoder_call.h"

namespace td3_fast::cuda {

Tensor transformer_encoder_forward(const Tensor& parameters,
                                   const Tensor& inputs,
                                   const Tensor& positions,
                                   at::TensorList words,
                                   at::IntArrayRef sizes) {
  EncoderCall call(parameters, inputs, positions, words, sizes);
  const Tensor outputs = call.outputs();
  call.forward();
  return outputs;
}

std::tuple<Tensor, Tensor> transformer_encoder_backward(const Tensor& grad_outputs,
                                                        const Tensor& parameters,
                                                        const Tensor& inputs,
                                                        const Tensor& positions,
                                                        at::TensorList words,
                                                        at::IntArrayRef sizes,
                                                        bool needs_inputs) {
  EncoderCall call(parameters, inputs, positions, words, sizes);
  call.set_upstream(grad_outputs, std::nullopt);
  const Tensor grad_inputs = needs_inputs ? call.grad_inputs(inputs.size(1)) : nothing(inputs);
  return {std::get<0>(call.backward()), grad_inputs};
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
  EncoderCall call(parameters, inputs, positions, words, sizes);
  call.move(grad_grad_parameters ? *grad_grad_parameters : parameters.new_zeros(parameters.sizes()),
            grad_grad_inputs);
  call.set_upstream(grad_outputs, std::nullopt);
  const Tensor outputs = call.outputs();
  const Tensor grad_inputs = needs_inputs ? call.grad_inputs(inputs.size(1)) : nothing(inputs);
  return {outputs, std::get<0>(call.backward()), grad_inputs};
}

Tensor encode_histories(const Tensor& parameters,
                        const Tensor& items,
                        const Tensor& histories,
                        const Tensor& lengths,
                        at::TensorList words,
                        at::IntArrayRef sizes) {
  check_histories(items, histories, lengths);
  EncoderCall call(parameters, shape_of_rows(items, histories), last_positions(lengths), words, sizes, kLast);
  call.look_up(items, histories);
  const Tensor outputs = call.outputs();
  call.forward();
  return outputs.squeeze(1);
}

}  // namespace td3_fast::cuda
