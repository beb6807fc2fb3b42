// Products of kept probabilities with a narrow item table, on the CPU.
//
// The table, or the rows' cotangent, is packed into panels of columns once; the probabilities are read in
// place, in blocks that stay in cache while every panel uses them.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "panels.h"

namespace td3_fast::cpu {
namespace {

using at::Tensor;

constexpr int64_t kRowsPerTask = 24;
constexpr int64_t kItemsPerTask = 96;
constexpr int64_t kDepth = 64;

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
  const Tensor mixed = at::empty({rows, d}, items.options());
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
      t.product(from + first * n, n, Walk::kRows, count, n, packed.data() + panel * n * P, sums, lanes,
                false);
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
  const Tensor sums_of_items = at::empty({n, d}, cotangent.options());
  const Scratch<T> packed = pack_columns<T>(cotangent);
  const int64_t tasks = ceil_div(n, kItemsPerTask), workers = num_workers(tasks, rows * n * d);
  const Scratch<T> scratch(workers * panels * kItemsPerTask * P);
  const T* from = p.const_data_ptr<T>();
  T* to = sums_of_items.mutable_data_ptr<T>();
  run_tasks(tasks, workers, [&](int64_t task, int64_t worker) {
    const int64_t first = task * kItemsPerTask, count = std::min(kItemsPerTask, n - first);
    T* sums = scratch.data() + worker * panels * kItemsPerTask * P;
    std::fill_n(sums, panels * kItemsPerTask * P, T(0));
    for (int64_t row = 0; row < rows; row += kDepth) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        t.product(from + row * n + first, n, Walk::kColumns, count, std::min(kDepth, rows - row),
                  packed.data() + (panel * rows + row) * P, sums + panel * kItemsPerTask * P,
                  std::min(P, d - panel * P), true);
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      write_panel(sums + panel * kItemsPerTask * P, count, to + first * d + panel * P, d,
                  std::min(P, d - panel * P));
    }
  });
  return sums_of_items;
}

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

}  // namespace

TORCH_LIBRARY_IMPL(td3_fast, CPU, m) {
  m.impl("mix_items", mix_items);
  m.impl("mix_items_transposed", mix_items_transposed);
}

}  // namespace td3_fast::cpu
