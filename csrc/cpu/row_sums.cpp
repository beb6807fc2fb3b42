// The gradient of looking rows up in a table, on the CPU.

#include "row_sums.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace td3_fast::cpu {
namespace {

using at::Tensor;

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
