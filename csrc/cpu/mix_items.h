// Products of probabilities that are kept: what their operators share, and what is called with none in
// between.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "tile.h"

namespace td3_fast::cpu {

constexpr int64_t kDepthOfMix = 256;  // items, so that their part of the packed table stays in cache

// Adds P^T cotangent, of probabilities (rows, n) and a cotangent (rows, d), to contiguous sums (n, d).
void add_items_transposed(const at::Tensor& sums,
                          const at::Tensor& probabilities,
                          const at::Tensor& cotangent);

// Probabilities (rows, n), and another matrix with as many rows as their axis is long.
inline void check_probabilities(const at::Tensor& probabilities, const at::Tensor& other, int64_t axis) {
  TORCH_CHECK_VALUE(probabilities.dim() == 2 && other.dim() == 2 &&
                        probabilities.size(axis) == other.size(0) &&
                        probabilities.scalar_type() == other.scalar_type() &&
                        (other.scalar_type() == at::kFloat || other.scalar_type() == at::kDouble),
                    "expected probabilities (rows, n) and a matrix of ", axis == 0 ? "rows" : "n",
                    " rows, both float32 or float64, got ", probabilities.sizes(), " and ", other.sizes());
}

// Items [first, first + count) of tables (n, d) side by side, as [column][kWide items]; zeros beyond the
// last.
template <typename T>
void pack_items(const std::vector<const T*>& tables,
                const std::vector<int64_t>& columns,
                int64_t first,
                int64_t count,
                T* to) {
  constexpr int64_t W = kWide<T>;
  if (count < W) std::fill_n(to, columns.back() * W, T(0));
  for (size_t t = 0; t < tables.size(); ++t) {
    const int64_t width = columns[t + 1] - columns[t];
    for (int64_t lane = 0; lane < count; ++lane) {
      const T* row = tables[t] + (first + lane) * width;
      T* out = to + columns[t] * W + lane;
      for (int64_t column = 0; column < width; ++column) out[column * W] = row[column];
    }
  }
}

}  // namespace td3_fast::cpu
