// Derivatives: autograd nodes over the operators, which are differentiable themselves up to second order.
//
// Nodes rather than torch::autograd::Function, so that torch.func's transforms apply; and in C++, because the
// inner loop of a distillation crosses these nodes tens of thousands of times.
//
// Forward mode needs no kernels of its own. For a direction t of the inputs, the double backward's gradient
// towards the upstream gradients is J t, the tangent of the outputs; its gradients towards the inputs are the
// Hessian of <upstream, outputs> times t, the tangent of the first-order gradients, since a Hessian is
// symmetric. And J t is differentiable in its turn: its gradient towards t is the backward operator.

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

namespace td3_fast {
namespace {

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

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

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

FourTensors call_item_logsumexp_forward(const Tensor& hidden, const Tensor& items, bool save, bool keep) {
  static const auto op =
      find_operator<decltype(call_item_logsumexp_forward)>("td3_fast::item_logsumexp_forward");
  return op.call(hidden, items, save, keep);
}

std::tuple<Tensor, Tensor> call_item_logsumexp_backward(const Tensor& grad_logsumexp,
                                                        const Tensor& hidden,
                                                        const Tensor& items,
                                                        const Tensor& logsumexp,
                                                        const Tensor& remainder,
                                                        const Tensor& mean,
                                                        const Tensor& probabilities,
                                                        std::array<bool, 2> needed) {
  static const auto op =
      find_operator<decltype(call_item_logsumexp_backward)>("td3_fast::item_logsumexp_backward");
  return op.call(grad_logsumexp, hidden, items, logsumexp, remainder, mean, probabilities, needed);
}

ThreeTensors call_item_logsumexp_double_backward(const OptionalTensor& grad_grad_hidden,
                                                 const OptionalTensor& grad_grad_items,
                                                 const Tensor& grad_logsumexp,
                                                 const Tensor& hidden,
                                                 const Tensor& items,
                                                 const Tensor& logsumexp,
                                                 const Tensor& remainder,
                                                 const Tensor& mean,
                                                 const Tensor& probabilities,
                                                 std::array<bool, 3> needed) {
  static const auto op = find_operator<decltype(call_item_logsumexp_double_backward)>(
      "td3_fast::item_logsumexp_double_backward");
  return op.call(grad_grad_hidden, grad_grad_items, grad_logsumexp, hidden, items, logsumexp, remainder, mean,
                 probabilities, needed);
}

OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

Tensor tangent_of(const Tensor& tensor) {
  return tensor._fw_grad(/*level=*/0);
}

OptionalTensor optional_tangent_of(const Tensor& tensor) {
  return tensor.defined() ? if_defined(tangent_of(tensor)) : std::nullopt;
}

Tensor primal_of(const Tensor& tensor) {
  return tensor.defined() ? tensor._fw_primal(/*level=*/0) : tensor;
}

template <typename... Tensors>
bool any_tangent(const Tensors&... tensors) {
  return (... || (tensors.defined() && tangent_of(tensors).defined()));
}

void set_tangent(const Tensor& output, const Tensor& tangent) {
  output._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

Tensor sum_of_defined(const Tensor& a, const Tensor& b) {
  if (!a.defined()) return b;
  return b.defined() ? a + b : a;
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

// ---- soft_embedding ----

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

// ---- item_logsumexp ----

struct ItemLogsumexpBackward final : OpNode {
  SavedVariable hidden, items, logsumexp;
  Tensor remainder, mean, probabilities;  // not differentiable

  std::string name() const override { return "ItemLogsumexpBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&hidden, &items, &logsumexp}) saved->reset_data();
    remainder.reset();
    mean.reset();
    probabilities.reset();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return variable_list(2);
    const auto needed = outputs_needed<2>();
    const Tensor hidden_in = hidden.unpack();
    return keep_needed(
        needed, call_item_logsumexp_backward(grads[0], hidden_in, items.unpack(), logsumexp.unpack(getptr()),
                                             remainder, mean, probabilities, needed));
  }
};

struct ItemLogsumexpDoubleBackward final : OpNode {
  SavedVariable grad_logsumexp, hidden, items, logsumexp;
  Tensor remainder, mean, probabilities;

  std::string name() const override { return "ItemLogsumexpDoubleBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&grad_logsumexp, &hidden, &items, &logsumexp}) saved->reset_data();
    remainder.reset();
    mean.reset();
    probabilities.reset();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(3);
    const auto needed = outputs_needed<3>();
    const Tensor grad = grad_logsumexp.unpack();
    return keep_needed(
        needed, call_item_logsumexp_double_backward(if_defined(grads[0]), if_defined(grads[1]), grad,
                                                    hidden.unpack(), items.unpack(), logsumexp.unpack(),
                                                    remainder, mean, probabilities, needed));
  }
};

// Of the double backward that was asked for nothing but J t.
struct ItemLogsumexpTangentBackward final : OpNode {
  SavedVariable tangent_hidden, tangent_items, hidden, items, logsumexp;
  Tensor remainder, mean, probabilities;

  std::string name() const override { return "ItemLogsumexpTangentBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&tangent_hidden, &tangent_items, &hidden, &items, &logsumexp}) {
      saved->reset_data();
    }
    remainder.reset();
    mean.reset();
    probabilities.reset();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return variable_list(4);
    const auto needed = outputs_needed<4>();
    const Tensor h = hidden.unpack(), e = items.unpack(), l = logsumexp.unpack();
    std::tuple<Tensor, Tensor> to_tangents;
    ThreeTensors to_inputs;
    if (needed[0] || needed[1]) {
      to_tangents = call_item_logsumexp_backward(grads[0], h, e, l, remainder, mean, probabilities,
                                                 {needed[0], needed[1]});
    }
    if (needed[2] || needed[3]) {
      to_inputs = call_item_logsumexp_double_backward(
          if_defined(tangent_hidden.unpack()), if_defined(tangent_items.unpack()), grads[0], h, e, l,
          remainder, mean, probabilities, {false, needed[2], needed[3]});
    }
    return keep_needed(needed,
                       std::tuple_cat(to_tangents, std::tie(std::get<1>(to_inputs), std::get<2>(to_inputs))));
  }
};

FourTensors item_logsumexp_forward(const Tensor& hidden, const Tensor& items, bool save, bool keep) {
  const bool differentiates = compute_requires_grad(hidden, items);
  const bool has_tangent = any_tangent(hidden, items);
  FourTensors result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_item_logsumexp_forward(hidden, items, save || differentiates || has_tangent,
                                       keep || compute_requires_grad(items));
  }();
  const auto& [logsumexp, remainder, mean, probabilities] = result;
  if (differentiates) {
    const auto node = make_node<ItemLogsumexpBackward>();
    node->set_next_edges(collect_next_edges(hidden, items));
    node->hidden = SavedVariable(hidden, false);
    node->items = SavedVariable(items, false);
    node->mean = mean;
    node->probabilities = probabilities;
    set_history(logsumexp, node);
    node->logsumexp = SavedVariable(logsumexp, true);
    node->remainder = remainder;
  }
  if (has_tangent) {
    const Tensor primal = logsumexp._fw_primal(/*level=*/0);
    const ThreeTensors tangents = call_item_logsumexp_double_backward(
        if_defined(tangent_of(hidden)), if_defined(tangent_of(items)), at::ones_like(primal),
        hidden._fw_primal(/*level=*/0), items._fw_primal(/*level=*/0), primal, remainder, mean, probabilities,
        {true, false, false});
    set_tangent(logsumexp, std::get<0>(tangents));
  }
  return result;
}

std::tuple<Tensor, Tensor> item_logsumexp_backward(const Tensor& grad_logsumexp,
                                                   const Tensor& hidden,
                                                   const Tensor& items,
                                                   const Tensor& logsumexp,
                                                   const Tensor& remainder,
                                                   const Tensor& mean,
                                                   const Tensor& probabilities,
                                                   std::array<bool, 2> needed) {
  const bool differentiates = compute_requires_grad(grad_logsumexp, hidden, items);
  std::tuple<Tensor, Tensor> result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_item_logsumexp_backward(grad_logsumexp, hidden, items, logsumexp, remainder, mean,
                                        probabilities, needed);
  }();
  if (differentiates) {
    const auto node = make_node<ItemLogsumexpDoubleBackward>();
    node->set_next_edges(collect_next_edges(grad_logsumexp, hidden, items));
    node->grad_logsumexp = SavedVariable(grad_logsumexp, false);
    node->hidden = SavedVariable(hidden, false);
    node->items = SavedVariable(items, false);
    node->logsumexp = SavedVariable(logsumexp, false);
    node->remainder = remainder;
    node->mean = mean;
    node->probabilities = probabilities;
    set_history(std::get<0>(result), node);
    set_history(std::get<1>(result), node);
  }
  const bool inputs_move = any_tangent(hidden, items), upstream_moves = any_tangent(grad_logsumexp);
  if (inputs_move || upstream_moves) {
    const Tensor h = primal_of(hidden), e = primal_of(items), l = primal_of(logsumexp);
    ThreeTensors with_inputs;
    std::tuple<Tensor, Tensor> with_upstream;
    if (inputs_move) {
      with_inputs = call_item_logsumexp_double_backward(
          optional_tangent_of(hidden), optional_tangent_of(items), primal_of(grad_logsumexp), h, e, l,
          remainder, mean, probabilities, {false, needed[0], needed[1]});
    }
    if (upstream_moves) {
      with_upstream = call_item_logsumexp_backward(tangent_of(grad_logsumexp), h, e, l, remainder, mean,
                                                   probabilities, needed);
    }
    set_gradient_tangents(std::make_index_sequence<2>(), needed, result,
                          std::tie(std::get<1>(with_inputs), std::get<2>(with_inputs)), with_upstream);
  }
  return result;
}

ThreeTensors item_logsumexp_double_backward(const OptionalTensor& grad_grad_hidden,
                                            const OptionalTensor& grad_grad_items,
                                            const Tensor& grad_logsumexp,
                                            const Tensor& hidden,
                                            const Tensor& items,
                                            const Tensor& logsumexp,
                                            const Tensor& remainder,
                                            const Tensor& mean,
                                            const Tensor& probabilities,
                                            std::array<bool, 3> needed) {
  ThreeTensors result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_item_logsumexp_double_backward(grad_grad_hidden, grad_grad_items, grad_logsumexp, hidden,
                                               items, logsumexp, remainder, mean, probabilities, needed);
  }();
  const auto& [a, b, c] = result;
  const Tensor t_hidden = or_undefined(grad_grad_hidden), t_items = or_undefined(grad_grad_items);
  if (needed[1] || needed[2]) {
    forbid_third_order("item_logsumexp_double_backward", {a, b, c}, t_hidden, t_items, grad_logsumexp, hidden,
                       items);
    return result;
  }
  check_no_tangent("item_logsumexp_double_backward", t_hidden, t_items, hidden, items);
  if (compute_requires_grad(t_hidden, t_items, hidden, items)) {
    const auto node = make_node<ItemLogsumexpTangentBackward>();
    node->set_next_edges(collect_next_edges(t_hidden, t_items, hidden, items));
    node->tangent_hidden = SavedVariable(t_hidden, false);
    node->tangent_items = SavedVariable(t_items, false);
    node->hidden = SavedVariable(hidden, false);
    node->items = SavedVariable(items, false);
    node->logsumexp = SavedVariable(logsumexp, false);
    node->remainder = remainder;
    node->mean = mean;
    node->probabilities = probabilities;
    for (const Tensor& output : {a, b, c}) set_history(output, node);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(td3_fast, Autograd, m) {
  m.impl("soft_embedding_forward", soft_embedding_forward);
  m.impl("soft_embedding_backward", soft_embedding_backward);
  m.impl("soft_embedding_double_backward", soft_embedding_double_backward);
  m.impl("item_logsumexp_forward", item_logsumexp_forward);
  m.impl("item_logsumexp_backward", item_logsumexp_backward);
  m.impl("item_logsumexp_double_backward", item_logsumexp_double_backward);
}

}  // namespace td3_fast
