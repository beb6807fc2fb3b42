// Derivatives of the transformer encoder: twice differentiable in its parameters and inputs; a third order
// raises.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "autograd.h"

namespace td3_fast {
namespace {

using torch::autograd::AutogradContext;

Tensor call_forward(const Tensor& parameters,
                    const Tensor& inputs,
                    const Tensor& positions,
                    at::TensorList words,
                    at::IntArrayRef sizes) {
  static const auto op = find_operator<decltype(call_forward)>("td3_fast::transformer_encoder_forward");
  return op.call(parameters, inputs, positions, words, sizes);
}

std::tuple<Tensor, Tensor> call_backward(const Tensor& grad_outputs,
                                         const Tensor& parameters,
                                         const Tensor& inputs,
                                         const Tensor& positions,
                                         at::TensorList words,
                                         at::IntArrayRef sizes,
                                         bool needs_inputs) {
  static const auto op = find_operator<decltype(call_backward)>("td3_fast::transformer_encoder_backward");
  return op.call(grad_outputs, parameters, inputs, positions, words, sizes, needs_inputs);
}

std::tuple<Tensor, Tensor, Tensor> call_double_backward(const std::optional<Tensor>& grad_grad_parameters,
                                                        const std::optional<Tensor>& grad_grad_inputs,
                                                        const Tensor& grad_outputs,
                                                        const Tensor& parameters,
                                                        const Tensor& inputs,
                                                        const Tensor& positions,
                                                        at::TensorList words,
                                                        at::IntArrayRef sizes,
                                                        bool needs_inputs) {
  static const auto op =
      find_operator<decltype(call_double_backward)>("td3_fast::transformer_encoder_double_backward");
  return op.call(grad_grad_parameters, grad_grad_inputs, grad_outputs, parameters, inputs, positions, words,
                 sizes, needs_inputs);
}

// What all three orders carry besides their differentiable inputs. Positions are saved as these are, so that
// autograd says so where they were overwritten.
struct Constants {
  Tensor positions;
  std::vector<Tensor> words;
  std::vector<int64_t> sizes;

  void save(AutogradContext* context) const {
    context->saved_data["words"] = words;
    context->saved_data["sizes"] = sizes;
  }
  static Constants of(AutogradContext* context, const Tensor& positions) {
    return {positions, context->saved_data["words"].toTensorVector(),
            context->saved_data["sizes"].toIntVector()};
  }
};

struct DoubleBackward : torch::autograd::Function<DoubleBackward> {
  static variable_list forward(AutogradContext*,
                               const std::optional<Tensor>& grad_grad_parameters,
                               const std::optional<Tensor>& grad_grad_inputs,
                               const Tensor& grad_outputs,
                               const Tensor& parameters,
                               const Tensor& inputs,
                               const Constants& constants,
                               bool needs_inputs) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [a, b, c] =
        call_double_backward(grad_grad_parameters, grad_grad_inputs, grad_outputs, parameters, inputs,
                             constants.positions, constants.words, constants.sizes, needs_inputs);
    return {a, b, c};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "transformer_encoder is differentiable twice, not three times");
  }
};

struct Backward : torch::autograd::Function<Backward> {
  static variable_list forward(AutogradContext* context,
                               const Tensor& grad_outputs,
                               const Tensor& parameters,
                               const Tensor& inputs,
                               const Constants& constants,
                               bool needs_inputs) {
    context->save_for_backward({grad_outputs, parameters, inputs, constants.positions});
    context->set_materialize_grads(false);
    constants.save(context);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [a, b] = call_backward(grad_outputs, parameters, inputs, constants.positions, constants.words,
                                constants.sizes, needs_inputs);
    return {a, b};
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const bool needs_inputs = context->needs_input_grad(2);
    const variable_list result =
        DoubleBackward::apply(if_defined(grads[0]), if_defined(grads[1]), saved[0], saved[1], saved[2],
                              Constants::of(context, saved[3]), needs_inputs);
    return {result[0], result[1], needs_inputs ? result[2] : Tensor(), Tensor(), Tensor()};
  }
};

struct Forward : torch::autograd::Function<Forward> {
  static Tensor forward(AutogradContext* context,
                        const Tensor& parameters,
                        const Tensor& inputs,
                        const Constants& constants) {
    context->save_for_backward({parameters, inputs, constants.positions});
    constants.save(context);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_forward(parameters, inputs, constants.positions, constants.words, constants.sizes);
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const bool needs_inputs = context->needs_input_grad(1);
    const variable_list result =
        Backward::apply(grads[0], saved[0], saved[1], Constants::of(context, saved[2]), needs_inputs);
    return {result[0], needs_inputs ? result[1] : Tensor(), Tensor()};
  }
};

Tensor transformer_encoder_forward(const Tensor& parameters,
                                   const Tensor& inputs,
                                   const Tensor& positions,
                                   at::TensorList words,
                                   at::IntArrayRef sizes) {
  return Forward::apply(parameters, inputs, Constants{positions, words.vec(), sizes.vec()});
}

std::tuple<Tensor, Tensor> transformer_encoder_backward(const Tensor& grad_outputs,
                                                        const Tensor& parameters,
                                                        const Tensor& inputs,
                                                        const Tensor& positions,
                                                        at::TensorList words,
                                                        at::IntArrayRef sizes,
                                                        bool needs_inputs) {
  const variable_list result = Backward::apply(grad_outputs, parameters, inputs,
                                               Constants{positions, words.vec(), sizes.vec()}, needs_inputs);
  return {result[0], result[1]};
}

std::tuple<Tensor, Tensor, Tensor> transformer_encoder_double_backward(
    const std::optional<Tensor>& grad_grad_parameters,
    const std::optional<Tensor>& grad_grad_inputs,
    const Tensor& grad_outputs,
    const Tensor& parameters,
    const Tensor& inputs,
    const Tensor& positions,
    at::TensorList words,
    at::IntArrayRef sizes,
    bool needs_inputs) {
  const variable_list result =
      DoubleBackward::apply(grad_grad_parameters, grad_grad_inputs, grad_outputs, parameters, inputs,
                            Constants{positions, words.vec(), sizes.vec()}, needs_inputs);
  return {result[0], result[1], result[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(td3_fast, Autograd, m) {
  m.impl("transformer_encoder_forward", transformer_encoder_forward);
  m.impl("transformer_encoder_backward", transformer_encoder_backward);
  m.impl("transformer_encoder_double_backward", transformer_encoder_double_backward);
}

}  // namespace td3_fast
