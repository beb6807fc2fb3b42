// Additive attention on the CPU: forward, backward and double backward; the passes are in
// additive_attention_kernels.cpp.

#include "additive_attention.h"

#include "../checks.h"
#include "groups.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

// Measured cost of each order, in plain multiply-adds for each one of a forward pass.
constexpr int64_t kForwardCost = 2, kBackwardCost = 5, kDoubleBackwardCost = 15;

// The tensors that every order reads, and a call on them whose outputs are still to be filled in.
template <typename T>
struct AttentionInputs {
  Tensor query, states, key_weight, energy, lengths;
  std::vector<int64_t> longest, order;
  AttentionCall<T> call{};

  AttentionInputs(const Tensor& query_in,
                  const Tensor& states_in,
                  const Tensor& key_weight_in,
                  const Tensor& energy_in,
                  const Tensor& lengths_in)
      : query(query_in.contiguous()),
        states(states_in.contiguous()),
        key_weight(key_weight_in.contiguous()),
        energy(energy_in.contiguous()),
        lengths(lengths_in.contiguous()),
        longest(states.size(0), 0) {
    const int64_t queries = query.size(1);
    call.sizes = {states.size(1), states.size(2), queries};
    call.query = query.const_data_ptr<T>();
    call.states = states.const_data_ptr<T>();
    call.key_weight = key_weight.const_data_ptr<T>();
    call.energy = energy.const_data_ptr<T>();
    call.lengths = lengths.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < lengths.numel(); ++i) {
      TORCH_CHECK_INDEX(call.lengths[i] >= 0 && call.lengths[i] <= call.sizes.length, "length ",
                        call.lengths[i], " is not one of sequences of ", call.sizes.length, " states");
      longest[i / queries] = std::max(longest[i / queries], call.lengths[i]);
    }
    call.longest = longest.data();
    order = longest_first(call.longest, states.size(0), call.sizes.length);
    call.order = order.data();
  }

  template <typename Run>
  void for_groups(bool tangents, int64_t cost, const Tensor& sums, const Run& run) const {
    const int64_t steps = std::accumulate(longest.begin(), longest.end(), int64_t{0});
    const int64_t of_state = (call.sizes.width + 8 * call.sizes.queries) * call.sizes.width;
    run_groups<T>(additive_attention<T>().lanes, states.size(0),
                  additive_attention<T>().scratch_size(call.sizes, tangents), cost * steps * of_state, sums,
                  run);
  }
};

void check_attention(const Tensor& query,
                     const Tensor& states,
                     const Tensor& key_weight,
                     const Tensor& energy,
                     const Tensor& lengths) {
  const bool fits = query.dim() == 3 && states.dim() == 3 && query.size(0) == states.size(0) &&
                    query.size(2) == states.size(2) && key_weight.dim() == 2 &&
                    key_weight.size(0) == states.size(2) && key_weight.size(1) == states.size(2) &&
                    energy.dim() == 1 && energy.size(0) == states.size(2);
  TORCH_CHECK_VALUE(fits,
                    "expected a query (batch, k, h), states (batch, length, h), a key weight (h, h) and an "
                    "energy (h,), got ",
                    query.sizes(), ", ", states.sizes(), ", ", key_weight.sizes(), " and ", energy.sizes());
  const auto type = states.scalar_type();
  TORCH_CHECK_VALUE((type == at::kFloat || type == at::kDouble) && query.scalar_type() == type &&
                        key_weight.scalar_type() == type && energy.scalar_type() == type,
                    "query, states and weights must all be float32 or all float64");
  TORCH_CHECK_VALUE(lengths.dim() == 2 && lengths.size(0) == query.size(0) &&
                        lengths.size(1) == query.size(1) && lengths.scalar_type() == at::kLong,
                    "expected int64 lengths (batch, k), got ", lengths.sizes(), " of ",
                    lengths.scalar_type());
}

void check_upstream(const Tensor& grad_local, const Tensor& query) {
  TORCH_CHECK_VALUE(grad_local.sizes() == query.sizes() && grad_local.scalar_type() == query.scalar_type(),
                    "expected a gradient (batch, k, h) of the dtype of the query, got ", grad_local.sizes(),
                    " of ", grad_local.scalar_type());
}

}  // namespace

