// Derivatives of item_logsumexp and class_cross_entropy, as those of soft_embedding are made.
//
// The two differ in what their operators are called with: the cross-entropy to one item per row has that item
// as `target`, which is undefined for the logsumexp.

#include <ATen/ops/ones_like.h>
#include <torch/library.h>

#include "autograd.h"

namespace td3_fast {
namespace {

// What derivatives take from the forward pass; not differentiable.
struct Saved {
  Tensor target, remainder, mean, probabilities;
};

FourTensors call_logsumexp_forward(const Tensor& hidden, const Tensor& items, bool save, bool keep) {
  static const auto op = find_operator<decltype(call_logsumexp_forward)>("td3_fast::item_logsumexp_forward");
  return op.call(hidden, items, save, keep);
}

FiveTensors call_class_forward(
    const Tensor& hidden, const Tensor& items, const Tensor& target, bool save, bool keep) {
  static const auto op = find_operator<decltype(call_class_forward)>("td3_fast::class_cross_entropy_forward");
  return op.call(hidden, items, target, save, keep);
}

std::tuple<Tensor, Tensor> call_backward(const Tensor& grad,
                                         const Tensor& hidden,
                                         const Tensor& items,
                                         const Tensor& logsumexp,
                                         const Saved& saved,
                                         std::array<bool, 2> needed) {
  using Logsumexp =
      std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Tensor&, const Tensor&, std::array<bool, 2>);
  using Class =
      std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Tensor&, const Tensor&, const Tensor&, std::array<bool, 2>);
  static const auto logsumexp_op = find_operator<Logsumexp>("td3_fast::item_logsumexp_backward");
  static const auto class_op = find_operator<Class>("td3_fast::class_cross_entropy_backward");
  if (saved.target.defined()) {
    return class_op.call(grad, hidden, items, saved.target, logsumexp, saved.remainder, saved.mean,
                         saved.probabilities, needed);
  }
  return logsumexp_op.call(grad, hidden, items, logsumexp, saved.remainder, saved.mean, saved.probabilities,
                           needed);
}

ThreeTensors call_double_backward(const OptionalTensor& grad_grad_hidden,
                                  const OptionalTensor& grad_grad_items,
                                  const Tensor& grad,
                                  const Tensor& hidden,
                                  const Tensor& items,
                                  const Tensor& logsumexp,
                                  const Saved& saved,
                                  std::array<bool, 3> needed) {
  using Logsumexp =
      ThreeTensors(const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                   const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::array<bool, 3>);
  using Class = ThreeTensors(const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                             const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const Tensor&, std::array<bool, 3>);
  static const auto logsumexp_op = find_operator<Logsumexp>("td3_fast::item_logsumexp_double_backward");
  static const auto class_op = find_operator<Class>("td3_fast::class_cross_entropy_double_backward");
  if (saved.target.defined()) {
    return class_op.call(grad_grad_hidden, grad_grad_items, grad, hidden, items, saved.target, logsumexp,
                         saved.remainder, saved.mean, saved.probabilities, needed);
  }
  return logsumexp_op.call(grad_grad_hidden, grad_grad_items, grad, hidden, items, logsumexp, saved.remainder,
                           saved.mean, saved.probabilities, needed);
}

// A node of either, by what it holds.
struct ItemsNode : OpNode {
  SavedVariable hidden, items, logsumexp;

  void keep(const Saved& from) {
    target_ = SavedVariable(from.target, false);  // which says so where it was overwritten
    others_ = from;
    others_.target = Tensor();
  }
  Saved kept() const {
    Saved saved = others_;
    saved.target = target_.unpack();
    return saved;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&hidden, &items, &logsumexp, &target_}) variable->reset_data();
    others_ = {};
  }

 private:
  SavedVariable target_;
  Saved others_;
};

struct CrossEntropyBackward final : ItemsNode {
  std::string name() const override { return "CrossEntropyBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return variable_list(2);
    const auto needed = outputs_needed<2>();
    return keep_needed(needed, call_backward(grads[0], hidden.unpack(), items.unpack(),
                                             logsumexp.unpack(getptr()), kept(), needed));
  }
};

struct CrossEntropyDoubleBackward final : ItemsNode {
  SavedVariable grad;

  std::string name() const override { return "CrossEntropyDoubleBackward"; }

