// Probabilities that are kept, and their products with a narrow item table, on the CPU.
//
// The table, or the rows' cotangent, is packed into panels of kWide columns once; the probabilities are read
// in place, once for every panel.

#include "mix_items.h"

#include <algorithm>
#include <vector>

#include "panels.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

constexpr int64_t kRowsPerTask = 24;
// Of the transposed product: rows whose probabilities are read side by side, and items of which a panel of
// sums stays in cache while all rows pass.
constexpr int64_t kDepth = 64, kItemsInCache = 2048;
// Of the probabilities: bytes of scores that wait for their row's sum, the fewest rows whose scores do, and
// what a softmax costs of an element, in multiply-adds.
constexpr int64_t kBytesOfScores = int64_t{256} << 10, kFewestRows = 6, kWorkOfSoftmax = 16;

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

// Where sums of a panel of columns are taken: in place where its vectors end with the rows of the result and
// nothing is there that they are added to, else in scratch.
template <typename T>
struct Sums {
  T *result, *at;  // where they belong, and where they are taken
  int64_t rows, width, lanes, stride;
  bool adds;

  Sums(T* to, int64_t num_rows, int64_t columns, int64_t first_column, T* scratch, bool add = false)
      : result(to + first_column),
        rows(num_rows),
        width(columns),
        lanes(std::min(kWide<T>, columns - first_column)),
        adds(add) {
    const bool in_place = lanes % kPanel<T> == 0 && !adds;
    at = in_place ? result : scratch;
    stride = in_place ? width : kWide<T>;
  }
  void write() const {
    if (at == result) return;
    for (int64_t row = 0; row < rows; ++row) {
      const T* sum = at + row * stride;
      T* out = result + row * width;
      for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = adds ? out[lane] + sum[lane] : sum[lane];
    }
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

// P^T cotangent, written to contiguous sums (n, d) or, once it is whole, added to them. Each task reads along
// the rows, several side by side. Every item's sum runs over the rows in their order, so that chunks of items
// may depend on the number of threads, and the bits do not.
template <typename T>
void mix_transposed(const Tensor& probabilities,
                    const Tensor& cotangent,
                    const Tensor& sums_of_items,
                    bool add) {
  constexpr int64_t W = kWide<T>;
  const Tile<T>& t = tile<T>();
  const Tensor p = probabilities.contiguous();
  const int64_t rows = p.size(0), n = p.size(1), d = cotangent.size(1);
  if (rows == 0 || sums_of_items.numel() == 0) {
    if (!add) sums_of_items.zero_();
    return;
  }
  const ColumnPanels<T> packed(cotangent);
  const int64_t most_workers = num_workers(n, rows * n * d);
  const Chunks chunks{
      n, std::max(ceil_div(n, kItemsInCache), std::min(n, most_workers > 1 ? 2 * most_workers : 1))};
  const int64_t workers = std::min(most_workers, chunks.count), of_panel = chunks.largest() * W;
  const int64_t scratch_size = add ? ceil_div(d, W) * of_panel : of_panel;
  const Scratch<T> scratch(workers * scratch_size);
  const T* from = p.const_data_ptr<T>();
  T* to = sums_of_items.mutable_data_ptr<T>();
  run_tasks(chunks.count, workers, [&](int64_t chunk, int64_t worker) {
    const int64_t first = chunks.begin(chunk), count = chunks.begin(chunk + 1) - first;
    const auto sums_of = [&](int64_t column) {
      T* own = scratch.data() + worker * scratch_size + (add ? column / W * of_panel : 0);
      return Sums<T>(to + first * d, count, d, column, own, add);
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

void mix_transposed_into(const Tensor& sums, const Tensor& probabilities, const Tensor& cotangent, bool add) {
  cotangent.scalar_type() == at::kDouble ? mix_transposed<double>(probabilities, cotangent, sums, add)
                                         : mix_transposed<float>(probabilities, cotangent, sums, add);
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
  check_probabilities(probabilities, items, 1);
  return items.scalar_type() == at::kDouble ? mix<double>(probabilities, items)
                                            : mix<float>(probabilities, items);
}

Tensor mix_items_transposed(const Tensor& probabilities, const Tensor& cotangent) {
  check_probabilities(probabilities, cotangent, 0);
  const Tensor sums = fresh({probabilities.size(1), cotangent.size(1)}, cotangent.scalar_type());
  mix_transposed_into(sums, probabilities, cotangent, false);
  return sums;
}

void add_items_transposed(const Tensor& sums, const Tensor& probabilities, const Tensor& cotangent) {
  mix_transposed_into(sums, probabilities, cotangent, true);
}

}  // namespace td3_fast::cpu
