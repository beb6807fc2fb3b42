// What the autograd nodes of this library share: calls of operators, tangents, and the refusal of a third
// order.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "dispatch.h"

namespace td3_fast {

using at::Tensor;
using torch::autograd::collect_next_edges;
using torch::autograd::compute_requires_grad;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::set_history;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// The pointer that autograd holds nodes by: intrusive since PyTorch 2.13, shared before.
using NodePointer = decltype(torch::autograd::Edge::function);

template <typename N, typename Pointer = NodePointer, typename... Args>
auto make_node(Args&&... args) {
  if constexpr (requires { typename Pointer::weak_type; }) {
    return std::shared_ptr<N>(new N(std::forward<Args>(args)...), [](N* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<N>(std::forward<Args>(args)...);
  }
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

inline Tensor tangent_of(const Tensor& tensor) {
  return tensor._fw_grad(/*level=*/0);
}

inline OptionalTensor optional_tangent_of(const Tensor& tensor) {
  return tensor.defined() ? if_defined(tangent_of(tensor)) : std::nullopt;
}

inline Tensor primal_of(const Tensor& tensor) {
  return tensor.defined() ? tensor._fw_primal(/*level=*/0) : tensor;
}

template <typename... Tensors>
bool any_tangent(const Tensors&... tensors) {
  return (... || (tensors.defined() && tangent_of(tensors).defined()));
}

inline void set_tangent(const Tensor& output, const Tensor& tangent) {
  output._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

inline Tensor sum_of_defined(const Tensor& a, const Tensor& b) {
  if (!a.defined()) return b;
  return b.defined() ? a.add(b) : a;
}

// The tangents of first-order gradients: what moves with the inputs, and what with the upstream gradients.
template <size_t... I, size_t N, typename Tuple, typename WithInputs, typename WithUpstream>
void set_gradient_tangents(std::index_sequence<I...>,
                           const std::array<bool, N>& needed,
                           const Tuple& gradients,
                           const WithInputs& with_inputs,
                           const WithUpstream& with_upstream) {
  ((needed[I] ? set_tangent(std::get<I>(gradients),
                            sum_of_defined(std::get<I>(with_inputs), std::get<I>(with_upstream)))
              : void()),
   ...);
}

template <typename... Tensors>
void check_no_tangent(const char* name, const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!any_tangent(tensors...), name, " has no forward-mode derivative");
}

// Gives the outputs of a second-order operator a history that raises: a third order must not be silently
// zero.
template <typename... Inputs>
void forbid_third_order(const char* name, const variable_list& outputs, const Inputs&... inputs) {
  check_no_tangent(name, inputs...);
  if (!compute_requires_grad(inputs...)) return;
  const auto node = make_node<torch::autograd::Error>(
      std::string(name) + " is not differentiable: the op has first and second derivatives, but no third");
  node->set_next_edges(collect_next_edges(inputs...));
  for (const Tensor& output : outputs) set_history(output, node);
}

// A node of one of this library's operators.
struct OpNode : Node {
  template <size_t N>
  std::array<bool, N> outputs_needed() const {
    std::array<bool, N> needed{};
    for (size_t i = 0; i < N; ++i) needed[i] = task_should_compute_output(i);
    return needed;
  }
};

template <size_t N, typename Tuple>
variable_list keep_needed(const std::array<bool, N>& needed, const Tuple& gradients) {
  variable_list kept(N);
  [&]<size_t... I>(std::index_sequence<I...>) {
    ((needed[I] ? void(kept[I] = std::get<I>(gradients)) : void()), ...);
  }(std::make_index_sequence<N>());
  return kept;
}

}  // namespace td3_fast