  void release_variables() override {
    ItemsNode::release_variables();
    std::lock_guard<std::mutex> lock(mutex_);
    grad.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(3);
    const auto needed = outputs_needed<3>();
    return keep_needed(
        needed, call_double_backward(if_defined(grads[0]), if_defined(grads[1]), grad.unpack(),
                                     hidden.unpack(), items.unpack(), logsumexp.unpack(), kept(), needed));
  }
};

// Of the double backward that was asked for nothing but J t.
struct CrossEntropyTangentBackward final : ItemsNode {
  SavedVariable tangent_hidden, tangent_items;

  std::string name() const override { return "CrossEntropyTangentBackward"; }

  void release_variables() override {
    ItemsNode::release_variables();
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&tangent_hidden, &tangent_items}) variable->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return variable_list(4);
    const auto needed = outputs_needed<4>();
    const Tensor h = hidden.unpack(), e = items.unpack(), l = logsumexp.unpack();
    const Saved saved = kept();
    std::tuple<Tensor, Tensor> to_tangents;
    ThreeTensors to_inputs;
    if (needed[0] || needed[1]) {
      to_tangents = call_backward(grads[0], h, e, l, saved, {needed[0], needed[1]});
    }
    if (needed[2] || needed[3]) {
      to_inputs =
          call_double_backward(if_defined(tangent_hidden.unpack()), if_defined(tangent_items.unpack()),
                               grads[0], h, e, l, saved, {false, needed[2], needed[3]});
    }
    return keep_needed(needed,
                       std::tuple_cat(to_tangents, std::tie(std::get<1>(to_inputs), std::get<2>(to_inputs))));
  }
};

// The history and the tangent of `value`, which is the logsumexp itself where there is no target.
void differentiate(const Tensor& value,
                   const Tensor& logsumexp,
                   const Tensor& hidden,
                   const Tensor& items,
                   const Saved& saved) {
  if (compute_requires_grad(hidden, items)) {
    const auto node = make_node<CrossEntropyBackward>();
    node->set_next_edges(collect_next_edges(hidden, items));
    node->hidden = SavedVariable(hidden, false);
    node->items = SavedVariable(items, false);
    node->keep(saved);
    set_history(value, node);
    node->logsumexp = SavedVariable(logsumexp, /*is_output=*/!saved.target.defined());
  }
  if (any_tangent(hidden, items)) {
    const ThreeTensors tangents = call_double_backward(
        if_defined(tangent_of(hidden)), if_defined(tangent_of(items)), at::ones_like(primal_of(value)),
        primal_of(hidden), primal_of(items), primal_of(logsumexp), saved, {true, false, false});
    set_tangent(value, std::get<0>(tangents));
  }
}

FourTensors item_logsumexp_forward(const Tensor& hidden, const Tensor& items, bool save, bool keep) {
  const bool save_here = save || compute_requires_grad(hidden, items) || any_tangent(hidden, items);
  FourTensors result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_logsumexp_forward(hidden, items, save_here, keep || compute_requires_grad(items));
  }();
  const auto& [logsumexp, remainder, mean, probabilities] = result;
  differentiate(logsumexp, logsumexp, hidden, items, {Tensor(), remainder, mean, probabilities});
  return result;
}

FiveTensors class_cross_entropy_forward(
    const Tensor& hidden, const Tensor& items, const Tensor& target, bool save, bool keep) {
  const bool save_here = save || compute_requires_grad(hidden, items) || any_tangent(hidden, items);
  FiveTensors result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_class_forward(hidden, items, target, save_here, keep || compute_requires_grad(items));
  }();
  const auto& [loss, logsumexp, remainder, mean, probabilities] = result;
  differentiate(loss, logsumexp, hidden, items, {target, remainder, mean, probabilities});
  return result;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad,
                                    const Tensor& hidden,
                                    const Tensor& items,
                                    const Tensor& logsumexp,
                                    const Saved& saved,
                                    std::array<bool, 2> needed) {
  std::tuple<Tensor, Tensor> result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_backward(grad, hidden, items, logsumexp, saved, needed);
  }();
  if (compute_requires_grad(grad, hidden, items)) {
    const auto node = make_node<CrossEntropyDoubleBackward>();
    node->set_next_edges(collect_next_edges(grad, hidden, items));
    node->grad = SavedVariable(grad, false);
    node->hidden = SavedVariable(hidden, false);
    node->items = SavedVariable(items, false);
    node->logsumexp = SavedVariable(logsumexp, false);
    node->keep(saved);
    set_history(std::get<0>(result), node);
    set_history(std::get<1>(result), node);
  }
  const bool inputs_move = any_tangent(hidden, items), upstream_moves = any_tangent(grad);
  if (inputs_move || upstream_moves) {
    const Tensor h = primal_of(hidden), e = primal_of(items), l = primal_of(logsumexp);
    ThreeTensors with_inputs;
    std::tuple<Tensor, Tensor> with_upstream;
    if (inputs_move) {
      with_inputs = call_double_backward(optional_tangent_of(hidden), optional_tangent_of(items),
                                         primal_of(grad), h, e, l, saved, {false, needed[0], needed[1]});
    }
    if (upstream_moves) with_upstream = call_backward(tangent_of(grad), h, e, l, saved, needed);
    set_gradient_tangents(std::make_index_sequence<2>(), needed, result,
                          std::tie(std::get<1>(with_inputs), std::get<2>(with_inputs)), with_upstream);
  }
  return result;
}

