// Several inner steps in one call on the CPU, and the way back through them: a step of a small summary takes
// less time than the Python between its operators.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "adam_step.h"
#include "inner_gradient.h"
#include "panels.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

// The inputs of several steps: a row of `users`, `targets` and `seeds` for each.
struct Steps {
  const Tensor &source, &items, &users, &targets;
  const Tensor* seeds;  // null on the way back, which has the words that were drawn
  at::ArrayRef<double> step_sizes, rates;
  at::IntArrayRef sizes;
  bool trained;
  int64_t count = step_sizes.size();

  void check() const {
    TORCH_CHECK_VALUE(
        users.dim() == 2 && targets.dim() == 3 && users.scalar_type() == at::kLong &&
            users.size(0) == count && targets.size(0) == count && targets.size(1) == users.size(1) &&
            (seeds == nullptr || (seeds->dim() == 2 && seeds->size(0) == count && seeds->size(1) <= 1 &&
                                  seeds->scalar_type() == at::kLong)),
        "expected for each of ", count, " steps int64 users (b,), targets (b, k) and at most one seed, got ",
        users.sizes(), " and ", targets.sizes());
    TORCH_CHECK_VALUE(rates.size() == 4, "expected rates (beta1, beta2, eps, weight_decay)");
    TORCH_CHECK_VALUE(items.dim() == 2 && source.dim() == 3 &&
                          source.size(2) == items.size(trained ? 0 : 1) &&
                          (!trained || source.scalar_type() == items.scalar_type()),
                      "expected a source (users, positions, ", trained ? "n" : "d",
                      ") beside items (n, d), got ", source.sizes(), " and ", items.sizes());
  }
  InnerStep at(int64_t step) const {
    return {rows_of_users(source, users.select(0, step)), trained, targets.select(0, step),
            seeds == nullptr ? Tensor() : seeds->select(0, step), sizes};
  }
  // As adam_step_ takes them.
  std::array<double, 5> rates_of(int64_t step) const {
    return {rates[0], rates[1], rates[2], rates[3], step_sizes[step]};
  }
};

// Parameters and table of a state: the first of every three tensors.
size_t parts_of(at::TensorList state) {
  TORCH_CHECK_VALUE(
      state.size() == 3 || state.size() == 6,
      "expected a parameter and its two moments, or those of the encoder and of the table, got ",
      state.size(), " tensors");
  return state.size() / 3;
}

void set(const Tensor& losses, int64_t step, const Tensor& loss) {
  const auto copy = [&](auto zero) {
    using T = decltype(zero);
    losses.mutable_data_ptr<T>()[step] = *loss.const_data_ptr<T>();
  };
  losses.scalar_type() == at::kDouble ? copy(double{}) : copy(float{});
}

}  // namespace

Tensor inner_steps_(at::TensorList state,
                    const Tensor& source,
                    const Tensor& items,
                    const Tensor& users,
                    const Tensor& targets,
                    const Tensor& seeds,
                    at::ArrayRef<double> step_sizes,
                    at::ArrayRef<double> rates,
                    at::IntArrayRef sizes) {
  const at::AutoDispatchBelowADInplaceOrView below;  // no operator in here has a history to write
  const size_t parts = parts_of(state);
  const Tensor& table = parts > 1 ? state[3] : items;
  const Steps steps{source, table, users, targets, &seeds, step_sizes, rates, sizes, parts > 1};
  steps.check();
  const Tensor losses = state[0].new_empty({steps.count});
  for (int64_t step = 0; step < steps.count; ++step) {
    const StepGradient made = gradient_of_step(steps.at(step), state[0], table);
    const auto of_step = steps.rates_of(step);
    adam_step_(state[0], state[1], state[2], made.parameters, of_step, {});
    if (parts > 1) adam_step_(state[3], state[4], state[5], made.items, of_step, {});
    set(losses, step, made.loss);
  }
  return losses;
}

