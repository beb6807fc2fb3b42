// Derivatives of soft_embedding: autograd nodes over the operators, which are differentiable themselves up to
// second order.
//
// Nodes rather than torch::autograd::Function, so that torch.func's transforms apply; and in C++, because the
// inner loop of a distillation crosses these nodes tens of thousands of times.
//
// Forward mode needs no kernels of its own. For a direction t of the inputs, the double backward's gradient
// towards the upstream gradients is J t, the tangent of the outputs; its gradients towards the inputs are the
// Hessian of <upstream, outputs> times t, the tangent of the first-order gradients, since a Hessian is
// symmetric. And J t is differentiable in its turn: its gradient towards t is the backward operator.

#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "autograd.h"

namespace td3_fast {
namespace {

ThreeTensors call_soft_embedding_forward(const Tensor& queries, const Tensor& keys, const Tensor& values) {
  static const auto op =
      find_operator<decltype(call_soft_embedding_forward)>("td3_fast::soft_embedding_forward");
  return op.call(queries, keys, values);
}

ThreeTensors call_soft_embedding_backward(const OptionalTensor& grad_embedding,
                                          const OptionalTensor& grad_logsumexp,
                                          const Tensor& queries,
                                          const Tensor& keys,
                                          const Tensor& values,
                                          const Tensor& embedding,
                                          const Tensor& logsumexp,
                                          const Tensor& remainder,
                                          std::array<bool, 3> needed) {
  static const auto op =
      find_operator<decltype(call_soft_embedding_backward)>("td3_fast::soft_embedding_backward");
  return op.call(grad_embedding, grad_logsumexp, queries, keys, values, embedding, logsumexp, remainder,
                 needed);
}

FiveTensors call_soft_embedding_double_backward(const OptionalTensor& grad_grad_queries,
                                                const OptionalTensor& grad_grad_keys,
                                                const OptionalTensor& grad_grad_values,
                                                const OptionalTensor& grad_embedding,
                                                const OptionalTensor& grad_logsumexp,
                                                const Tensor& queries,
                                                const Tensor& keys,
                                                const Tensor& values,
                                                const Tensor& embedding,
                                                const Tensor& logsumexp,
                                                const Tensor& remainder,
                                                std::array<bool, 5> needed) {
  static const auto op = find_operator<decltype(call_soft_embedding_double_backward)>(
      "td3_fast::soft_embedding_double_backward");
  return op.call(grad_grad_queries, grad_grad_keys, grad_grad_values, grad_embedding, grad_logsumexp, queries,
                 keys, values, embedding, logsumexp, remainder, needed);
}

struct SoftEmbeddingBackward final : OpNode {
  SavedVariable queries, keys, values, embedding, logsumexp;
  Tensor remainder;  // not differentiable

  std::string name() const override { return "SoftEmbeddingBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&queries, &keys, &values, &embedding, &logsumexp}) saved->reset_data();
    remainder.reset();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(3);
    const auto needed = outputs_needed<3>();
    return keep_needed(
        needed, call_soft_embedding_backward(if_defined(grads[0]), if_defined(grads[1]), queries.unpack(),
                                             keys.unpack(), values.unpack(), embedding.unpack(getptr()),
                                             logsumexp.unpack(getptr()), remainder, needed));
  }
};

struct SoftEmbeddingDoubleBackward final : OpNode {
  SavedVariable grad_embedding, grad_logsumexp, queries, keys, values, embedding, logsumexp;
  Tensor remainder;

  std::string name() const override { return "SoftEmbeddingDoubleBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved :
         {&grad_embedding, &grad_logsumexp, &queries, &keys, &values, &embedding, &logsumexp}) {
      saved->reset_data();
    }
    remainder.reset();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return variable_list(5);
    const auto needed = outputs_needed<5>();
    const Tensor grad_x = grad_embedding.unpack();
    FiveTensors gradients = call_soft_embedding_double_backward(
        if_defined(grads[0]), if_defined(grads[1]), if_defined(grads[2]), if_defined(grad_x),
        if_defined(grad_logsumexp.unpack()), queries.unpack(), keys.unpack(), values.unpack(),
        embedding.unpack(), logsumexp.unpack(), remainder, needed);
    return keep_needed(needed, gradients);
  }
};

// Of the double backward that was asked for nothing but J t.
struct SoftEmbeddingTangentBackward final : OpNode {
  SavedVariable tangent_queries, tangent_keys, tangent_values;
  SavedVariable queries, keys, values, embedding, logsumexp;
  Tensor remainder;

