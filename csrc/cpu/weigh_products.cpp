// What the derivative of products with kept probabilities weighs, on the CPU: sums of P o sum C T^T.

#include <algorithm>
#include <tuple>
#include <vector>

#include "mix_items.h"
#include "panels.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

// Panels of items at once, at most, bytes of their packed tables, and chunks of items that are summed apart.
constexpr int64_t kPanelsOfTables = 4, kBytesOfTables = int64_t{512} << 10, kChunksOfItems = 16;
constexpr int64_t kRowsAtOnce = 56, kRowsToCopy = 256;  // of which the second are worth a thread

// Where the columns of several matrices begin in all of them side by side; the last number is their width.
std::vector<int64_t> first_columns(at::TensorList matrices) {
  std::vector<int64_t> first{0};
  for (const Tensor& matrix : matrices) first.push_back(first.back() + matrix.size(1));
  return first;
}

// Matrices (rows, width) side by side.
template <typename T>
Scratch<T> put_beside(at::TensorList matrices, const std::vector<int64_t>& columns, int64_t rows) {
  const int64_t width = columns.back();
  Scratch<T> beside(rows * width);
  T* to = beside.data();
  std::vector<Tensor> held;
  for (const Tensor& matrix : matrices) held.push_back(matrix.contiguous());
  over_ranges(rows, kRowsToCopy, [&](int64_t begin, int64_t end) {
    for (size_t m = 0; m < held.size(); ++m) {
      const int64_t own = columns[m + 1] - columns[m];
      const T* from = held[m].const_data_ptr<T>();
      for (int64_t row = begin; row < end; ++row) {
        std::copy_n(from + row * own, own, to + row * width + columns[m]);
      }
    }
  });
  return beside;
}

// Keys (n, rank) and a column of ones, by which sums over items are made as well.
template <typename T>
Tensor and_ones(const Tensor& keys) {
  const Tensor from = keys.contiguous(), with = fresh({keys.size(0), keys.size(1) + 1}, kType<T>);
  const T* key = from.const_data_ptr<T>();
  T* to = with.mutable_data_ptr<T>();
  for (int64_t item = 0; item < keys.size(0); ++item, key += keys.size(1)) {
    to = std::copy_n(key, keys.size(1), to);
    *to++ = T(1);
  }
  return with;
}

// W = P o sum C T^T is made a few rows and items at a time and kept nowhere. Each chunk of items sums for
// itself what goes over items, and the sums of chunks are added in their order.
template <typename T>
class Weighing {
 public:
  Weighing(const Tensor& probabilities,
           at::TensorList cotangents,
           at::TensorList tables,
           const Tensor& keys,
           const OptionalTensor& queries)
      : p_(probabilities.contiguous()),
        weight_(p_.const_data_ptr<T>()),
        columns_(first_columns(tables)),
        rows_(p_.size(0)),
        n_(p_.size(1)),
        depth_(columns_.back()),
        rank_(keys.size(1)),
        padded_(ceil_div(rank_ + 1, W) * W),
        asks_(queries.has_value()),
        chunks_{ceil_div(n_, W), std::clamp<int64_t>(ceil_div(n_, W), 1, kChunksOfItems)},
        beside_(put_beside<T>(cotangents, columns_, rows_)),
        keys_(pack_columns<T, W>(and_ones<T>(keys))),
        by_keys_(fresh({rows_, rank_}, kType<T>)),
        of_rows_(fresh({rows_, 1}, kType<T>)),
        of_items_(fresh({queries ? n_ : 0, rank_}, kType<T>)) {
    for (const Tensor& table : tables) {
      held_.push_back(table.contiguous());
      tables_.push_back(held_.back().const_data_ptr<T>());
    }
    if (asks_) queries_ = pack_columns<T, W>(*queries);
    const int64_t of_panel = std::max<int64_t>(depth_, 1) * W * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::clamp<int64_t>(kBytesOfTables / of_panel, 1, kPanelsOfTables);
    // a chunk's panels in parts of nearly equal size
    panels_ = ceil_div(chunks_.largest(), std::max<int64_t>(ceil_div(chunks_.largest(), most), 1));
  }

