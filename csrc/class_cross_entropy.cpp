// The cross-entropy to one item per row, on any device: the operators of item_logsumexp, and what the score
// of the target adds to them.
//
// An operator of its own, since autograd would add two dense gradients of the item table: that of the
// logsumexp, and that of the look-up of the targets, zero but for a few rows.

#include "class_cross_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "dispatch.h"

namespace td3_fast {
namespace {

// Rows are widened before they reach the operators: what these return is to be rounded after the target's
// share.
Tensor widened(const Tensor& rows) {
  return rows.to(accumulate_type(rows));
}

// table[target], (rows, d), in the type of sums.
Tensor look_up(const Tensor& table, const Tensor& target) {
  return widened(at::index_select(table, 0, target));
}

// Adds to every item of the table the rows that it is the target of, on a device and without waiting for it.
void add_sorted_rows_(const Tensor& table, const Tensor& target, const Tensor& rows) {
  if (table.scalar_type() == rows.scalar_type()) {
    table.index_put_({target}, rows, /*accumulate=*/true);
    return;
  }
  // A table of fewer bits would be rounded after each row, so rows of the same item are summed first.
  const int64_t count = target.size(0);
  if (count == 0) return;
  const auto [sorted, order] = at::sort(target, /*stable=*/true, 0, false);
  const Tensor is_new = at::ne(sorted.narrow(0, 1, count - 1), sorted.narrow(0, 0, count - 1));
  const Tensor item = at::constant_pad_nd(at::cumsum(is_new, 0, at::kLong), {1, 0});  // the how-manieth
  const Tensor sums =
      at::embedding_dense_backward(at::index_select(rows, 0, order), item, count, /*padding_idx=*/-1, false);
  // beyond the last there are zeros, for item 0
  const Tensor ids = at::zeros_like(target).scatter_(0, item, sorted);
  table.index_put_({ids}, sums.to(table.scalar_type()), /*accumulate=*/true);
}

// Adds to every item of the table the sum of the rows that it is the target of, taken in their order.
void add_rows_(const Tensor& table, const Tensor& target, const Tensor& rows) {
  if (!table.device().is_cpu()) {
    add_sorted_rows_(table, target, rows);
    return;
  }
  // index_add_ makes many small calls, and rounds a half-precision table after each.
  const Tensor from = rows.contiguous(), ids = target.contiguous();
  const int64_t d = table.size(1), count = ids.numel();
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return id[a] < id[b]; });
  TORCH_CHECK_INDEX(count == 0 || (id[order.front()] >= 0 && id[order.back()] < table.size(0)),
                    "a target is not one of the ", table.size(0), " items");
  const auto add = [&](auto* items, const auto* row) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(row)>>;
    std::vector<T> sum(d);
    for (int64_t first = 0, last; first < count; first = last) {
      const int64_t item = id[order[first]];
      std::fill(sum.begin(), sum.end(), T(0));
      for (last = first; last < count && id[order[last]] == item; ++last) {
        for (int64_t column = 0; column < d; ++column) sum[column] += row[order[last] * d + column];
      }
      for (int64_t column = 0; column < d; ++column) {
        // rounded first: where the target has all of the probability the two cancel
        auto& to = items[item * d + column];
        to += static_cast<std::remove_reference_t<decltype(to)>>(sum[column]);
      }
    }
  };
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, table.scalar_type(), "class_cross_entropy", [&] {
    using Sum = at::opmath_type<scalar_t>;
    add(table.mutable_data_ptr<scalar_t>(), from.const_data_ptr<Sum>());
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> class_cross_entropy_forward(
    const Tensor& hidden, const Tensor& items, const Tensor& target, bool save, bool keep) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, bool, bool);
  static const auto op = find_operator<Signature>("td3_fast::item_logsumexp_forward");
  check_ranking(hidden, items, target);
  const Tensor rows = widened(hidden);
  const auto [logsumexp, remainder, mean, probabilities] = op.call(rows, items, save, keep);
  const Tensor score = at::sum(rows * look_up(items, target), {1});
  return {logsumexp - score, logsumexp, remainder, mean, probabilities};
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
  using Signature =
      std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Tensor&, const Tensor&, std::array<bool, 2>);
  static const auto op = find_operator<Signature>("td3_fast::item_logsumexp_backward");
  const Tensor rows = widened(hidden), grad = grad_loss.unsqueeze(1);
  auto [grad_hidden, grad_items] =
      op.call(grad_loss, rows, items, logsumexp, remainder, mean, probabilities, {false, needed[1]});
  if (needed[0]) grad_hidden = (mean - look_up(items, target)) * grad;
  if (needed[1]) add_rows_(grad_items, target, rows * -grad);
  return {grad_hidden.to(hidden.scalar_type()), grad_items};
}

std::tuple<Tensor, Tensor, Tensor> class_cross_entropy_double_backward(const OptionalTensor& grad_grad_hidden,
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
  using Signature = std::tuple<Tensor, Tensor, Tensor>(
      const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::array<bool, 3>);
  static const auto op = find_operator<Signature>("td3_fast::item_logsumexp_double_backward");
  const Tensor rows = widened(hidden), grad = grad_loss.unsqueeze(1);
  const OptionalTensor to_hidden =
      grad_grad_hidden ? OptionalTensor(widened(*grad_grad_hidden)) : std::nullopt;
  auto [grad_grad_loss, grad_hidden, grad_items] = op.call(to_hidden, grad_grad_items, grad_loss, rows, items,
                                                           logsumexp, remainder, mean, probabilities, needed);
  if (to_hidden) {
    if (needed[0]) grad_grad_loss = grad_grad_loss - at::sum(*to_hidden * look_up(items, target), {1});
    if (needed[2]) add_rows_(grad_items, target, *to_hidden * -grad);
  }
  if (grad_grad_items) {
    const Tensor moved = look_up(*grad_grad_items, target);
    if (needed[0]) grad_grad_loss = grad_grad_loss - at::sum(rows * moved, {1});
    if (needed[1]) grad_hidden = grad_hidden - moved * grad;
  }
  return {grad_grad_loss, grad_hidden.to(hidden.scalar_type()), grad_items};
}

TORCH_LIBRARY_IMPL(td3_fast, CompositeExplicitAutograd, m) {
  m.impl("class_cross_entropy_forward", class_cross_entropy_forward);
  m.impl("class_cross_entropy_backward", class_cross_entropy_backward);
  m.impl("class_cross_entropy_double_backward", class_cross_entropy_double_backward);
}

}  // namespace td3_fast
