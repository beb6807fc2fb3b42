// The CUDA operators over items: checks, scratch and row statistics in PyTorch, launches on the current
// stream. Compiled against any PyTorch; no header of CUDA is included.

#include "operators.h"

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "../checks.h"
#include "kernels.h"

namespace td3_fast::cuda {
namespace {

// Blocks that a pass is split into, at least, where it is large enough: two for each multiprocessor of the
// largest GPUs. They depend on shapes alone, and so do the bits of the result.
constexpr int64_t kBlocks = 264;
constexpr int64_t kSmallestSplit = 64;

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

// Contiguous, in the given type; undefined stays undefined.
Tensor in_type(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor.has_value() && tensor->defined() ? tensor->to(type).contiguous() : Tensor();
}

const void* pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
void* output_pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

Tensor result(const Tensor& tensor, const Tensor& like) {
  return tensor.defined() ? tensor.to(like.scalar_type()) : like.new_empty({0});
}

int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How much of `count` each of the blocks takes that share an owner, where there are `owners` blocks of them.
int64_t split_size(int64_t count, int64_t owners) {
  const int64_t most = std::max<int64_t>(ceil_divide(count, kSmallestSplit), 1);
  const int64_t splits = std::clamp<int64_t>(kBlocks / std::max<int64_t>(owners, 1), 1, most);
  return std::max<int64_t>(ceil_divide(ceil_divide(count, splits), 64) * 64, 64);  // whole tiles
}

// Which kernels run, and the type that they read operands in.
struct Path {
  const char* (*pass)(Pass, const SoftEmbedding&, void*);
  at::ScalarType operands;
  int64_t owners_per_block;
};

// Tables of half precision beside float32 rows go to tensor cores as they are, rows rounded to their type,
// where torch.set_float32_matmul_precision permits such rounding, and in float32 where it does not.
Path choose_path(const Tensor& queries, const Tensor& keys, int64_t width) {
  const at::ScalarType accumulate = accumulate_type(queries);
  if (accumulate == at::kDouble || std::max(keys.size(1), width) > kTileWidth) {
    return {warp_pass, accumulate, 8};
  }
  const bool exact = at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST;
  if (exact || keys.scalar_type() == at::kFloat) {
    return {exact ? tile_pass_float32 : tile_pass_tf32, at::kFloat, 128};
  }
  return {keys.scalar_type() == at::kHalf ? tile_pass_float16 : tile_pass_bfloat16, keys.scalar_type(), 128};
}

// Inputs of one call, held alive and contiguous, and the launch arguments that point to them.
struct Call {
  Path path;
  Tensor queries, keys, values, grad_embedding, logsumexp, remainder, shift, inner;
  Tensor grad_grad_queries, grad_grad_keys, grad_grad_values;
  SoftEmbedding problem{};
  at::TensorOptions accumulate;
  c10::OptionalDeviceGuard guard;
  void* stream;

  // `values` undefined: there are none.
  Call(const Tensor& queries_in, const Tensor& keys_in, const Tensor& values_in, int64_t width)
      : path(choose_path(queries_in, keys_in, width)),
        queries(in_type(queries_in, path.operands)),
        keys(keys_in.contiguous()),
        values(values_in.is_same(keys_in) ? keys : in_type(values_in, keys_in.scalar_type())),
        accumulate(queries_in.options().dtype(accumulate_type(queries_in))),
        guard(queries_in.device()),
        stream(current_stream(queries_in)) {
    const int64_t rows = queries.size(0), items = keys.size(0);
    problem.table = element_of(keys);
    problem.rows = rows;
    problem.items = items;
    problem.rank = keys.size(1);
    problem.width = width;
    problem.split_items = split_size(items, ceil_divide(rows, path.owners_per_block));
    problem.split_rows = split_size(rows, ceil_divide(items, path.owners_per_block));
    problem.queries = pointer(queries);
    problem.keys = pointer(keys);
    problem.values = pointer(values);
  }

