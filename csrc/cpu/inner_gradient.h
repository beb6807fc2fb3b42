// The gradient of one inner step and its derivative, as the operators of inner_gradient.cpp have them, for
// those that take several steps.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace td3_fast::cpu {

// Of all synthetic users' (mu, positions, ...) those of users (b,): a view where they follow one another.
at::Tensor rows_of_users(const at::Tensor& all, const at::Tensor& users);

// What a step takes beside parameters and items.
struct InnerStep {
  // Of its users: probabilities (b, positions, n), whose products with the items, which are trained, are the
  // soft embeddings, or these (b, positions, d).
  at::Tensor source;
  bool mixes;
  at::Tensor targets;  // (b, k)
  at::Tensor seed;     // of the dropout, one number or none
  at::IntArrayRef sizes;
};

// `saved` is what the derivative needs. Without `mixes` the last of the gradients are empty.
struct StepGradient {
  at::Tensor loss, parameters, items, embeds;
  std::vector<at::Tensor> saved;
};
StepGradient gradient_of_step(const InnerStep& step, const at::Tensor& parameters, const at::Tensor& items);

// The gradients of what the tangents and those gradients have as inner product: of parameters, of items, with
// embeds held fixed, and of embeds. The soft embeddings move with the items.
std::tuple<at::Tensor, at::Tensor, at::Tensor> derivative_of_step(
    const InnerStep& step,
    const at::Tensor& parameters,
    const at::Tensor& items,
    const at::Tensor& tangent_parameters,
    const std::optional<at::Tensor>& tangent_items,
    at::TensorList saved);

// How many tensors a step saves.
int64_t saved_by_step(bool mixes);

// Adds to sums (n, d) what a cotangent of the soft embeddings (b, positions, d) is of the items.
void add_to_items(const InnerStep& step, const at::Tensor& sums, const at::Tensor& to_embeds);

}  // namespace td3_fast::cpu
