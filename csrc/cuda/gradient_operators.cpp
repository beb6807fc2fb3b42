// Whole gradients on CUDA: of an inner step, with its derivative, and of the loss on real examples.
// csrc/cpu/inner_gradient.cpp and next_item_gradient.cpp say what is computed.

#include <ATen/ops/embedding_dense_backward.h>

#include "../dispatch.h"
#include "encoder_call.h"

namespace td3_fast::cuda {
namespace {

// Beyond, the scores of a sequence's outputs against all items leave too little to a multiprocessor, and the
// operators of item_logsumexp share the work better. td3_fast/ops/inner_gradient.py has the same two.
constexpr int64_t kMostItemsInPass = 8192;
constexpr int64_t kMostAskedInPass = 8;

Tensor histories_of(const Tensor& embeds, const Tensor& targets) {
  TORCH_CHECK_VALUE(targets.numel() > 0, "expected at least one target, got no target in ", targets.sizes());
  TORCH_CHECK_VALUE(embeds.dim() == 3 && embeds.size(1) >= 2,
                    "expected embeds (b, at least 2 positions, d), got ", embeds.sizes());
  return embeds.narrow(1, 0, embeds.size(1) - 1);
}

// What each target is predicted from ends one position before it.
constexpr int64_t kBeforeTarget = -1;

// The rows of embeds (b, ζ, d) at the targets (b, k): (b k, d).
Tensor at_targets(const Tensor& embeds, const Tensor& targets) {
  const Tensor index = targets.unsqueeze(2).expand({-1, -1, embeds.size(2)});
  return embeds.gather(1, index).view({-1, embeds.size(2)});
}

// The soft embeddings of the users of a step; only of their sizes, where a pass reads them where they are.
Tensor of_users(const Tensor& embeds, const OptionalTensor& users, bool sizes_alone) {
  if (!users) return embeds.dim() == 3 ? whole_sequences(embeds) : embeds;
  TORCH_CHECK_VALUE(users->dim() == 1 && users->scalar_type() == at::kLong && embeds.dim() == 3,
                    "expected int64 users (b,), got ", users->sizes(), " of ", users->scalar_type());
  return sizes_alone ? embeds.narrow(0, 0, 1).expand({users->size(0), -1, -1})
                     : embeds.index_select(0, *users);
}

bool compares_in_pass(const Tensor& items, const Tensor& embeds, const Tensor& targets) {
  return items.scalar_type() == embeds.scalar_type() && items.size(0) <= kMostItemsInPass &&
         targets.size(1) <= kMostAskedInPass;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> inner_gradient(const Tensor& parameters,
                                                                               const Tensor& embeds_in,
                                                                               const Tensor& targets,
                                                                               const Tensor& items,
                                                                               at::TensorList words,
                                                                               at::IntArrayRef sizes,
                                                                               bool trained,
                                                                               const OptionalTensor& users) {
  const bool in_pass = !trained && compares_in_pass(items, embeds_in, targets);
  const Tensor embeds = of_users(embeds_in, users, in_pass);
  EncoderCall call(parameters, histories_of(embeds, targets), targets, words, sizes, kBeforeTarget);
  TORCH_CHECK_VALUE(items.dim() == 2 && items.size(0) > 0 && items.size(1) == embeds.size(2),
                    "expected items (n, d) with n >= 1, got ", items.sizes());
  if (in_pass) {
    if (users) call.select(embeds_in, *users);
    call.compare_with(items);
    const auto [grad_parameters, loss] = call.backward();
    return {loss, grad_parameters, nothing(items), nothing(embeds), std::vector<Tensor>()};
  }
  const Tensor hidden = call.outputs().view({-1, embeds.size(2)});
  call.forward();
  call.problem.outputs = nullptr;
  auto [logsumexp, remainder, mean, probabilities] = item_logsumexp_forward(hidden, items, true, trained);
  const Tensor rows = at_targets(embeds, targets);
  const double share = 1.0 / static_cast<double>(rows.size(0));
  const Tensor upstream = embeds.new_full({rows.size(0)}, share);
  const Tensor loss = logsumexp.dot(upstream).sub(hidden.view(-1).dot(rows.view(-1)).mul(share));
  call.set_upstream(mean.sub(rows).mul_(share), std::nullopt);
  Tensor grad_items = nothing(items), grad_embeds = nothing(embeds);
  if (trained) {
    grad_items = std::get<1>(item_logsumexp_backward(upstream, hidden, items, logsumexp, remainder, mean,
                                                     probabilities, {false, true}));
    grad_embeds = call.grad_inputs(embeds.size(1));
    call.problem.to_targets = -share;
  }
  const Tensor grad_parameters = std::get<0>(call.backward());
  return {
      loss, grad_parameters, grad_items, grad_embeds, {hidden, logsumexp, remainder, mean, probabilities}};
}

std::tuple<Tensor, Tensor, Tensor> inner_gradient_tangent(const Tensor& tangent_parameters,
                                                          const OptionalTensor& tangent_items,
                                                          const OptionalTensor& tangent_embeds,
                                                          const Tensor& parameters,
                                                          const Tensor& embeds_in,
                                                          const Tensor& targets,
                                                          const Tensor& items,
                                                          at::TensorList saved,
                                                          at::TensorList words,
                                                          at::IntArrayRef sizes,
                                                          const OptionalTensor& users) {
  const bool in_pass = saved.empty();
  const Tensor embeds = of_users(embeds_in, users, in_pass);
  TORCH_CHECK_VALUE(tangent_parameters.sizes() == parameters.sizes() &&
                        (!tangent_items || tangent_items->sizes() == items.sizes()) &&
                        (!tangent_embeds || tangent_embeds->sizes() == embeds.sizes()),
                    "a tangent has the shape of what it moves");
  EncoderCall call(parameters, histories_of(embeds, targets), targets, words, sizes, kBeforeTarget);
  const double share = 1.0 / static_cast<double>(targets.numel());
  TORCH_CHECK_VALUE(in_pass ? !tangent_items && !tangent_embeds && compares_in_pass(items, embeds_in, targets)
                            : saved.size() == 5,
                    "expected the tensors that inner_gradient saved, got ", saved.size());
  OptionalTensor moved_histories;
  if (tangent_embeds) moved_histories = histories_of(*tangent_embeds, targets);
  call.move(tangent_parameters, moved_histories);
  Tensor moved_grad_items = nothing(items);
  if (in_pass) {
    if (users) call.select(embeds_in, *users);
    call.compare_with(items);
  } else {
    const Tensor moved_hidden = call.outputs().view({-1, embeds.size(2)});
    call.forward();
    call.problem.outputs = nullptr;
    const Tensor upstream = embeds.new_full({targets.numel()}, share);
    const Tensor& mean = saved[3];
    auto [to_upstream, moved_grad_hidden, to_items] =
        item_logsumexp_double_backward(moved_hidden, tangent_items, upstream, saved[0], items, saved[1],
                                       saved[2], mean, saved[4], {false, true, tangent_items.has_value()});
    if (tangent_embeds) moved_grad_hidden.sub_(at_targets(*tangent_embeds, targets), share);
    if (tangent_items) moved_grad_items = to_items;
    call.set_upstream(mean.sub(at_targets(embeds, targets)).mul_(share), moved_grad_hidden);
  }
  const Tensor to_embeds = call.grad_inputs(embeds.size(1));
  call.problem.to_targets = -share;
  const Tensor to_parameters = std::get<0>(call.backward());
  return {to_parameters, moved_grad_items, to_embeds};
}

// ---- real examples ----

std::tuple<Tensor, Tensor, Tensor, Tensor> next_item_gradient(const Tensor& parameters,
                                                              const Tensor& items,
                                                              const Tensor& histories,
                                                              const Tensor& lengths,
                                                              const Tensor& targets,
                                                              const OptionalTensor& features,
                                                              double alignment,
                                                              at::TensorList words,
                                                              at::IntArrayRef sizes,
                                                              bool trained) {
  using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                     const Tensor&, bool, bool);
  using Backward =
      std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Tensor&, const Tensor&, const Tensor&, std::array<bool, 2>);
  static const auto loss_forward = find_operator<Forward>("td3_fast::class_cross_entropy_forward");
  static const auto loss_backward = find_operator<Backward>("td3_fast::class_cross_entropy_backward");
  check_histories(items, histories, lengths);
  check_next_items(parameters, items, histories, targets, features);
  const int64_t batch = histories.size(0), width = items.size(1);
  const double share = 1.0 / static_cast<double>(batch);
  const double pull = alignment / static_cast<double>(batch * width);
  EncoderCall call(parameters, shape_of_rows(items, histories), last_positions(lengths), words, sizes, kLast);
  call.look_up(items, histories);
  const Tensor hidden = call.outputs().squeeze(1);
  call.forward();
  call.problem.outputs = nullptr;
  const auto [losses, logsumexp, remainder, mean, probabilities] =
      loss_forward.call(hidden, items, targets, true, false);
  const Tensor upstream = items.new_full({batch}, share);
  auto [grad_hidden, grad_items] = loss_backward.call(upstream, hidden, items, targets, logsumexp, remainder,
                                                      mean, probabilities, {true, trained});
  Tensor aligned = items.new_zeros({});
  if (features) {
    const Tensor apart = hidden.sub(*features);
    aligned = apart.mul(apart).sum().mul(pull);
    grad_hidden = grad_hidden.add(apart.mul(2 * pull));
  }
  call.set_upstream(grad_hidden, std::nullopt);
  const Tensor grad_embeds = trained ? call.grad_inputs(histories.size(1)) : Tensor();
  const Tensor grad_parameters = std::get<0>(call.backward());
  if (trained) {
    grad_items =
        grad_items.add(at::embedding_dense_backward(grad_embeds, histories, items.size(0), -1, false));
  }
  return {losses.sum().mul(share), aligned, grad_parameters, grad_items};
}

}  // namespace td3_fast::cuda