  void set_upstream(const OptionalTensor& grad_x,
                    const OptionalTensor& grad_l,
                    const Tensor& embedding,
                    const Tensor& logsumexp_in,
                    const Tensor& remainder_in) {
    grad_embedding = in_type(grad_x, path.operands);
    logsumexp = logsumexp_in.contiguous();
    remainder = remainder_in.contiguous();
    const at::ScalarType type = c10::typeMetaToScalarType(accumulate.dtype());
    inner = grad_embedding.defined() ? grad_embedding.to(type).mul(embedding).sum({1})
                                     : logsumexp.new_zeros(logsumexp.sizes());
    const Tensor grad = in_type(grad_l, type);
    shift = grad.defined() ? grad.sub(inner) : inner.neg();
    problem.grad_embedding = pointer(grad_embedding);
    if (!grad_embedding.defined()) problem.values = nullptr;
    problem.logsumexp = pointer(logsumexp);
    problem.remainder = pointer(remainder);
    problem.inner = pointer(inner);
    problem.shift = pointer(shift);
  }

  void set_cotangents(const OptionalTensor& of_queries,
                      const OptionalTensor& of_keys,
                      const OptionalTensor& of_values) {
    grad_grad_queries = in_type(of_queries, path.operands);
    grad_grad_keys = in_type(of_keys, keys.scalar_type());
    // Without grad_embedding nothing reaches the values.
    if (grad_embedding.defined()) grad_grad_values = in_type(of_values, keys.scalar_type());
    problem.grad_grad_queries = pointer(grad_grad_queries);
    problem.grad_grad_keys = pointer(grad_grad_keys);
    problem.grad_grad_values = pointer(grad_grad_values);
  }

  int64_t item_splits() const { return ceil_divide(problem.items, problem.split_items); }
  int64_t row_splits() const { return ceil_divide(problem.rows, problem.split_rows); }

  void run(Pass pass) { check_launch(path.pass(pass, problem, stream)); }

  // Scratch (splits, rows, columns) of the rows of queries or of a table.
  Tensor scratch(int64_t splits, int64_t rows, int64_t columns) const {
    return queries.new_empty({splits, rows, columns}, accumulate);
  }

  Merge merge(int64_t splits, int64_t rows, int64_t width) const {
    Merge merge{};
    merge.float64 = accumulate.dtype() == at::kDouble;
    merge.splits = splits;
    merge.rows = rows;
    merge.width = width;
    return merge;
  }