  std::string name() const override { return "SoftEmbeddingTangentBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&tangent_queries, &tangent_keys, &tangent_values, &queries, &keys, &values,
                                 &embedding, &logsumexp}) {
      saved->reset_data();
    }
    remainder.reset();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const OptionalTensor grad_x = if_defined(grads[3]), grad_l = if_defined(grads[4]);
    if (!grad_x.has_value() && !grad_l.has_value()) return variable_list(6);
    const auto needed = outputs_needed<6>();
    const Tensor q = queries.unpack(), k = keys.unpack(), v = values.unpack();
    const Tensor x = embedding.unpack(), l = logsumexp.unpack();
    ThreeTensors to_tangents;
    FiveTensors to_inputs;
    if (needed[0] || needed[1] || needed[2]) {
      to_tangents = call_soft_embedding_backward(grad_x, grad_l, q, k, v, x, l, remainder,
                                                 {needed[0], needed[1], needed[2]});
    }
    if (needed[3] || needed[4] || needed[5]) {
      to_inputs = call_soft_embedding_double_backward(
          if_defined(tangent_queries.unpack()), if_defined(tangent_keys.unpack()),
          if_defined(tangent_values.unpack()), grad_x, grad_l, q, k, v, x, l, remainder,
          {needed[3], needed[4], needed[5], false, false});
    }
    return keep_needed(needed, std::tuple_cat(to_tangents, to_inputs));
  }
};

ThreeTensors soft_embedding_forward(const Tensor& queries, const Tensor& keys, const Tensor& values) {
  const bool differentiates = compute_requires_grad(queries, keys, values);
  ThreeTensors result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_soft_embedding_forward(queries, keys, values);
  }();
  const auto& [embedding, logsumexp, remainder] = result;
  if (differentiates) {
    const auto node = make_node<SoftEmbeddingBackward>();
    node->set_next_edges(collect_next_edges(queries, keys, values));
    node->queries = SavedVariable(queries, false);
    node->keys = SavedVariable(keys, false);
    node->values = SavedVariable(values, false);
    set_history(embedding, node);
    set_history(logsumexp, node);
    node->embedding = SavedVariable(embedding, true);
    node->logsumexp = SavedVariable(logsumexp, true);
    node->remainder = remainder;
  }
  if (any_tangent(queries, keys, values)) {
    const Tensor primal = embedding._fw_primal(/*level=*/0);
    const FiveTensors tangents = call_soft_embedding_double_backward(
        if_defined(tangent_of(queries)), if_defined(tangent_of(keys)), if_defined(tangent_of(values)),
        at::zeros_like(primal), std::nullopt, queries._fw_primal(/*level=*/0), keys._fw_primal(/*level=*/0),
        values._fw_primal(/*level=*/0), primal, logsumexp._fw_primal(/*level=*/0), remainder,
        {false, false, false, true, true});
    set_tangent(embedding, std::get<3>(tangents));
    set_tangent(logsumexp, std::get<4>(tangents));
  }
  return result;
}

