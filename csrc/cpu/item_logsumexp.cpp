// The operators of the item logsumexp on the CPU.

#include "operators.h"

namespace td3_fast::cpu {

// With `save`, also softmax(hidden items^T) items; with `keep`, while it is small, softmax(hidden items^T) as
// kept.h has it.
std::tuple<Tensor, Tensor, Tensor, Tensor> item_logsumexp_forward(const Tensor& hidden,
                                                                  const Tensor& items,
                                                                  bool save,
                                                                  bool keep) {
  check_soft_embedding(hidden, items, items);
  return with_accumulate_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = hidden.size(0), num_items = items.size(0), width = items.size(1);
    const Tensor rows_in = as<T>(hidden);
    const Tensor logsumexp = output<T>(true, {rows}), remainder = output<T>(true, {rows});
    const Tensor mean = output<T>(save, {rows, width});
    const int64_t panels_to_keep = save && keep ? kept_panels<T>(rows, items) : 0;
    const Tensor probabilities = pooled(panels_to_keep * kept_panel_size<T>(num_items), kType<T>);
    const Kept<T> kept = kept_in<T>(probabilities, num_items);
    const Table<T> table(items);
    for_row_blocks<T>(rows, width, false, [&](int64_t begin, int64_t count) {
      forward<T>(rows_of(rows_in, begin, count), table, Table<T>(), num_items, rows_of(mean, begin, count),
                 rows_of(logsumexp, begin, count), rows_of(remainder, begin, count), kept.from_row(begin));
    });
    return std::make_tuple(logsumexp, remainder, result(mean, logsumexp), probabilities);
  });
}

std::tuple<Tensor, Tensor> item_logsumexp_backward(const Tensor& grad_logsumexp,
                                                   const Tensor& hidden,
                                                   const Tensor& items,
                                                   const Tensor& logsumexp,
                                                   const Tensor& remainder,
                                                   const Tensor& mean,
                                                   const Tensor& probabilities,
                                                   std::array<bool, 2> needed) {
  check_soft_embedding(hidden, items, items);
  return with_accumulate_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = hidden.size(0), num_items = items.size(0), width = items.size(1);
    // The expected item row is the gradient of the logsumexp.
    const Tensor grad_hidden = needed[0] ? mean.mul(grad_logsumexp.unsqueeze(1)) : Tensor();
    const Tensor grad_items = output<T>(needed[1], {num_items, width});
    if (needed[1]) {
      const Tensor rows_in = as<T>(hidden);
      const Table<T> table(items);
      const Kept<T> kept = kept_in<T>(probabilities, num_items);
      for_row_blocks<T>(rows, width, true, [&](int64_t begin, int64_t count) {
        const Rows<T> block(rows_of(rows_in, begin, count), table, Table<T>(), num_items, Tensor(),
                            rows_of(grad_logsumexp, begin, count), rows_of(mean, begin, count),
                            rows_of(logsumexp, begin, count), rows_of(remainder, begin, count),
                            kept.from_row(begin));
        backward(block, Tensor(), grad_items, Tensor(), begin > 0);
      });
      if (rows == 0) grad_items.zero_();
    }
    return std::make_tuple(result(grad_hidden, hidden), result(grad_items, items));
  });
}

// Gradients towards grad_logsumexp, hidden and items.
std::tuple<Tensor, Tensor, Tensor> item_logsumexp_double_backward(const OptionalTensor& grad_grad_hidden,
                                                                  const OptionalTensor& grad_grad_items,
                                                                  const Tensor& grad_logsumexp,
                                                                  const Tensor& hidden,
                                                                  const Tensor& items,
                                                                  const Tensor& logsumexp,
                                                                  const Tensor& remainder,
                                                                  const Tensor& mean,
                                                                  const Tensor& probabilities,
                                                                  std::array<bool, 3> needed) {
  check_soft_embedding(hidden, items, items);
  return with_accumulate_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = hidden.size(0), num_items = items.size(0), width = items.size(1);
    const Tensor rows_in = as<T>(hidden), grad_grad_h = as<T>(undefined_or(grad_grad_hidden));
    const Tensor out_grad = output<T>(needed[0], {rows}), out_hidden = output<T>(needed[1], {rows, width});
    const Tensor out_items = output<T>(needed[2], {num_items, width});
    const Table<T> table(items), grad_grad_table = table_or_absent<T>(undefined_or(grad_grad_items));
    const Kept<T> kept = kept_in<T>(probabilities, num_items);
    for_row_blocks<T>(rows, 2 * width, needed[2], [&](int64_t begin, int64_t count) {
      const Rows<T> block(rows_of(rows_in, begin, count), table, Table<T>(), num_items, Tensor(),
                          rows_of(grad_logsumexp, begin, count), rows_of(mean, begin, count),
                          rows_of(logsumexp, begin, count), rows_of(remainder, begin, count),
                          kept.from_row(begin));
      const Cotangents<T> cotangents(block, rows_of(grad_grad_h, begin, count), grad_grad_table, Table<T>());
      Scratch<T> means;
      std::optional<ExpectedKeys<T>> expected;
      if (grad_grad_table.present()) {
        expected.emplace(cotangents);
        means = row_means_of_logsumexp(cotangents, *expected, rows_of(mean, begin, count));
      } else {
        // The mean of u = grad_grad_hidden . item is known: one pass suffices.
        const int64_t padded = block.panels() * kPanel<T>;
        means = Scratch<T>(2 * padded);
        std::fill_n(means.data(), 2 * padded, T(0));
        if (grad_grad_h.defined()) {
          const Tensor products =
              rows_of(grad_grad_h, begin, count).mul(rows_of(mean, begin, count)).sum({1});
          std::copy_n(products.template const_data_ptr<T>(), count, means.data());
        }
      }
      if (out_grad.defined())
        std::copy_n(means.data(), count, out_grad.template mutable_data_ptr<T>() + begin);
      if (out_hidden.defined() || out_items.defined()) {
        double_backward<T>(cotangents, means, expected ? &*expected : nullptr,
                           rows_of(out_hidden, begin, count), out_items, Tensor(), Tensor(), begin > 0);
      }
    });
    if (rows == 0 && out_items.defined()) out_items.zero_();
    return std::make_tuple(result(out_grad, logsumexp), result(out_hidden, hidden), result(out_items, items));
  });
}

}  // namespace td3_fast::cpu
