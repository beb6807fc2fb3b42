// The gradient of looking rows up in a table, on the CPU.
//
// One thread adds the rows in order. Two that each add what falls to their ids take longer together: both
// read all ids, guess wrong at every other one, and share cache lines.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../checks.h"

namespace td3_fast::cpu {
namespace {

using at::Tensor;

template <typename T>
void add_rows(const Tensor& rows, const Tensor& ids, const Tensor& out) {
  const int64_t width = out.size(1), num_ids = out.size(0);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const T* __restrict row = rows.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  for (int64_t i = 0; i < ids.numel(); ++i, row += width) {
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < num_ids, "id ", id[i], " is not one of ", num_ids);
    T* __restrict sum = to + id[i] * width;
    for (int64_t f = 0; f < width; ++f) sum[f] += row[f];
  }
}

Tensor sum_rows_by_id(const Tensor& rows, const Tensor& ids, int64_t num_ids) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && ids.dim() == 1 && ids.size(0) == rows.size(0) &&
                        ids.scalar_type() == at::kLong &&
                        (rows.scalar_type() == at::kFloat || rows.scalar_type() == at::kDouble),
                    "expected float32 or float64 rows (count, d) and int64 ids (count,), got ", rows.sizes(),
                    " and ", ids.sizes());
  const Tensor from = rows.contiguous(), each = ids.contiguous();
  const Tensor out = at::zeros({num_ids, rows.size(1)}, rows.options());
  rows.scalar_type() == at::kDouble ? add_rows<double>(from, each, out) : add_rows<float>(from, each, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(td3_fast, CPU, m) {
  m.impl("sum_rows_by_id", sum_rows_by_id);
}

}  // namespace td3_fast::cpu