Tensor additive_attention_forward(const Tensor& query,
                                  const Tensor& states,
                                  const Tensor& key_weight,
                                  const Tensor& energy,
                                  const Tensor& lengths) {
  check_attention(query, states, key_weight, energy, lengths);
  return with_type(states, [&](auto zero) {
    using T = decltype(zero);
    AttentionInputs<T> in(query, states, key_weight, energy, lengths);
    const Tensor local = query.new_empty(query.sizes());
    in.call.local = local.mutable_data_ptr<T>();
    in.for_groups(false, kForwardCost, Tensor(), [&](int64_t first, int64_t count, void* scratch, T*) {
      additive_attention<T>().forward(in.call, first, count, scratch);
    });
    return local;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(const Tensor& grad_local,
                                                                       const Tensor& query,
                                                                       const Tensor& states,
                                                                       const Tensor& key_weight,
                                                                       const Tensor& energy,
                                                                       const Tensor& lengths) {
  check_attention(query, states, key_weight, energy, lengths);
  check_upstream(grad_local, query);
  return with_type(states, [&](auto zero) {
    using T = decltype(zero);
    AttentionInputs<T> in(query, states, key_weight, energy, lengths);
    const Tensor grad = grad_local.contiguous();
    const Tensor grad_query = query.new_empty(query.sizes()), grad_states = states.new_empty(states.sizes());
    const Tensor sums = sums_of(key_weight, energy);
    in.call.grad_local = grad.const_data_ptr<T>();
    in.call.grad_query = grad_query.mutable_data_ptr<T>();
    in.call.grad_states = grad_states.mutable_data_ptr<T>();
    in.for_groups(false, kBackwardCost, sums, [&](int64_t first, int64_t count, void* scratch, T* to) {
      additive_attention<T>().backward(in.call, first, count, scratch, to);
    });
    const auto [of_keys, of_energy] = split_sums<T>(sums, key_weight, energy);
    return std::make_tuple(grad_query, grad_states, of_keys, of_energy);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> additive_attention_double_backward(
    const OptionalTensor& grad_grad_query,
    const OptionalTensor& grad_grad_states,
    const OptionalTensor& grad_grad_key_weight,
    const OptionalTensor& grad_grad_energy,
    const Tensor& grad_local,
    const Tensor& query,
    const Tensor& states,
    const Tensor& key_weight,
    const Tensor& energy,
    const Tensor& lengths) {
  check_attention(query, states, key_weight, energy, lengths);
  check_upstream(grad_local, query);
  return with_type(states, [&](auto zero) {
    using T = decltype(zero);
    AttentionInputs<T> in(query, states, key_weight, energy, lengths);
    const Tensor to_keys = direction_or_zeros(grad_grad_key_weight, key_weight);
    const Tensor to_energy = direction_or_zeros(grad_grad_energy, energy);
    const Tensor to_query = direction(grad_grad_query, query);
    const Tensor to_states = direction(grad_grad_states, states);
    const Tensor grad = grad_local.contiguous(), local = query.new_empty(query.sizes());
    const Tensor grad_query = query.new_empty(query.sizes()), grad_states = states.new_empty(states.sizes());
    const Tensor sums = sums_of(key_weight, energy);
    in.call.key_weight_tangent = to_keys.const_data_ptr<T>();
    in.call.energy_tangent = to_energy.const_data_ptr<T>();
    if (to_query.defined()) in.call.query_tangent = to_query.const_data_ptr<T>();
    if (to_states.defined()) in.call.states_tangent = to_states.const_data_ptr<T>();
    in.call.grad_local = grad.const_data_ptr<T>();
    in.call.local = local.mutable_data_ptr<T>();
    in.call.grad_query = grad_query.mutable_data_ptr<T>();
    in.call.grad_states = grad_states.mutable_data_ptr<T>();
    in.for_groups(true, kDoubleBackwardCost, sums, [&](int64_t first, int64_t count, void* scratch, T* to) {
      additive_attention<T>().double_backward(in.call, first, count, scratch, to);
    });
    const auto [of_keys, of_energy] = split_sums<T>(sums, key_weight, energy);
    return std::make_tuple(local, grad_query, grad_states, of_keys, of_energy);
  });
}

}  // namespace td3_fast::cpu
