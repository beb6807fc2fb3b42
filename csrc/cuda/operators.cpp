// The CUDA operators: checks, scratch and the merge of splits in PyTorch, launches on the current stream.
// Compiled against any PyTorch; no header of CUDA is included.

#include "operators.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace td3_fast::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlocks = 512;
constexpr int64_t kSmallestSplit = 256;
constexpr int64_t kRowsPerBlock = 8;

void check_launch(const char* error) {
  TORCH_CHECK(error == nullptr, "td3_fast: CUDA kernel not launched: ", error);
}

Element element_of(const Tensor& table) {
  switch (table.scalar_type()) {
    case at::kDouble:
      return Element::kFloat64;
    case at::kHalf:
      return Element::kFloat16;
    case at::kBFloat16:
      return Element::kBFloat16;
    default:
      return Element::kFloat32;
  }
}

// Contiguous, in the accumulate type; undefined stays undefined.
Tensor rows_in(const OptionalTensor& rows, at::ScalarType accumulate) {
  return rows.has_value() && rows->defined() ? rows->to(accumulate).contiguous() : Tensor();
}

Tensor table_in(const OptionalTensor& table) {
  return table.has_value() && table->defined() ? table->contiguous() : Tensor();
}

const void* pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
void* output_pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

Tensor output(bool needed, at::IntArrayRef sizes, const Tensor& like) {
  return needed ? at::empty(sizes, like.options()) : Tensor();
}

Tensor result(const Tensor& tensor, const Tensor& like) {
  return tensor.defined() ? tensor.to(like.scalar_type()) : at::empty({0}, like.options());
}

// Inputs of one call, held alive and contiguous, and the launch arguments that point to them.
struct Call {
  Tensor queries, keys, values, grad_embedding, logsumexp, remainder, shift, inner;
  Tensor grad_grad_queries, grad_grad_keys, grad_grad_values;
  SoftEmbedding problem{};
  c10::OptionalDeviceGuard guard;
  void* stream;

  // `values` undefined: there are none, or the keys take their place.
  Call(const Tensor& queries_in, const Tensor& keys_in, const Tensor& values_in, int64_t width)
      : queries(queries_in.to(accumulate_type(queries_in)).contiguous()),
        keys(keys_in.contiguous()),
        values(table_in(values_in)),
        guard(queries_in.device()),
        stream(current_stream(queries_in)) {
    const int64_t rows = queries.size(0), items = keys.size(0);
    problem.table = element_of(keys);
    problem.rows = rows;
    problem.items = items;
    problem.rank = keys.size(1);
    problem.width = width;
    const int64_t row_blocks = std::max<int64_t>((rows + kRowsPerBlock - 1) / kRowsPerBlock, 1);
    problem.splits =
        std::clamp<int64_t>(kBlocks / row_blocks, 1, (items + kSmallestSplit - 1) / kSmallestSplit);
    problem.queries = pointer(queries);
    problem.keys = pointer(keys);
    problem.values = pointer(values);
  }

  void set_upstream(const OptionalTensor& grad_x,
                    const OptionalTensor& grad_l,
                    const Tensor& embedding,
                    const Tensor& logsumexp_in,
                    const Tensor& remainder_in) {
    const at::ScalarType accumulate = queries.scalar_type();
    grad_embedding = rows_in(grad_x, accumulate);
    logsumexp = logsumexp_in.contiguous();
    remainder = remainder_in.contiguous();
    inner = grad_embedding.defined() ? at::sum(grad_embedding * embedding, {1}).to(accumulate)
                                     : at::zeros_like(logsumexp);
    const Tensor grad = rows_in(grad_l, accumulate);
    shift = grad.defined() ? grad - inner : -inner;
    problem.grad_embedding = pointer(grad_embedding);
    problem.logsumexp = pointer(logsumexp);
    problem.remainder = pointer(remainder);
    problem.inner = pointer(inner);
    problem.shift = pointer(shift);
  }

  void set_cotangents(const OptionalTensor& of_queries,
                      const OptionalTensor& of_keys,
                      const OptionalTensor& of_values) {
    grad_grad_queries = rows_in(of_queries, queries.scalar_type());
    grad_grad_keys = table_in(of_keys);
    // Without grad_embedding nothing reaches the values.
    if (grad_embedding.defined()) grad_grad_values = table_in(of_values);
    problem.grad_grad_queries = pointer(grad_grad_queries);
    problem.grad_grad_keys = pointer(grad_grad_keys);
    problem.grad_grad_values = pointer(grad_grad_values);
  }

