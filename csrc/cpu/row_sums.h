// The sum over look-ups of the same row, on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "../checks.h"

namespace td3_fast::cpu {

// out[ids[i]] += rows[i], in order; all contiguous, rows (count, d), out (n, d).
//
// One thread adds them. Two that each add what falls to their ids take longer together: both read all ids,
// guess wrong at every other one, and share cache lines.
template <typename T>
void add_rows(const at::Tensor& rows, const at::Tensor& ids, const at::Tensor& out) {
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

}  // namespace td3_fast::cpu
