// Probabilities that are kept, their products with a narrow item table and what the derivative of those
// weighs, on the CPU.
//
// The table, or the rows' cotangent, is packed into panels of kWide columns once; the probabilities are read
// in place, once for every panel.

#include <ATen/ops/cat.h>

#include <algorithm>
#include <vector>

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
// Of the weighed products: panels of items to a task, at most, and bytes of their packed tables.
constexpr int64_t kPanelsOfTables = 4, kBytesOfTables = int64_t{512} << 10;
// Of the probabilities: bytes of scores that wait for their row's sum, the fewest rows whose scores do, and
// what a softmax costs of an element, in multiply-adds.
constexpr int64_t kBytesOfScores = int64_t{256} << 10, kFewestRows = 6, kWorkOfSoftmax = 16;

void check(const Tensor& probabilities, const Tensor& other, int64_t axis) {
  TORCH_CHECK_VALUE(probabilities.dim() == 2 && other.dim() == 2 &&
                        probabilities.size(axis) == other.size(0) &&
                        probabilities.scalar_type() == other.scalar_type() &&
                        (other.scalar_type() == at::kFloat || other.scalar_type() == at::kDouble),
                    "expected probabilities (rows, n) and a matrix of ", axis == 0 ? "rows" : "n",
                    " rows, both float32 or float64, got ", probabilities.sizes(), " and ", other.sizes());
}

// A matrix in panels of kWide columns: as it is where it is one such panel and lies aligned, else packed.
template <typename T>
class ColumnPanels {
 public:
  explicit ColumnPanels(const Tensor& matrix) : matrix_(matrix.contiguous()) {
    constexpr int64_t W = kWide<T>;
    data_ = matrix_.const_data_ptr<T>();
    if (matrix_.size(1) == W && reinterpret_cast<uintptr_t>(data_) % 64 == 0) return;
    packed_ = pack_columns<T, W>(matrix_);
    data_ = packed_.data();
  }
  const T* data() const { return data_; }