// The states after each step, and all that the way back needs.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
kept_inner_steps(at::TensorList first,
                 const Tensor& source,
                 const Tensor& items,
                 const Tensor& users,
                 const Tensor& targets,
                 const Tensor& seeds,
                 at::ArrayRef<double> step_sizes,
                 at::ArrayRef<double> rates,
                 at::IntArrayRef sizes) {
  const at::AutoDispatchBelowADInplaceOrView below;  // no operator in here has a history to write
  const size_t parts = parts_of(first);
  const Tensor& table = parts > 1 ? first[3] : items;
  const Steps steps{source, table, users, targets, &seeds, step_sizes, rates, sizes, parts > 1};
  steps.check();
  const Tensor losses = first[0].new_empty({steps.count});
  std::vector<Tensor> states, gradients, to_embeds, saved, state = first.vec();
  for (int64_t step = 0; step < steps.count; ++step) {
    StepGradient made = gradient_of_step(steps.at(step), state[0], parts > 1 ? state[3] : items);
    const auto of_step = steps.rates_of(step);
    for (size_t part = 0; part < parts; ++part) {
      const Tensor& gradient = part == 0 ? made.parameters : made.items;
      const size_t i = 3 * part;
      const std::array before{state[i], state[i + 1], state[i + 2]};
      for (size_t j = i; j < i + 3; ++j) state[j] = fresh(gradient.sizes(), gradient.scalar_type());
      adam_step_from({&before[0], &before[1], &before[2]}, {&state[i], &state[i + 1], &state[i + 2]},
                     gradient, of_step);
      gradients.push_back(gradient);
    }
    states.insert(states.end(), state.begin(), state.end());
    if (parts > 1) to_embeds.push_back(made.embeds);
    saved.insert(saved.end(), made.saved.begin(), made.saved.end());
    set(losses, step, made.loss);
  }
  return {losses, states, gradients, to_embeds, saved};
}

// Backwards, the last step first, until there is none or the cotangent of the parameters is not within the
// limit. Returns of each step the cotangent of X that the second order has, and where the table is trained
// the table with which X has the cotangent of the first order.
std::tuple<std::vector<Tensor>, std::vector<Tensor>, bool> pull_back_inner_steps_(
    at::TensorList adjoint,
    at::TensorList states,
    at::TensorList gradients,
    at::TensorList to_embeds,
    at::TensorList saved,
    const Tensor& source,
    const Tensor& items,
    const Tensor& users,
    const Tensor& targets,
    at::ArrayRef<double> step_sizes,
    at::ArrayRef<double> rates,
    at::IntArrayRef sizes,
    std::optional<double> limit) {
  const at::AutoDispatchBelowADInplaceOrView below;  // no operator in here has a history to write
  const size_t parts = parts_of(adjoint);
  const Tensor& table = parts > 1 ? adjoint[3] : items;  // alike in shape, which is what is checked
  const Steps steps{source, table, users, targets, nullptr, step_sizes, rates, sizes, parts > 1};
  steps.check();
  const size_t count = steps.count, saves = saved_by_step(parts > 1);
  TORCH_CHECK_VALUE(states.size() == 3 * parts * count && gradients.size() == parts * count &&
                        to_embeds.size() == (parts > 1 ? count : 0) && saved.size() == saves * count,
                    "expected what ", count, " steps kept");
  std::vector<Tensor> cotangents, tables;
  for (int64_t step = steps.count - 1; step >= 0; --step) {
    const at::TensorList state = states.slice(3 * parts * step, 3 * parts);
    const auto of_step = steps.rates_of(step);
    std::vector<Tensor> to_gradients;
    for (size_t part = 0; part < parts; ++part) {
      const size_t i = 3 * part;
      to_gradients.push_back(adam_adjoint_(state[i], state[i + 1], state[i + 2],
                                           gradients[parts * step + part], adjoint[i], adjoint[i + 1],
                                           adjoint[i + 2], of_step, {}));
    }
    const InnerStep inputs = steps.at(step);
    const auto [to_parameters, to_items, cotangent] = derivative_of_step(
        inputs, state[0], parts > 1 ? state[3] : items, to_gradients[0],
        parts > 1 ? OptionalTensor(to_gradients[1]) : OptionalTensor(), saved.slice(saves * step, saves));
    adjoint[0].add_(to_parameters);
    cotangents.push_back(cotangent);
    if (parts > 1) {
      adjoint[3].add_(to_items);
      add_to_items(inputs, adjoint[3], cotangent);
      tables.push_back(to_gradients[1]);
    }
    // not the other way round: what is not a number is beyond
    const bool within = !limit || at::linalg_vector_norm(adjoint[0]).item<double>() <= *limit;
    if (!within) return {cotangents, tables, true};
  }
  return {cotangents, tables, false};
}

}  // namespace td3_fast::cpu