  Tensor per_split(int64_t columns) const {
    return at::empty({problem.splits, problem.rows, columns}, queries.options());
  }
};

// embedding (undefined where width is 0), logsumexp and remainder, in the accumulate type.
std::tuple<Tensor, Tensor, Tensor> forward(Call& call) {
  SoftEmbedding& problem = call.problem;
  const Tensor maxima = call.per_split(1), sums = call.per_split(1), weighted = call.per_split(problem.width);
  problem.maxima = output_pointer(maxima);
  problem.sums = output_pointer(sums);
  problem.weighted = output_pointer(weighted);
  if (problem.rows > 0) check_launch(cuda::forward(problem, call.stream));
  const Tensor peak = at::amax(maxima, {0});
  const Tensor factor = at::exp(maxima - peak);
  const Tensor total = at::sum(sums * factor, {0});
  const Tensor embedding = problem.width > 0 ? at::sum(weighted * factor, {0}) / total : Tensor();
  const Tensor exact = (peak.to(at::kDouble) + at::log(total.to(at::kDouble))).squeeze(1);
  const Tensor logsumexp = exact.to(call.queries.scalar_type());
  return {embedding, logsumexp, (exact - logsumexp).to(call.queries.scalar_type())};
}

struct Gradients {
  Tensor queries, keys, values, grad_embedding, grad_logsumexp;
};

void set_table_outputs(Call& call, Gradients& gradients, bool keys, bool values) {
  SoftEmbedding& problem = call.problem;
  gradients.keys = output(keys, {problem.items, problem.rank}, call.queries);
  gradients.values =
      output(values && call.grad_embedding.defined(), {problem.items, problem.width}, call.queries);
  problem.grad_keys = output_pointer(gradients.keys);
  problem.grad_values = output_pointer(gradients.values);
}

Gradients first_order(Call& call, std::array<bool, 3> needed) {
  SoftEmbedding& problem = call.problem;
  Gradients gradients;
  if (needed[0]) {
    const Tensor sums = call.per_split(problem.rank);
    problem.row_sums = output_pointer(sums);
    if (problem.rows > 0) check_launch(sum_over_items(problem, false, call.stream));
    gradients.queries = at::sum(sums, {0});
  }
  set_table_outputs(call, gradients, needed[1], needed[2]);
  if (problem.grad_keys != nullptr || problem.grad_values != nullptr) {
    check_launch(sum_over_rows(problem, false, call.stream));
  }
  if (needed[2] && !gradients.values.defined()) {
    gradients.values = at::zeros({problem.items, problem.width}, call.queries.options());
  }
  return gradients;
}

