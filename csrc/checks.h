// Checks that the CPU and CUDA implementations share; every failure is a ValueError in Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "philox.h"

namespace td3_fast {

// The type of statistics and sums: float32 for half precision, else the type itself.
inline at::ScalarType accumulate_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_table_type(const at::Tensor& rows, const at::Tensor& table) {
  const at::ScalarType row_type = rows.scalar_type();
  const at::ScalarType table_type = table.scalar_type();
  const bool half = table_type == at::kHalf || table_type == at::kBFloat16;
  TORCH_CHECK_VALUE(half || table_type == at::kFloat || table_type == at::kDouble,
                    "an item table must be float16, bfloat16, float32 or float64, got ", table_type);
  TORCH_CHECK_VALUE(row_type == table_type || (half && row_type == at::kFloat), "rows of ", row_type,
                    " do not go with an item table of ", table_type);
  TORCH_CHECK_VALUE(rows.device() == table.device(), "rows are on ", rows.device(), ", the item table on ",
                    table.device());
}

// queries (rows, rank), keys (n, rank), values (n, d), n >= 1.
inline void check_soft_embedding(const at::Tensor& queries,
                                 const at::Tensor& keys,
                                 const at::Tensor& values) {
  TORCH_CHECK_VALUE(queries.dim() == 2 && keys.dim() == 2 && values.dim() == 2 &&
                        queries.size(1) == keys.size(1) && keys.size(0) == values.size(0) && keys.size(0) > 0,
                    "expected queries (rows, rank), keys (n, rank) and values (n, d) with n >= 1, got ",
                    queries.sizes(), ", ", keys.sizes(), ", ", values.sizes());
  check_table_type(queries, keys);
  TORCH_CHECK_VALUE(keys.scalar_type() == values.scalar_type() && keys.device() == values.device(),
                    "keys and values must share dtype and device");
}

// hidden (rows, d), item_embeddings (n, d), target (rows,).
inline void check_ranking(const at::Tensor& hidden,
                          const at::Tensor& item_embeddings,
                          const at::Tensor& target) {
  TORCH_CHECK_VALUE(
      hidden.dim() == 2 && item_embeddings.dim() == 2 && hidden.size(1) == item_embeddings.size(1),
      "expected hidden (rows, d) and item_embeddings (n, d), got ", hidden.sizes(), ", ",
      item_embeddings.sizes());
  check_table_type(hidden, item_embeddings);
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == hidden.size(0) &&
                        target.scalar_type() == at::kLong && target.device() == hidden.device(),
                    "expected an int64 target for each of ", hidden.size(0), " rows, got ", target.sizes(),
                    " of ", target.scalar_type());
}

// excluded_offsets (rows + 1,) and excluded_items (nnz,), both or neither.
inline void check_excluded(const at::Tensor& hidden,
                           const std::optional<at::Tensor>& offsets,
                           const std::optional<at::Tensor>& items) {
  TORCH_CHECK_VALUE(offsets.has_value() == items.has_value(), "excluded items need their offsets");
  if (!offsets.has_value()) return;
  TORCH_CHECK_VALUE(
      offsets->scalar_type() == at::kLong && items->scalar_type() == at::kLong && offsets->dim() == 1 &&
          items->dim() == 1 && offsets->size(0) == hidden.size(0) + 1 &&
          offsets->device() == hidden.device() && items->device() == hidden.device(),
      "expected int64 offsets (rows + 1,) and items (nnz,) of what is excluded, on the device of hidden");
}

// seed () or (1,). Returns the blocks of Philox of all counts.
inline int64_t check_random_words(const at::Tensor& seed, int64_t site, at::IntArrayRef counts) {
  constexpr int64_t kSites = int64_t{1} << 32;
  bool valid = seed.numel() == 1 && seed.scalar_type() == at::kLong && site >= 0 &&
               site <= kSites - static_cast<int64_t>(counts.size());
  int64_t blocks = 0;
  for (const int64_t count : counts) {
    valid = valid && count >= 0;
    blocks += blocks_of_words(count);
  }
  TORCH_CHECK_VALUE(
      valid, "expected one int64 seed, sites from 0 to 2^32 - 1 and counts that are not negative, got ",
      seed.sizes(), " of ", seed.scalar_type(), ", ", site, " and ", counts);
  return blocks;
}

// candidates (rows, k).
inline void check_candidates(const at::Tensor& hidden, const at::Tensor& candidates) {
  TORCH_CHECK_VALUE(candidates.dim() == 2 && candidates.size(0) == hidden.size(0) &&
                        candidates.scalar_type() == at::kLong && candidates.device() == hidden.device(),
                    "expected int64 candidates (rows, k) on the device of hidden, got ", candidates.sizes(),
                    " of ", candidates.scalar_type());
}

}  // namespace td3_fast
