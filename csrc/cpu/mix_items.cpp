// Products of kept probabilities with a narrow item table, on the CPU.
//
// The table, or the rows' cotangent, is packed into panels of kWide columns once; the probabilities are read
// in place, once for every panel.

#include <algorithm>

#include "../checks.h"
#include "panels.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

constexpr int64_t kRowsPerTask = 24;
constexpr int64_t kDepthOfMix = 256;  // items, so that their part of the packed table stays in cache
// Of the transposed product: rows whose probabilities are read side by side, and items of which a panel of
// sums stays in cache while all rows pass.
constexpr int64_t kDepth = 64, kItemsInCache = 2048;

void check(const Tensor& probabilities, const Tensor& other, int64_t axis) {
  TORCH_CHECK_VALUE(probabilities.dim() == 2 && other.dim() == 2 &&
                        probabilities.size(axis) == other.size(0) &&
                        probabilities.scalar_type() == other.scalar_type() &&
                        (other.scalar_type() == at::kFloat || other.scalar_type() == at::kDouble),
                    "expected probabilities (rows, n) and a matrix of ", axis == 0 ? "rows" : "n",
                    " rows, both float32 or float64, got ", probabilities.sizes(), " and ", other.sizes());
}

// Where sums of a panel of columns are taken: in place where its vectors end with the rows of the result,
// else in scratch, as of the last panel alone can be.
template <typename T>
struct Sums {
  T *result, *at;  // where they belong, and where they are taken
  int64_t rows, width, lanes, stride;

  Sums(T* to, int64_t num_rows, int64_t columns, int64_t first_column, T* scratch)
      : result(to + first_column),
        rows(num_rows),
        width(columns),
        lanes(std::min(kWide<T>, columns - first_column)) {
    const bool in_place = lanes % kPanel<T> == 0;
    at = in_place ? result : scratch;
    stride = in_place ? width : kWide<T>;
  }
  void write() const {
    if (at == result) return;
    for (int64_t row = 0; row < rows; ++row) std::copy_n(at + row * stride, lanes, result + row * width);
  }
};

template <typename T>
Tensor mix(const Tensor& probabilities, const Tensor& items) {
  constexpr int64_t W = kWide<T>;
  const Tile<T>& t = tile<T>();
  const Tensor p = probabilities.contiguous();
  const int64_t rows = p.size(0), n = p.size(1), d = items.size(1);
  const Tensor mixed = fresh({rows, d}, kType<T>);
  if (n == 0) return mixed.zero_();
  const Scratch<T> packed = pack_columns<T, W>(items);
  const int64_t tasks = ceil_div(rows, kRowsPerTask), workers = num_workers(tasks, rows * n * d);
  const Scratch<T> scratch(workers * kRowsPerTask * W);
  const T* from = p.const_data_ptr<T>();
  T* to = mixed.mutable_data_ptr<T>();
  run_tasks(tasks, workers, [&](int64_t task, int64_t worker) {
    const int64_t first = task * kRowsPerTask, count = std::min(kRowsPerTask, rows - first);
    for (int64_t column = 0; column < d; column += W) {
      const Sums<T> sums(to + first * d, count, d, column, scratch.data() + worker * kRowsPerTask * W);
      for (int64_t item = 0; item < n; item += kDepthOfMix) {
        t.wide_product(from + first * n + item, n, Walk::kRows, count, std::min(kDepthOfMix, n - item),
                       packed.data() + column * n + item * W, sums.at, sums.stride, sums.lanes, item > 0);
      }
      sums.write();
    }
  });
  return mixed;
}

// Each task reads along the rows, several side by side. Every item's sum runs over the rows in their order,
// so that chunks of items may depend on the number of threads, and the bits do not.
template <typename T>
Tensor mix_transposed(const Tensor& probabilities, const Tensor& cotangent) {
  constexpr int64_t W = kWide<T>;
  const Tile<T>& t = tile<T>();
  const Tensor p = probabilities.contiguous();
  const int64_t rows = p.size(0), n = p.size(1), d = cotangent.size(1);
  const Tensor sums_of_items = fresh({n, d}, kType<T>);
  if (rows == 0 || sums_of_items.numel() == 0) return sums_of_items.zero_();
  const Scratch<T> packed = pack_columns<T, W>(cotangent);
  const int64_t most_workers = num_workers(n, rows * n * d);
  const Chunks chunks{
      n, std::max(ceil_div(n, kItemsInCache), std::min(n, most_workers > 1 ? 2 * most_workers : 1))};
  const int64_t workers = std::min(most_workers, chunks.count), scratch_size = chunks.largest() * W;
  const Scratch<T> scratch(workers * scratch_size);
  const T* from = p.const_data_ptr<T>();
  T* to = sums_of_items.mutable_data_ptr<T>();
  run_tasks(chunks.count, workers, [&](int64_t chunk, int64_t worker) {
    const int64_t first = chunks.begin(chunk), count = chunks.begin(chunk + 1) - first;
    const auto sums_of = [&](int64_t column) {
      return Sums<T>(to + first * d, count, d, column, scratch.data() + worker * scratch_size);
    };
    for (int64_t row = 0; row < rows; row += kDepth) {
      // all panels while these rows' probabilities are at hand
      for (int64_t column = 0; column < d; column += W) {
        const Sums<T> sums = sums_of(column);
        t.wide_product(from + row * n + first, n, Walk::kColumns, count, std::min(kDepth, rows - row),
                       packed.data() + column * rows + row * W, sums.at, sums.stride, sums.lanes, row > 0);
      }
    }
    for (int64_t column = 0; column < d; column += W) sums_of(column).write();
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
