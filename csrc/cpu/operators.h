// What the operators on rows and item tables have in common: types, outputs and blocks of rows.
#pragma once

#include "../checks.h"
#include "registration.h"
#include "softmax_passes.h"

namespace td3_fast::cpu {

inline Tensor undefined_or(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

template <typename T>
Tensor as(const Tensor& tensor) {
  return tensor.defined() ? tensor.to(kType<T>) : tensor;
}

inline Tensor rows_of(const Tensor& tensor, int64_t begin, int64_t count) {
  return tensor.defined() ? tensor.narrow(0, begin, count) : tensor;
}

template <typename T>
Tensor output(bool needed, at::IntArrayRef sizes) {
  return needed ? fresh(sizes, kType<T>) : Tensor();
}

// What an operator returns for a gradient that was not asked for: an empty tensor.
inline Tensor result(const Tensor& tensor, const Tensor& like) {
  return tensor.defined() ? tensor.to(like.scalar_type()) : like.new_empty({0});
}

template <typename T>
Table<T> table_or_absent(const Tensor& table) {
  return table.defined() ? Table<T>(table) : Table<T>();
}

// Rows are taken in blocks of this size, so that scratch stays bounded whatever the number of rows.
template <typename T>
int64_t rows_per_block(int64_t rows, int64_t columns, bool sums_rows) {
  constexpr int64_t P = kPanel<T>;
  const int64_t fitting = fitting_sums<T>(columns) / (sums_rows ? kTasksOfRowSums : 1);
  const int64_t blocks = ceil_div(rows, std::max(fitting, 4 * P));
  return blocks <= 1 ? rows : ceil_div(ceil_div(rows, blocks), P) * P;
}

// body(begin, count) for every block of rows.
template <typename T, typename Body>
void for_row_blocks(int64_t rows, int64_t columns, bool sums_rows, const Body& body) {
  const int64_t block = rows_per_block<T>(rows, columns, sums_rows);
  for (int64_t begin = 0; begin < rows; begin += block) body(begin, std::min(block, rows - begin));
}

template <typename Run>
auto with_accumulate_type(const Tensor& rows, const Run& run) {
  return accumulate_type(rows) == at::kDouble ? run(double{}) : run(float{});
}

}  // namespace td3_fast::cpu