// needed: queries, keys, values, grad_embedding, grad_logsumexp.
Gradients second_order(Call& call, std::array<bool, 5> needed) {
  SoftEmbedding& problem = call.problem;
  Gradients gradients;
  const Tensor partial_means = call.per_split(7);
  problem.means = output_pointer(partial_means);
  if (problem.rows > 0) check_launch(row_means(problem, call.stream));
  // Every split's sums are about its own centre; the merge is about that of the largest peak.
  const auto part = [&](int64_t column) { return partial_means.select(2, column); };
  const Tensor centre = part(1).gather(0, part(0).argmax(0, /*keepdim=*/true));
  const Tensor moved = part(1) - centre;
  const Tensor mass = at::sum(part(2), {0}), sum_w = at::sum(part(4), {0});
  const Tensor from_centre = at::sum(part(3) + moved * part(2), {0}) / mass;
  const Tensor covariance = at::sum(part(5) + moved * part(4), {0});
  const Tensor u_mean = centre.squeeze(0) + from_centre;
  const Tensor offset = covariance - from_centre * sum_w + at::sum(part(6), {0});
  problem.u_mean = pointer(u_mean);
  problem.offset = pointer(offset);
  if (needed[4]) gradients.grad_logsumexp = u_mean;

  const bool towards_grad = needed[3] && call.grad_embedding.defined();
  if (needed[0] || towards_grad) {
    const Tensor row_sums = needed[0] ? call.per_split(problem.rank) : Tensor();
    const Tensor grad_sums = towards_grad ? call.per_split(problem.width) : Tensor();
    problem.row_sums = output_pointer(row_sums);
    problem.grad_sums = output_pointer(grad_sums);
    if (problem.rows > 0) check_launch(sum_over_items(problem, true, call.stream));
    if (needed[0]) gradients.queries = at::sum(row_sums, {0});
    if (towards_grad) gradients.grad_embedding = at::sum(grad_sums, {0});
  }
  set_table_outputs(call, gradients, needed[1], needed[2]);
  if (problem.grad_keys != nullptr || problem.grad_values != nullptr) {
    check_launch(sum_over_rows(problem, true, call.stream));
  }
  if (needed[2] && !gradients.values.defined()) {
    gradients.values = at::zeros({problem.items, problem.width}, call.queries.options());
  }
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> soft_embedding_forward(const Tensor& queries,
                                                          const Tensor& keys,
                                                          const Tensor& values) {
  check_soft_embedding(queries, keys, values);
  Call call(queries, keys, values, values.size(1));
  const auto [embedding, logsumexp, remainder] = forward(call);
  const Tensor out = embedding.defined() ? embedding.to(queries.scalar_type())
                                         : at::empty({queries.size(0), 0}, queries.options());
  return {out, logsumexp, remainder};
}

std::tuple<Tensor, Tensor, Tensor> soft_embedding_backward(const OptionalTensor& grad_embedding,
                                                           const OptionalTensor& grad_logsumexp,
                                                           const Tensor& queries,
                                                           const Tensor& keys,
                                                           const Tensor& values,
                                                           const Tensor& embedding,
                                                           const Tensor& logsumexp,
                                                           const Tensor& remainder,
                                                           std::array<bool, 3> needed) {
  check_soft_embedding(queries, keys, values);
  Call call(queries, keys, values, values.size(1));
  call.set_upstream(grad_embedding, grad_logsumexp, embedding, logsumexp, remainder);
  const Gradients gradients = first_order(call, needed);
  return {result(gradients.queries, queries), result(gradients.keys, keys), result(gradients.values, values)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_embedding_double_backward(
    const OptionalTensor& grad_grad_queries,
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
  check_soft_embedding(queries, keys, values);
  Call call(queries, keys, values, values.size(1));
  call.set_upstream(grad_embedding, grad_logsumexp, embedding, logsumexp, remainder);
  call.set_cotangents(grad_grad_queries, grad_grad_keys, grad_grad_values);
  const Gradients gradients = second_order(call, needed);
  return {result(gradients.queries, queries), result(gradients.keys, keys), result(gradients.values, values),
          result(gradients.grad_embedding, queries), result(gradients.grad_logsumexp, logsumexp)};
}

// Probabilities are never kept on CUDA.
std::tuple<Tensor, Tensor, Tensor, Tensor> item_logsumexp_forward(const Tensor& hidden,
                                                                  const Tensor& items,
                                                                  bool save) {
  check_soft_embedding(hidden, items, items);
  Call call(hidden, items, save ? items : Tensor(), save ? items.size(1) : 0);
  const auto [mean, logsumexp, remainder] = forward(call);
  const Tensor saved = save && !mean.defined() ? at::empty({hidden.size(0), 0}, logsumexp.options()) : mean;
  return {logsumexp, remainder, result(saved, logsumexp), at::empty({0}, logsumexp.options())};
}

std::tuple<Tensor, Tensor> item_logsumexp_backward(const Tensor& grad_logsumexp,
                                                   const Tensor& hidden,
                                                   const Tensor& items,
                                                   const Tensor& logsumexp,
                                                   const Tensor& remainder,
                                                   const Tensor& mean,
                                                   const Tensor& /*probabilities*/,
                                                   std::array<bool, 2> needed) {
  check_soft_embedding(hidden, items, items);
  Tensor grad_hidden, grad_items;
  if (needed[0]) grad_hidden = mean * grad_logsumexp.unsqueeze(1);
  if (needed[1]) {
    Call call(hidden, items, Tensor(), 0);
    call.set_upstream(std::nullopt, grad_logsumexp, mean, logsumexp, remainder);
    grad_items = first_order(call, {false, true, false}).keys;
  }
  return {result(grad_hidden, hidden), result(grad_items, items)};
}

std::tuple<Tensor, Tensor, Tensor> item_logsumexp_double_backward(const OptionalTensor& grad_grad_hidden,
                                                                  const OptionalTensor& grad_grad_items,
                                                                  const Tensor& grad_logsumexp,
                                                                  const Tensor& hidden,
                                                                  const Tensor& items,
                                                                  const Tensor& logsumexp,
                                                                  const Tensor& remainder,
                                                                  const Tensor& mean,
                                                                  const Tensor& /*probabilities*/,
                                                                  std::array<bool, 3> needed) {
  check_soft_embedding(hidden, items, items);
  Call call(hidden, items, Tensor(), 0);
  call.set_upstream(std::nullopt, grad_logsumexp, mean, logsumexp, remainder);
  call.set_cotangents(grad_grad_hidden, grad_grad_items, std::nullopt);
  const Gradients gradients = second_order(call, {needed[1], needed[2], false, false, needed[0]});
  return {result(gradients.grad_logsumexp, logsumexp), result(gradients.queries, hidden),
          result(gradients.keys, items)};
}

Ranking ranking(const Tensor& hidden, const Tensor& items, const Tensor& target, const Tensor& ranks) {
  Ranking problem{};
  problem.table = element_of(items);
  problem.rows = hidden.size(0);
  problem.items = items.size(0);
  problem.depth = items.size(1);
  problem.hidden = hidden.const_data_ptr();
  problem.item_embeddings = items.const_data_ptr();
  problem.target = target.const_data_ptr<int64_t>();
  problem.ranks = ranks.mutable_data_ptr<int64_t>();
  return problem;
}

Tensor target_rank(const Tensor& hidden,
                   const Tensor& item_embeddings,
                   const Tensor& target,
                   const OptionalTensor& excluded_offsets,
                   const OptionalTensor& excluded_items,
                   bool exclude_padding) {
  check_ranking(hidden, item_embeddings, target);
  check_excluded(hidden, excluded_offsets, excluded_items);
  const c10::OptionalDeviceGuard guard(hidden.device());
  const Tensor rows = hidden.to(accumulate_type(hidden)).contiguous(), items = item_embeddings.contiguous();
  const Tensor targets = target.contiguous(), ranks = at::empty(target.sizes(), target.options());
  Tensor offsets, excluded;
  Ranking problem = ranking(rows, items, targets, ranks);
  problem.exclude_padding = exclude_padding;
  if (excluded_offsets.has_value()) {
    offsets = excluded_offsets->contiguous();
    excluded = excluded_items->contiguous();
    problem.excluded_offsets = offsets.const_data_ptr<int64_t>();
    problem.excluded_items = excluded.const_data_ptr<int64_t>();
  }
  if (problem.rows > 0) check_launch(full_ranks(problem, current_stream(hidden)));
  return ranks;
}

Tensor candidate_rank(const Tensor& hidden,
                      const Tensor& item_embeddings,
                      const Tensor& target,
                      const Tensor& candidates) {
  check_ranking(hidden, item_embeddings, target);
  check_candidates(hidden, candidates);
  const c10::OptionalDeviceGuard guard(hidden.device());
  const Tensor rows = hidden.to(accumulate_type(hidden)).contiguous(), items = item_embeddings.contiguous();
  const Tensor targets = target.contiguous(), ids = candidates.contiguous();
  const Tensor ranks = at::empty(target.sizes(), target.options());
  Ranking problem = ranking(rows, items, targets, ranks);
  problem.candidates = ids.size(1);
  problem.candidate_ids = ids.const_data_ptr<int64_t>();
  if (problem.rows > 0) check_launch(candidate_ranks(problem, current_stream(hidden)));
  return ranks;
}

}  // namespace

void register_operators(torch::Library& m) {
  m.impl("soft_embedding_forward", soft_embedding_forward);
  m.impl("soft_embedding_backward", soft_embedding_backward);
  m.impl("soft_embedding_double_backward", soft_embedding_double_backward);
  m.impl("item_logsumexp_forward", item_logsumexp_forward);
  m.impl("item_logsumexp_backward", item_logsumexp_backward);
  m.impl("item_logsumexp_double_backward", item_logsumexp_double_backward);
  m.impl("target_rank", target_rank);
  m.impl("candidate_rank", candidate_rank);
}

}  // namespace td3_fast::cuda