ThreeTensors soft_embedding_backward(const OptionalTensor& grad_embedding,
                                     const OptionalTensor& grad_logsumexp,
                                     const Tensor& queries,
                                     const Tensor& keys,
                                     const Tensor& values,
                                     const Tensor& embedding,
                                     const Tensor& logsumexp,
                                     const Tensor& remainder,
                                     std::array<bool, 3> needed) {
  const Tensor grad_x = or_undefined(grad_embedding), grad_l = or_undefined(grad_logsumexp);
  const bool differentiates = compute_requires_grad(grad_x, grad_l, queries, keys, values);
  ThreeTensors result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_soft_embedding_backward(grad_embedding, grad_logsumexp, queries, keys, values, embedding,
                                        logsumexp, remainder, needed);
  }();
  if (differentiates) {
    const auto node = make_node<SoftEmbeddingDoubleBackward>();
    node->set_next_edges(collect_next_edges(queries, keys, values, grad_x, grad_l));
    node->grad_embedding = SavedVariable(grad_x, false);
    node->grad_logsumexp = SavedVariable(grad_l, false);
    node->queries = SavedVariable(queries, false);
    node->keys = SavedVariable(keys, false);
    node->values = SavedVariable(values, false);
    node->embedding = SavedVariable(embedding, false);
    node->logsumexp = SavedVariable(logsumexp, false);
    node->remainder = remainder;
    for (const Tensor& output : {std::get<0>(result), std::get<1>(result), std::get<2>(result)}) {
      set_history(output, node);
    }
  }
  const bool inputs_move = any_tangent(queries, keys, values), upstream_moves = any_tangent(grad_x, grad_l);
  if (inputs_move || upstream_moves) {
    const Tensor q = primal_of(queries), k = primal_of(keys), v = primal_of(values);
    const Tensor x = primal_of(embedding), l = primal_of(logsumexp);
    FiveTensors with_inputs;
    ThreeTensors with_upstream;
    if (inputs_move) {
      with_inputs = call_soft_embedding_double_backward(
          optional_tangent_of(queries), optional_tangent_of(keys), optional_tangent_of(values),
          if_defined(primal_of(grad_x)), if_defined(primal_of(grad_l)), q, k, v, x, l, remainder,
          {needed[0], needed[1], needed[2], false, false});
    }
    if (upstream_moves) {
      with_upstream = call_soft_embedding_backward(optional_tangent_of(grad_x), optional_tangent_of(grad_l),
                                                   q, k, v, x, l, remainder, needed);
    }
    set_gradient_tangents(std::make_index_sequence<3>(), needed, result, with_inputs, with_upstream);
  }
  return result;
}

FiveTensors soft_embedding_double_backward(const OptionalTensor& grad_grad_queries,
                                           const OptionalTensor& grad_grad_keys,
                                           const OptionalTensor& grad_grad_values,
                                           const OptionalTensor& grad_embedding,
                                           const OptionalTensor& grad_logsumexp,
                                           const Tensor& queries,
                                           const Tensor& keys,
                                           const Tensor& values,
                                           const Tensor& embedding,
                                           const Tensor& logsumexp,
                                           const Tensor& remainder,
                                           std::array<bool, 5> needed) {
  FiveTensors result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_soft_embedding_double_backward(grad_grad_queries, grad_grad_keys, grad_grad_values,
                                               grad_embedding, grad_logsumexp, queries, keys, values,
                                               embedding, logsumexp, remainder, needed);
  }();
  const auto& [a, b, c, d, e] = result;
  const Tensor t_queries = or_undefined(grad_grad_queries), t_keys = or_undefined(grad_grad_keys),
               t_values = or_undefined(grad_grad_values);
  if (needed[0] || needed[1] || needed[2]) {
    forbid_third_order("soft_embedding_double_backward", {a, b, c, d, e}, t_queries, t_keys, t_values,
                       or_undefined(grad_embedding), or_undefined(grad_logsumexp), queries, keys, values);
    return result;
  }
  check_no_tangent("soft_embedding_double_backward", t_queries, t_keys, t_values, queries, keys, values);
  if (compute_requires_grad(t_queries, t_keys, t_values, queries, keys, values)) {
    const auto node = make_node<SoftEmbeddingTangentBackward>();
    node->set_next_edges(collect_next_edges(t_queries, t_keys, t_values, queries, keys, values));
    node->tangent_queries = SavedVariable(t_queries, false);
    node->tangent_keys = SavedVariable(t_keys, false);
    node->tangent_values = SavedVariable(t_values, false);
    node->queries = SavedVariable(queries, false);
    node->keys = SavedVariable(keys, false);
    node->values = SavedVariable(values, false);
    node->embedding = SavedVariable(embedding, false);
    node->logsumexp = SavedVariable(logsumexp, false);
    node->remainder = remainder;
    for (const Tensor& output : {a, b, c, d, e}) set_history(output, node);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(td3_fast, Autograd, m) {
  m.impl("soft_embedding_forward", soft_embedding_forward);
  m.impl("soft_embedding_backward", soft_embedding_backward);
  m.impl("soft_embedding_double_backward", soft_embedding_double_backward);
}

}  // namespace td3_fast
