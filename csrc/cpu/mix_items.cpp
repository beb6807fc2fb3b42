// Products of kept probabilities with a narrow item table, on the CPU.
//
// The table, or the rows' cotangent, is packed into panels of columns once; the probabilities are read in
// place, in blocks that stay in cache while every panel uses them.

#include <algorithm>

#include "../checks.h"
#include "panels.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

constexpr int64_t kRowsPerTask = 24;
constexpr int64_t kItemsPerTask = 96, kItemsPerCall = 24;
constexpr int64_t kDepthOfMix = 256;  // items, so that their part of the packed table stays in cache
constexpr int64_t kDepth = 64;        // rows of the transposed product

void check(const Tensor& probabilities, const Tensor& other, int64_t axis) {
  TORCH_CHECK_VALUE(probabilities.dim() == 2 && other.dim() == 2 &&
                        probabilities.size(axis) == other.size(0) &&
                        probabilities.scalar_type() == other.scalar_type() &&
                        (other.scalar_type() == at::kFloat || other.scalar_type() == at::kDouble),
                    "expected probabilities (rows, n) and a matrix of ", axis == 0 ? "rows" : "n",
                    " rows, both float32 or float64, got ", probabilities.sizes(), " and ", other.sizes());
}

// One panel of columns of c, (count, lanes), from [count][lane].
template <typename T>
void write_panel(const T* panel, int64_t count, T* to, int64_t columns, int64_t lanes) {
  for (int64_t i = 0; i < count; ++i) std::copy_n(panel + i * kPanel<T>, lanes, to + i * columns);
}

template <typename T>
Tensor mix(const Tensor& probabilities, const Tensor& items) {
  constexpr int64_t P = kPanel<T>;
  const Tile<T>& t = tile<T>();
  const Tensor p = probabilities.contiguous();
  const int64_t rows = p.size(0), n = p.size(1), d = items.size(1), panels = ceil_div(d, P);
  const Tensor mixed = fresh({rows, d}, kType<T>);
  if (n == 0) return mixed.zero_();
  const Scratch<T> packed = pack_columns<T>(items);
  const int64_t tasks = ceil_div(rows, kRowsPerTask), workers = num_workers(tasks, rows * n * d);
  const Scratch<T> scratch(workers * kRowsPerTask * P);
  const T* from = p.const_data_ptr<T>();
  T* to = mixed.mutable_data_ptr<T>();
  run_tasks(tasks, workers, [&](int64_t task, int64_t worker) {
    const int64_t first = task * kRowsPerTask, count = std::min(kRowsPerTask, rows - first);
    T* sums = scratch.data() + worker * kRowsPerTask * P;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t lanes = std::min(P, d - panel * P);
      for (int64_t item = 0; item < n; item += kDepthOfMix) {
        t.product(from + first * n + item, n, Walk::kRows, count, std::min(kDepthOfMix, n - item),
                  packed.data() + (panel * n + item) * P, sums, lanes, item > 0);
      }
      write_panel(sums, count, to + first * d + panel * P, d, lanes);
    }
  });
  return mixed;
}

template <typename T>
Tensor mix_transposed(const Tensor& probabilities, const Tensor& cotangent) {
  constexpr int64_t P = kPanel<T>;
  const Tile<T>& t = tile<T>();
  const Tensor p = probabilities.contiguous();
  const int64_t rows = p.size(0), n = p.size(1), d = cotangent.size(1), panels = ceil_div(d, P);
  const Tensor sums_of_items = fresh({n, d}, kType<T>);
  if (sums_of_items.numel() == 0) return sums_of_items;
  const Scratch<T> packed = pack_columns<T>(cotangent);
  const int64_t tasks = ceil_div(n, kItemsPerTask), workers = num_workers(tasks, rows * n * d);
  const int64_t sums_size = panels * kItemsPerTask * P, scratch_size = sums_size + kDepth * kItemsPerTask;
  const Scratch<T> scratch(workers * scratch_size);
  const int64_t rows_per_call = ceil_div(kDepth, panels * (kItemsPerTask / kItemsPerCall));
  const T* from = p.const_data_ptr<T>();
  T* to = sums_of_items.mutable_data_ptr<T>();
  run_tasks(tasks, workers, [&](int64_t task, int64_t worker) {
    const int64_t first = task * kItemsPerTask, count = std::min(kItemsPerTask, n - first);
    T *sums = scratch.data() + worker * scratch_size, *block = sums + sums_size;
    std::fill_n(sums, sums_size, T(0));
    for (int64_t row = 0; row < rows; row += kDepth) {
      const int64_t depth = std::min(kDepth, rows - row);
      for (int64_t k = 0; k < depth; ++k) std::copy_n(from + (row + k) * n + first, count, block + k * count);
      // The rows lie too far apart for the hardware to see the next block coming: it is fetched piece by
      // piece.
      int64_t next = row + depth;
      const int64_t last = std::min(next + kDepth, rows);
      for (int64_t item = 0; item < count; item += kItemsPerCall) {
        for (int64_t panel = 0; panel < panels; ++panel) {
          for (const int64_t until = std::min(next + rows_per_call, last); next < until; ++next) {
            for (int64_t i = 0; i < count; i += P) __builtin_prefetch(from + next * n + first + i);
          }
          t.product(block + item, count, Walk::kColumns, std::min(kItemsPerCall, count - item), depth,
                    packed.data() + (panel * rows + row) * P, sums + (panel * kItemsPerTask + item) * P,
                    std::min(P, d - panel * P), true);
        }
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      write_panel(sums + panel * kItemsPerTask * P, count, to + first * d + panel * P, d,
                  std::min(P, d - panel * P));
    }
  });
  return sums_of_items;
}

}  // namespace

Tensor mix_items(const Tensor& probabilities, const Tensor& items) {
  check(probabilities, items, 1);
  return items.scalar_type() == at::kDouble ? mix<double>(probabilities, items)
                                            : mix<float>(probabilities, items);
}

Tensor mix_items_transposed(const Tensor& probabilities, const Tensor& cotangent) {
  check(probabilities, cotangent, 0);
  return cotangent.scalar_type() == at::kDouble ? mix_transposed<double>(probabilities, cotangent)
                                                : mix_transposed<float>(probabilities, cotangent);
}

}  // namespace td3_fast::cpu
