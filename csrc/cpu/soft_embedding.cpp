// The operators of the soft embedding on the CPU.

#include "operators.h"

namespace td3_fast::cpu {

std::tuple<Tensor, Tensor, Tensor> soft_embedding_forward(const Tensor& queries,
                                                          const Tensor& keys,
                                                          const Tensor& values) {
  check_soft_embedding(queries, keys, values);
  return with_accumulate_type(queries, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = queries.size(0), width = values.size(1);
    const Tensor rows_in = as<T>(queries);
    const Tensor embedding = output<T>(true, {rows, width}), logsumexp = output<T>(true, {rows});
    const Tensor remainder = output<T>(true, {rows});
    const Table<T> key_table(keys), value_table(values);
    for_row_blocks<T>(rows, width, false, [&](int64_t begin, int64_t count) {
      forward<T>(rows_of(rows_in, begin, count), key_table, value_table, keys.size(0),
                 rows_of(embedding, begin, count), rows_of(logsumexp, begin, count),
                 rows_of(remainder, begin, count), Kept<T>());
    });
    return std::make_tuple(embedding.to(queries.scalar_type()), logsumexp, remainder);
  });
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
  return with_accumulate_type(queries, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = queries.size(0), items = keys.size(0), rank = keys.size(1), width = values.size(1);
    const Tensor grad_x = as<T>(undefined_or(grad_embedding)), grad_l = as<T>(undefined_or(grad_logsumexp));
    const Tensor rows_in = as<T>(queries), embedding_in = as<T>(embedding);
    const Tensor grad_queries = output<T>(needed[0], {rows, rank}),
                 grad_keys = output<T>(needed[1], {items, rank});
    // Without grad_embedding, or without rows, a gradient is zero that no pass below writes.
    Tensor grad_values = output<T>(needed[2] && grad_x.defined(), {items, width});
    const Table<T> key_table(keys), value_table(values);
    for_row_blocks<T>(rows, rank, needed[1] || needed[2], [&](int64_t begin, int64_t count) {
      const Rows<T> block(rows_of(rows_in, begin, count), key_table, value_table, items,
                          rows_of(grad_x, begin, count), rows_of(grad_l, begin, count),
                          rows_of(embedding_in, begin, count), rows_of(logsumexp, begin, count),
                          rows_of(remainder, begin, count), Kept<T>());
      backward(block, rows_of(grad_queries, begin, count), grad_keys, grad_values, begin > 0);
    });
    if (needed[2] && !grad_x.defined()) grad_values = values.new_zeros({items, width}, kType<T>);
    if (rows == 0 && grad_keys.defined()) grad_keys.zero_();
    if (rows == 0 && grad_values.defined()) grad_values.zero_();
    return std::make_tuple(result(grad_queries, queries), result(grad_keys, keys),
                           result(grad_values, values));
  });
}

// Gradients towards queries, keys, values, grad_embedding and grad_logsumexp.
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
  return with_accumulate_type(queries, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = queries.size(0), items = keys.size(0), rank = keys.size(1), width = values.size(1);
    const Tensor grad_x = as<T>(undefined_or(grad_embedding)), grad_l = as<T>(undefined_or(grad_logsumexp));
    const Tensor grad_grad_q = as<T>(undefined_or(grad_grad_queries));
    const Tensor rows_in = as<T>(queries), embedding_in = as<T>(embedding);
    const bool reaches_values = grad_x.defined();
    const Tensor out_queries = output<T>(needed[0], {rows, rank}),
                 out_keys = output<T>(needed[1], {items, rank});
    Tensor out_values = output<T>(needed[2] && reaches_values, {items, width});
    const Tensor out_grad_x = output<T>(needed[3] && reaches_values, {rows, width});
    const Tensor out_grad_l = output<T>(needed[4], {rows});
    const Table<T> key_table(keys), value_table(values),
        grad_grad_k = table_or_absent<T>(undefined_or(grad_grad_keys));
    const Table<T> grad_grad_v =
        reaches_values ? table_or_absent<T>(undefined_or(grad_grad_values)) : Table<T>();
    for_row_blocks<T>(rows, rank + width, needed[1] || needed[2], [&](int64_t begin, int64_t count) {
      const Rows<T> block(rows_of(rows_in, begin, count), key_table, value_table, items,
                          rows_of(grad_x, begin, count), rows_of(grad_l, begin, count),
                          rows_of(embedding_in, begin, count), rows_of(logsumexp, begin, count),
                          rows_of(remainder, begin, count), Kept<T>());
      const Cotangents<T> cotangents(block, rows_of(grad_grad_q, begin, count), grad_grad_k, grad_grad_v);
      const Scratch<T> means = row_means(cotangents);
      if (out_grad_l.defined()) std::copy_n(means.data(), count, out_grad_l.mutable_data_ptr<T>() + begin);
      double_backward<T>(cotangents, means, nullptr, rows_of(out_queries, begin, count), out_keys, out_values,
                         rows_of(out_grad_x, begin, count), begin > 0);
    });
    if (needed[2] && !reaches_values) out_values = values.new_zeros({items, width}, kType<T>);
    if (rows == 0 && out_keys.defined()) out_keys.zero_();
    if (rows == 0 && out_values.defined()) out_values.zero_();
    return std::make_tuple(result(out_queries, queries), result(out_keys, keys), result(out_values, values),
                           result(out_grad_x, queries), result(out_grad_l, logsumexp));
  });
}

}  // namespace td3_fast::cpu