ThreeTensors double_backward(const char* name,
                             const OptionalTensor& grad_grad_hidden,
                             const OptionalTensor& grad_grad_items,
                             const Tensor& grad,
                             const Tensor& hidden,
                             const Tensor& items,
                             const Tensor& logsumexp,
                             const Saved& saved,
                             std::array<bool, 3> needed) {
  ThreeTensors result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_double_backward(grad_grad_hidden, grad_grad_items, grad, hidden, items, logsumexp, saved,
                                needed);
  }();
  const auto& [a, b, c] = result;
  const Tensor t_hidden = or_undefined(grad_grad_hidden), t_items = or_undefined(grad_grad_items);
  if (needed[1] || needed[2]) {
    forbid_third_order(name, {a, b, c}, t_hidden, t_items, grad, hidden, items);
    return result;
  }
  check_no_tangent(name, t_hidden, t_items, hidden, items);
  if (compute_requires_grad(t_hidden, t_items, hidden, items)) {
    const auto node = make_node<CrossEntropyTangentBackward>();
    node->set_next_edges(collect_next_edges(t_hidden, t_items, hidden, items));
    node->tangent_hidden = SavedVariable(t_hidden, false);
    node->tangent_items = SavedVariable(t_items, false);
    node->hidden = SavedVariable(hidden, false);
    node->items = SavedVariable(items, false);
    node->logsumexp = SavedVariable(logsumexp, false);
    node->keep(saved);
    for (const Tensor& output : {a, b, c}) set_history(output, node);
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
  return backward(grad_logsumexp, hidden, items, logsumexp, {Tensor(), remainder, mean, probabilities},
                  needed);
}

std::tuple<Tensor, Tensor> class_cross_entropy_backward(const Tensor& grad_loss,
                                                        const Tensor& hidden,
                                                        const Tensor& items,
                                                        const Tensor& target,
                                                        const Tensor& logsumexp,
                                                        const Tensor& remainder,
                                                        const Tensor& mean,
                                                        const Tensor& probabilities,
                                                        std::array<bool, 2> needed) {
  return backward(grad_loss, hidden, items, logsumexp, {target, remainder, mean, probabilities}, needed);
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
  return double_backward("item_logsumexp_double_backward", grad_grad_hidden, grad_grad_items, grad_logsumexp,
                         hidden, items, logsumexp, {Tensor(), remainder, mean, probabilities}, needed);
}

ThreeTensors class_cross_entropy_double_backward(const OptionalTensor& grad_grad_hidden,
                                                 const OptionalTensor& grad_grad_items,
                                                 const Tensor& grad_loss,
                                                 const Tensor& hidden,
                                                 const Tensor& items,
                                                 const Tensor& target,
                                                 const Tensor& logsumexp,
                                                 const Tensor& remainder,
                                                 const Tensor& mean,
                                                 const Tensor& probabilities,
                                                 std::array<bool, 3> needed) {
  return double_backward("class_cross_entropy_double_backward", grad_grad_hidden, grad_grad_items, grad_loss,
                         hidden, items, logsumexp, {target, remainder, mean, probabilities}, needed);
}

}  // namespace

TORCH_LIBRARY_IMPL(td3_fast, Autograd, m) {
  m.impl("item_logsumexp_forward", item_logsumexp_forward);
  m.impl("item_logsumexp_backward", item_logsumexp_backward);
  m.impl("item_logsumexp_double_backward", item_logsumexp_double_backward);
  m.impl("class_cross_entropy_forward", class_cross_entropy_forward);
  m.impl("class_cross_entropy_backward", class_cross_entropy_backward);
  m.impl("class_cross_entropy_double_backward", class_cross_entropy_double_backward);
}

}  // namespace td3_fast
