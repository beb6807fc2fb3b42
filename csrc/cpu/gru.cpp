// The gated recurrent layer on the CPU: forward, backward and double backward; the passes are in
// gru_kernels.cpp.

#include "gru.h"

#include "../checks.h"
#include "groups.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

// Measured cost of each order, in plain multiply-adds for each one of a forward pass.
constexpr int64_t kForwardCost = 1, kBackwardCost = 4, kDoubleBackwardCost = 12;

// The tensors that every order reads, and a call on them whose outputs are still to be filled in.
template <typename T>
struct GruInputs {
  Tensor inputs, input_weight, state_weight, lengths;
  std::vector<int64_t> order;
  GruCall<T> call{};

  GruInputs(const Tensor& inputs_in,
            const Tensor& input_weight_in,
            const Tensor& state_weight_in,
            const Tensor& lengths_in)
      : inputs(inputs_in.contiguous()),
        input_weight(input_weight_in.contiguous()),
        state_weight(state_weight_in.contiguous()),
        lengths(lengths_in.contiguous()) {
    call.sizes = {inputs.size(1), inputs.size(2), state_weight.size(1)};
    call.inputs = inputs.const_data_ptr<T>();
    call.input_weight = input_weight.const_data_ptr<T>();
    call.state_weight = state_weight.const_data_ptr<T>();
    call.lengths = lengths.const_data_ptr<int64_t>();
    order = longest_first(call.lengths, batch(), call.sizes.length);
    call.order = order.data();
  }

  int64_t batch() const { return inputs.size(0); }
  int64_t of_inputs() const { return input_weight.numel(); }

  template <typename Run>
  void for_groups(bool tangents, int64_t cost, const Tensor& sums, const Run& run) const {
    const int64_t steps = std::accumulate(call.lengths, call.lengths + batch(), int64_t{0});
    run_groups<T>(gru<T>().lanes, batch(), gru<T>().scratch_size(call.sizes, tangents),
                  cost * steps * (of_inputs() + state_weight.numel()), sums, run);
  }
};

void check_gru(const Tensor& inputs,
               const Tensor& input_weight,
               const Tensor& state_weight,
               const Tensor& lengths) {
  TORCH_CHECK_VALUE(
      inputs.dim() == 3 && input_weight.dim() == 2 && state_weight.dim() == 2 &&
          state_weight.size(0) == 3 * state_weight.size(1) && input_weight.size(0) == state_weight.size(0) &&
          input_weight.size(1) == inputs.size(2),
      "expected inputs (batch, length, d), an input weight (3 h, d) and a state weight (3 h, h), got ",
      inputs.sizes(), ", ", input_weight.sizes(), " and ", state_weight.sizes());
  TORCH_CHECK_VALUE((inputs.scalar_type() == at::kFloat || inputs.scalar_type() == at::kDouble) &&
                        input_weight.scalar_type() == inputs.scalar_type() &&
                        state_weight.scalar_type() == inputs.scalar_type(),
                    "inputs and weights must all be float32 or all float64");
  TORCH_CHECK_VALUE(
      lengths.dim() == 1 && lengths.size(0) == inputs.size(0) && lengths.scalar_type() == at::kLong,
      "expected int64 lengths (batch,), got ", lengths.sizes(), " of ", lengths.scalar_type());
}

Tensor like_states(const Tensor& inputs, const Tensor& state_weight) {
  return inputs.new_empty({inputs.size(0), inputs.size(1), state_weight.size(1)});
}

void check_upstream(const Tensor& grad_states, const Tensor& inputs, const Tensor& state_weight) {
  TORCH_CHECK_VALUE(grad_states.dim() == 3 && grad_states.size(0) == inputs.size(0) &&
                        grad_states.size(1) == inputs.size(1) &&
                        grad_states.size(2) == state_weight.size(1) &&
                        grad_states.scalar_type() == inputs.scalar_type(),
                    "expected a gradient of states (batch, length, h) of the dtype of the inputs, got ",
                    grad_states.sizes(), " of ", grad_states.scalar_type());
}

}  // namespace