  // W (K, 1), and of queries that are given W^T Q.
  std::tuple<Tensor, Tensor, Tensor> sums() {
    const int64_t of_chunk = rows_ * padded_;
    const Scratch<T> sums(chunks_.count * of_chunk);
    const int64_t workers = num_workers(chunks_.count, rows_ * n_ * (depth_ + rank_));
    const int64_t of_worker = panels_ * W * (depth_ + kRowsAtOnce + padded_);
    const Scratch<T> scratch(workers * of_worker);
    run_tasks(chunks_.count, workers, [&](int64_t chunk, int64_t worker) {
      T* own = sums.data() + chunk * of_chunk;
      std::fill_n(own, of_chunk, T(0));
      const int64_t end = chunks_.begin(chunk + 1);
      for (int64_t panel = chunks_.begin(chunk); panel < end; panel += panels_) {
        const int64_t first = panel * W, last = std::min(std::min(panel + panels_, end) * W, n_);
        add_items(first, last - first, scratch.data() + worker * of_worker, own);
      }
    });
    T *by_keys = by_keys_.template mutable_data_ptr<T>(), *of_rows = of_rows_.template mutable_data_ptr<T>();
    over_ranges(rows_, kRowsToCopy, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* total = sums.data() + row * padded_;
        for (int64_t chunk = 1; chunk < chunks_.count; ++chunk) {
          const T* more = total + chunk * of_chunk;
          for (int64_t k = 0; k <= rank_; ++k) total[k] += more[k];
        }
        std::copy_n(total, rank_, by_keys + row * rank_);
        of_rows[row] = total[rank_];
      }
    });
    return {by_keys_, of_rows_, of_items_};
  }

 private:
  static constexpr int64_t W = kWide<T>;

  // Items [first, first + count): their part of a chunk's sums, and what is summed over rows for each.
  void add_items(int64_t first, int64_t count, T* scratch, T* own) const {
    const Tile<T>& t = tile<T>();
    const int64_t stride = panels_ * W;
    T *packed = scratch, *weighted = packed + stride * depth_, *of_items = weighted + stride * kRowsAtOnce;
    for (int64_t item = 0; item < count; item += W) {
      pack_items(tables_, columns_, first + item, std::min(W, count - item), packed + item * depth_);
    }
    for (int64_t row = 0; row < rows_; row += kRowsAtOnce) {
      const int64_t rows_here = std::min(kRowsAtOnce, rows_ - row);
      if (depth_ == 0) std::fill_n(weighted, kRowsAtOnce * stride, T(0));
      for (int64_t k = 0; k < depth_; k += kDepthOfMix) {
        for (int64_t item = 0; item < count; item += W) {
          t.wide_product(beside_.data() + row * depth_ + k, depth_, Walk::kRows, rows_here,
                         std::min(kDepthOfMix, depth_ - k), packed + item * depth_ + k * W, weighted + item,
                         stride, W, k > 0);
        }
      }
      for (int64_t i = 0; i < rows_here; ++i) {
        T* of_row = weighted + i * stride;
        const T* by = weight_ + (row + i) * n_ + first;
        for (int64_t item = 0; item < count; ++item) of_row[item] *= by[item];
      }
      for (int64_t k = 0; k <= rank_; k += W) {
        t.wide_product(weighted, stride, Walk::kRows, rows_here, count, keys_.data() + k * n_ + first * W,
                       own + row * padded_ + k, padded_, std::min(W, rank_ + 1 - k), true);
      }
      for (int64_t k = 0; asks_ && k < rank_; k += W) {
        t.wide_product(weighted, stride, Walk::kColumns, count, rows_here,
                       queries_.data() + k * rows_ + row * W, of_items + k, padded_, std::min(W, rank_ - k),
                       row > 0);
      }
    }
    if (!asks_) return;
    T* to = of_items_.template mutable_data_ptr<T>() + first * rank_;
    for (int64_t item = 0; item < count; ++item) {
      if (rows_ == 0) std::fill_n(of_items + item * padded_, rank_, T(0));
      std::copy_n(of_items + item * padded_, rank_, to + item * rank_);
    }
  }

  const Tensor p_;
  const T* weight_;
  const std::vector<int64_t> columns_;
  const int64_t rows_, n_, depth_, rank_, padded_;
  const bool asks_;      // for what is summed over rows
  const Chunks chunks_;  // of panels of items
  const Scratch<T> beside_, keys_;
  const Tensor by_keys_, of_rows_, of_items_;
  Scratch<T> queries_;
  std::vector<Tensor> held_;
  std::vector<const T*> tables_;
  int64_t panels_;  // at once
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> weigh_products(const Tensor& probabilities,
                                                  at::TensorList cotangents,
                                                  at::TensorList tables,
                                                  const Tensor& keys,
                                                  const OptionalTensor& queries) {
  TORCH_CHECK_VALUE(!cotangents.empty() && cotangents.size() == tables.size(),
                    "expected as many cotangents as tables, one at least, got ", cotangents.size(), " and ",
                    tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    check_probabilities(probabilities, cotangents[i], 0);
    check_probabilities(probabilities, tables[i], 1);
    TORCH_CHECK_VALUE(cotangents[i].size(1) == tables[i].size(1),
                      "expected a cotangent as wide as its table, got ", cotangents[i].sizes(), " and ",
                      tables[i].sizes());
  }
  check_probabilities(probabilities, keys, 1);
  if (queries) {
    check_probabilities(probabilities, *queries, 0);
    TORCH_CHECK_VALUE(queries->size(1) == keys.size(1), "expected queries as wide as the keys, got ",
                      queries->sizes(), " and ", keys.sizes());
  }
  return probabilities.scalar_type() == at::kDouble
             ? Weighing<double>(probabilities, cotangents, tables, keys, queries).sums()
             : Weighing<float>(probabilities, cotangents, tables, keys, queries).sums();
}

}  // namespace td3_fast::cpu