  // The sum of scratch (splits, rows, columns) over its splits.
  Tensor sum_splits(const Tensor& scratch) const {
    if (scratch.size(0) == 1) return scratch.squeeze(0);
    Merge sums = merge(scratch.size(0), scratch.size(1), scratch.size(2));
    const Tensor sum = queries.new_empty({sums.rows, sums.width}, accumulate);
    sums.weighted = pointer(scratch);
    sums.embedding = output_pointer(sum);
    check_launch(merge_sums(sums, stream));
    return sum;
  }
};

// embedding (undefined where width is 0), logsumexp and remainder, in the accumulate type.
std::tuple<Tensor, Tensor, Tensor> forward(Call& call) {
  SoftEmbedding& problem = call.problem;
  const Tensor logsumexp = call.queries.new_empty({problem.rows}, call.accumulate);
  const Tensor remainder = logsumexp.new_empty({problem.rows});
  const Tensor embedding =
      problem.width > 0 ? call.queries.new_empty({problem.rows, problem.width}, call.accumulate) : Tensor();
  if (problem.rows == 0) return {embedding, logsumexp, remainder};
  const int64_t splits = call.item_splits();
  const Tensor maxima = call.scratch(splits, problem.rows, 1), sums = call.scratch(splits, problem.rows, 1);
  const Tensor weighted = call.scratch(splits, problem.rows, problem.width);
  problem.maxima = output_pointer(maxima);
  problem.sums = output_pointer(sums);
  problem.weighted = output_pointer(weighted);
  call.run(Pass::kForward);
  Merge merge = call.merge(splits, problem.rows, problem.width);
  merge.maxima = problem.maxima;
  merge.sums = problem.sums;
  merge.weighted = problem.weighted;
  merge.embedding = output_pointer(embedding);
  merge.logsumexp = output_pointer(logsumexp);
  merge.remainder = output_pointer(remainder);
  check_launch(merge_forward(merge, call.stream));
  return {embedding, logsumexp, remainder};
}

struct Gradients {
  Tensor queries, keys, values, grad_embedding, grad_logsumexp;
};

Tensor zeros(const Call& call, int64_t rows, int64_t columns) {
  return call.queries.new_zeros({rows, columns}, call.accumulate);
}

// Gradients of keys and values, where needed.
void sum_over_rows(Call& call, Pass pass, bool keys, bool values, Gradients& gradients) {
  SoftEmbedding& problem = call.problem;
  const bool none = problem.rows == 0;
  if (keys && none) gradients.keys = zeros(call, problem.items, problem.rank);
  if (values && (none || !call.grad_embedding.defined())) {
    gradients.values = zeros(call, problem.items, problem.width);
  }
  keys = keys && !gradients.keys.defined();
  values = values && !gradients.values.defined();
  if (!keys && !values) return;
  const int64_t splits = call.row_splits();
  const Tensor key_sums = keys ? call.scratch(splits, problem.items, problem.rank) : Tensor();
  const Tensor value_sums = values ? call.scratch(splits, problem.items, problem.width) : Tensor();
  problem.grad_keys = output_pointer(key_sums);
  problem.grad_values = output_pointer(value_sums);
  call.run(pass);
  if (keys) gradients.keys = call.sum_splits(key_sums);
  if (values) gradients.values = call.sum_splits(value_sums);
}

// Gradients of queries and of grad_embedding, where needed.
void sum_over_items(Call& call, Pass pass, bool queries, bool grad_embedding, Gradients& gradients) {
  SoftEmbedding& problem = call.problem;
  grad_embedding = grad_embedding && call.grad_embedding.defined();
  if (!queries && !grad_embedding) return;
  const int64_t splits = call.item_splits();
  const Tensor row_sums = queries ? call.scratch(splits, problem.rows, problem.rank) : Tensor();
  const Tensor grad_sums = grad_embedding ? call.scratch(splits, problem.rows, problem.width) : Tensor();
  problem.row_sums = output_pointer(row_sums);
  problem.grad_sums = output_pointer(grad_sums);
  if (problem.rows > 0) call.run(pass);
  if (queries) gradients.queries = call.sum_splits(row_sums);
  if (grad_embedding) gradients.grad_embedding = call.sum_splits(grad_sums);
}

Gradients first_order(Call& call, std::array<bool, 3> needed) {
  Gradients gradients;
  sum_over_items(call, Pass::kSumOverItems, needed[0], false, gradients);
  sum_over_rows(call, Pass::kSumOverRows, needed[1], needed[2], gradients);
  return gradients;
}

// The row means of u, and the offset of the second order.
std::tuple<Tensor, Tensor> row_means(Call& call) {
  SoftEmbedding& problem = call.problem;
  const Tensor u_mean = call.queries.new_empty({problem.rows}, call.accumulate);
  const Tensor offset = u_mean.new_empty({problem.rows});
  if (problem.rows == 0) return {u_mean, offset};
  const int64_t splits = call.item_splits();
  const Tensor means = call.scratch(splits, problem.rows, 7);
  problem.means = output_pointer(means);
  call.run(Pass::kRowMeans);
  Merge merge = call.merge(splits, problem.rows, 0);
  merge.means = problem.means;
  merge.u_mean = output_pointer(u_mean);
  merge.offset = output_pointer(offset);
  check_launch(merge_means(merge, call.stream));
  return {u_mean, offset};
}

// needed: queries, keys, values, grad_embedding, grad_logsumexp.
Gradients second_order(Call& call, const std::tuple<Tensor, Tensor>& means, std::array<bool, 5> needed) {
  const auto& [u_mean, offset] = means;
  call.problem.u_mean = pointer(u_mean);
  call.problem.offset = pointer(offset);
  Gradients gradients;
  if (needed[4]) gradients.grad_logsumexp = u_mean;
  sum_over_items(call, Pass::kSecondSumOverItems, needed[0], needed[3], gradients);
  sum_over_rows(call, Pass::kSecondSumOverRows, needed[1], needed[2], gradients);
  return gradients;
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor> soft_embedding_forward(const Tensor& queries,
                                                          const Tensor& keys,
                                                          const Tensor& values) {
  check_soft_embedding(queries, keys, values);
  Call call(queries, keys, values, values.size(1));
  const auto [embedding, logsumexp, remainder] = forward(call);
  const Tensor out =
      embedding.defined() ? embedding.to(queries.scalar_type()) : queries.new_empty({queries.size(0), 0});
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
  const Gradients gradients = second_order(call, row_means(call), needed);
  return {result(gradients.queries, queries), result(gradients.keys, keys), result(gradients.values, values),
          result(gradients.grad_embedding, queries), result(gradients.grad_logsumexp, logsumexp)};
}

// Probabilities are never kept on CUDA.
std::tuple<Tensor, Tensor, Tensor, Tensor> item_logsumexp_forward(const Tensor& hidden,
                                                                  const Tensor& items,
                                                                  bool save,
                                                                  bool /*keep: the CPU alone does*/) {
  check_soft_embedding(hidden, items, items);
  Call call(hidden, items, save ? items : Tensor(), save ? items.size(1) : 0);
  const auto [mean, logsumexp, remainder] = forward(call);
  const Tensor saved = save && !mean.defined() ? logsumexp.new_empty({hidden.size(0), 0}) : mean;
  return {logsumexp, remainder, result(saved, logsumexp), logsumexp.new_empty({0})};
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
  if (needed[0]) grad_hidden = mean.mul(grad_logsumexp.unsqueeze(1));
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
  // With frozen items u is γh·item, and its mean γh·mean; without an embedding there is nothing to offset.
  const bool known = call.grad_grad_queries.defined() && !call.grad_grad_keys.defined();
  const auto means = known ? std::tuple(call.grad_grad_queries.to(mean.scalar_type()).mul(mean).sum({1}),
                                        call.logsumexp.new_zeros(call.logsumexp.sizes()))
                           : row_means(call);
  const Gradients gradients = second_order(call, means, {needed[1], needed[2], false, false, needed[0]});
  return {result(gradients.grad_logsumexp, logsumexp), result(gradients.queries, hidden),
          result(gradients.keys, items)};
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
  const Tensor targets = target.contiguous(), ranks = target.new_empty(target.sizes());
  Tensor offsets, excluded;
  Ranking problem = ranking(rows, items, targets, ranks);
  problem.exclude_padding = exclude_padding;
  problem.split_items = split_size(problem.items, ceil_divide(problem.rows, 64));
  const Tensor target_scores = rows.new_empty({problem.rows});
  problem.target_scores = output_pointer(target_scores);
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
  const Tensor ranks = target.new_empty(target.sizes());
  Ranking problem = ranking(rows, items, targets, ranks);
  problem.candidates = ids.size(1);
  problem.candidate_ids = ids.const_data_ptr<int64_t>();
  if (problem.rows > 0) check_launch(candidate_ranks(problem, current_stream(hidden)));
  return ranks;
}

void check_launch(const char* error) {
  TORCH_CHECK(error == nullptr, "td3_fast: CUDA kernel not launched: ", error);
}

}  // namespace td3_fast::cuda