 private:
  Tensor matrix_;
  Scratch<T> packed_;
  const T* data_;
};

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
  const ColumnPanels<T> packed(items);
  const int64_t tasks = ceil_div(rows, kRowsPerTask), workers = num_workers(tasks, rows * n * d);
  const Chunks chunks{rows, ceil_div(tasks, workers) * workers};  // as many for each worker
  const Scratch<T> scratch(workers * kRowsPerTask * W);
  const T* from = p.const_data_ptr<T>();
  T* to = mixed.mutable_data_ptr<T>();
  run_tasks(chunks.count, workers, [&](int64_t chunk, int64_t worker) {
    const int64_t first = chunks.begin(chunk), count = chunks.begin(chunk + 1) - first;
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
  const ColumnPanels<T> packed(cotangent);
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

// Where the columns of several matrices begin in all of them side by side; the last number is their width.
std::vector<int64_t> first_columns(at::TensorList matrices) {
  std::vector<int64_t> first{0};
  for (const Tensor& matrix : matrices) first.push_back(first.back() + matrix.size(1));
  return first;
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

template <typename T>
Tensor weigh(const Tensor& probabilities, at::TensorList cotangents, at::TensorList tables) {
  constexpr int64_t W = kWide<T>;
  const Tile<T>& t = tile<T>();
  const Tensor p = probabilities.contiguous(), beside = at::cat(cotangents, 1);
  const int64_t rows = p.size(0), n = p.size(1), depth = beside.size(1);
  const Tensor weighted = fresh({rows, n}, kType<T>);
  std::vector<Tensor> held;
  std::vector<const T*> sources;
  for (const Tensor& table : tables) {
    held.push_back(table.contiguous());
    sources.push_back(held.back().const_data_ptr<T>());
  }
  const std::vector<int64_t> columns = first_columns(tables);
  const int64_t panel_bytes = std::max<int64_t>(depth, 1) * W * static_cast<int64_t>(sizeof(T));
  const int64_t of_thread = ceil_div(ceil_div(n, W), at::get_num_threads());
  const int64_t panels =
      std::clamp<int64_t>(std::min(kBytesOfTables / panel_bytes, of_thread), 1, kPanelsOfTables);
  const int64_t tasks = ceil_div(n, panels * W), workers = num_workers(tasks, rows * n * depth);
  const int64_t of_tables = panels * depth * W, of_sums = kRowsPerTask * panels * W;
  const Scratch<T> scratch(workers * (of_tables + of_sums));
  const T *from = beside.const_data_ptr<T>(), *weight = p.const_data_ptr<T>();
  T* to = weighted.mutable_data_ptr<T>();
  run_tasks(tasks, workers, [&](int64_t task, int64_t worker) {
    T* packed = scratch.data() + worker * (of_tables + of_sums);
    T* sums = packed + of_tables;
    const int64_t first = task * panels * W, count = std::min(panels * W, n - first);
    for (int64_t item = 0; item < count; item += W) {
      pack_items(sources, columns, first + item, std::min(W, count - item), packed + item * depth);
    }
    for (int64_t row = 0; row < rows; row += kRowsPerTask) {
      const int64_t rows_here = std::min(kRowsPerTask, rows - row);
      if (depth == 0) std::fill_n(sums, of_sums, T(0));
      for (int64_t k = 0; k < depth; k += kDepthOfMix) {
        for (int64_t item = 0; item < count; item += W) {
          t.wide_product(from + row * depth + k, depth, Walk::kRows, rows_here,
                         std::min(kDepthOfMix, depth - k), packed + item * depth + k * W, sums + item,
                         panels * W, W, k > 0);
        }
      }
      for (int64_t i = 0; i < rows_here; ++i) {
        const int64_t at = (row + i) * n + first;
        const T* sum = sums + i * panels * W;
        for (int64_t item = 0; item < count; ++item) to[at + item] = weight[at + item] * sum[item];
      }
    }
  });
  return weighted;
}

template <typename T>
Tensor softmax_of_products(const Tensor& queries_in, const Tensor& keys_in) {
  constexpr int64_t W = kWide<T>;
  const Tile<T>& t = tile<T>();
  const Tensor queries = queries_in.contiguous(), keys = keys_in.contiguous();
  const int64_t rows = queries.size(0), n = keys.size(0), rank = queries.size(1);
  const Tensor probabilities = fresh({rows, n}, kType<T>);
  if (probabilities.numel() == 0) return probabilities;
  const int64_t padded = ceil_div(n, W) * W;
  const Scratch<T> packed(padded * rank);
  for (int64_t item = 0; item < n; item += W) {
    pack_items<T>({keys.const_data_ptr<T>()}, {0, rank}, item, std::min(W, n - item),
                  packed.data() + item * rank);
  }
  const int64_t at_once = std::clamp<int64_t>(kBytesOfScores / (padded * static_cast<int64_t>(sizeof(T))),
                                              kFewestRows, kRowsPerTask);
  const int64_t tasks = ceil_div(rows, at_once),
                workers = num_workers(tasks, rows * n * (rank + kWorkOfSoftmax));
  const Scratch<T> scratch(workers * at_once * padded);
  const T* query = queries.const_data_ptr<T>();
  T* to = probabilities.mutable_data_ptr<T>();
  run_tasks(tasks, workers, [&](int64_t task, int64_t worker) {
    T* scores = scratch.data() + worker * at_once * padded;
    const int64_t first = task * at_once, count = std::min(at_once, rows - first);
    for (int64_t item = 0; item < padded; item += W) {
      t.wide_product(query + first * rank, rank, Walk::kRows, count, rank, packed.data() + item * rank,
                     scores + item, padded, W, false);
    }
    for (int64_t i = 0; i < count; ++i) t.softmax(scores + i * padded, n, to + (first + i) * n);
  });
  return probabilities;
}

}  // namespace

Tensor item_probabilities(const Tensor& queries, const Tensor& keys) {
  TORCH_CHECK_VALUE(queries.dim() == 2 && keys.dim() == 2 && queries.size(1) == keys.size(1) &&
                        queries.scalar_type() == keys.scalar_type() &&
                        (keys.scalar_type() == at::kFloat || keys.scalar_type() == at::kDouble),
                    "expected queries (rows, rank) and keys (n, rank), both float32 or float64, got ",
                    queries.sizes(), " and ", keys.sizes());
  return keys.scalar_type() == at::kDouble ? softmax_of_products<double>(queries, keys)
                                           : softmax_of_products<float>(queries, keys);
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

Tensor weigh_products(const Tensor& probabilities, at::TensorList cotangents, at::TensorList tables) {
  TORCH_CHECK_VALUE(!cotangents.empty() && cotangents.size() == tables.size(),
                    "expected as many cotangents as tables, one at least, got ", cotangents.size(), " and ",
                    tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    check(probabilities, cotangents[i], 0);
    check(probabilities, tables[i], 1);
    TORCH_CHECK_VALUE(cotangents[i].size(1) == tables[i].size(1),
                      "expected a cotangent as wide as its table, got ", cotangents[i].sizes(), " and ",
                      tables[i].sizes());
  }
  return probabilities.scalar_type() == at::kDouble ? weigh<double>(probabilities, cotangents, tables)
                                                    : weigh<float>(probabilities, cotangents, tables);
}

}  // namespace td3_fast::cpu
