// The gradient of looking rows up in a table, on the CPU.

#include "row_sums.h"

#include "registration.h"

namespace td3_fast::cpu {

Tensor sum_rows_by_id(const Tensor& rows, const Tensor& ids, int64_t num_ids) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && ids.dim() == 1 && ids.size(0) == rows.size(0) &&
                        ids.scalar_type() == at::kLong &&
                        (rows.scalar_type() == at::kFloat || rows.scalar_type() == at::kDouble),
                    "expected float32 or float64 rows (count, d) and int64 ids (count,), got ", rows.sizes(),
                    " and ", ids.sizes());
  const Tensor from = rows.contiguous(), each = ids.contiguous();
  const Tensor out = rows.new_zeros({num_ids, rows.size(1)});
  rows.scalar_type() == at::kDouble ? add_rows<double>(from, each, out) : add_rows<float>(from, each, out);
  return out;
}

}  // namespace td3_fast::cpu