Tensor gru_forward(const Tensor& inputs,
                   const Tensor& input_weight,
                   const Tensor& state_weight,
                   const Tensor& lengths) {
  check_gru(inputs, input_weight, state_weight, lengths);
  return with_type(inputs, [&](auto zero) {
    using T = decltype(zero);
    GruInputs<T> in(inputs, input_weight, state_weight, lengths);
    const Tensor states = like_states(inputs, state_weight);
    in.call.states = states.mutable_data_ptr<T>();
    in.for_groups(false, kForwardCost, Tensor(), [&](int64_t first, int64_t count, void* scratch, T*) {
      gru<T>().forward(in.call, first, count, scratch);
    });
    return states;
  });
}

std::tuple<Tensor, Tensor, Tensor> gru_backward(const Tensor& grad_states,
                                                const Tensor& inputs,
                                                const Tensor& input_weight,
                                                const Tensor& state_weight,
                                                const Tensor& lengths,
                                                bool needs_inputs) {
  check_gru(inputs, input_weight, state_weight, lengths);
  check_upstream(grad_states, inputs, state_weight);
  return with_type(inputs, [&](auto zero) {
    using T = decltype(zero);
    GruInputs<T> in(inputs, input_weight, state_weight, lengths);
    const Tensor grad = grad_states.contiguous(), sums = sums_of(input_weight, state_weight);
    const Tensor grad_inputs = needs_inputs ? inputs.new_empty(inputs.sizes()) : inputs.new_empty({0});
    in.call.grad_states = grad.const_data_ptr<T>();
    if (needs_inputs) in.call.grad_inputs = grad_inputs.mutable_data_ptr<T>();
    in.for_groups(false, kBackwardCost, sums, [&](int64_t first, int64_t count, void* scratch, T* to) {
      gru<T>().backward(in.call, first, count, scratch, to);
    });
    const auto [of_inputs, of_states] = split_sums<T>(sums, input_weight, state_weight);
    return std::make_tuple(grad_inputs, of_inputs, of_states);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_double_backward(const OptionalTensor& grad_grad_inputs,
                                                               const OptionalTensor& grad_grad_input_weight,
                                                               const OptionalTensor& grad_grad_state_weight,
                                                               const Tensor& grad_states,
                                                               const Tensor& inputs,
                                                               const Tensor& input_weight,
                                                               const Tensor& state_weight,
                                                               const Tensor& lengths,
                                                               bool needs_inputs) {
  check_gru(inputs, input_weight, state_weight, lengths);
  check_upstream(grad_states, inputs, state_weight);
  return with_type(inputs, [&](auto zero) {
    using T = decltype(zero);
    GruInputs<T> in(inputs, input_weight, state_weight, lengths);
    const Tensor to_input_weight = direction_or_zeros(grad_grad_input_weight, input_weight);
    const Tensor to_state_weight = direction_or_zeros(grad_grad_state_weight, state_weight);
    const Tensor to_inputs = direction(grad_grad_inputs, inputs);
    const Tensor grad = grad_states.contiguous(), sums = sums_of(input_weight, state_weight);
    const Tensor states = like_states(inputs, state_weight);
    const Tensor grad_inputs = needs_inputs ? inputs.new_empty(inputs.sizes()) : inputs.new_empty({0});
    in.call.input_weight_tangent = to_input_weight.const_data_ptr<T>();
    in.call.state_weight_tangent = to_state_weight.const_data_ptr<T>();
    if (to_inputs.defined()) in.call.inputs_tangent = to_inputs.const_data_ptr<T>();
    in.call.grad_states = grad.const_data_ptr<T>();
    in.call.states = states.mutable_data_ptr<T>();
    if (needs_inputs) in.call.grad_inputs = grad_inputs.mutable_data_ptr<T>();
    in.for_groups(true, kDoubleBackwardCost, sums, [&](int64_t first, int64_t count, void* scratch, T* to) {
      gru<T>().double_backward(in.call, first, count, scratch, to);
    });
    const auto [of_inputs, of_states] = split_sums<T>(sums, input_weight, state_weight);
    return std::make_tuple(states, grad_inputs, of_inputs, of_states);
  });
}

}  // namespace td3_fast::cpu
