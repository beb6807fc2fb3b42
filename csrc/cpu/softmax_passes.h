// Forward, backward and double backward of one block of rows, for soft embedding and item logsumexp.
//
// The item logsumexp is the case of no values, with the expected item row in the place of the embedding.
#pragma once

#include <limits>

#include "kept.h"

namespace td3_fast::cpu {

// One block of rows. `values` absent: the expected key is the embedding. `embedding` undefined: logsumexp
// alone. `kept` is filled.
template <typename T>
void forward(const Tensor& queries,  // (rows, rank)
             const Table<T>& keys,
             const Table<T>& values,
             int64_t items,
             const Tensor& embedding,  // (rows, d)
             const Tensor& logsumexp,  // (rows,)
             const Tensor& remainder,  // (rows,)
             const Kept<T>& kept);

// What both orders share: the recomputed probabilities of one block of rows, and its upstream gradients.
template <typename T>
struct Rows {
  static constexpr int64_t P = kPanel<T>;

  int64_t rows, items, rank, width;
  Table<T> keys, values;  // values are absent where no gradient reaches the embedding
  Tensor queries, grad_embedding;
  Scratch<T> queries_lanes, grad_lanes;
  Scratch<T> logsumexp, remainder, shift, inner;  // inner is D
  Kept<T> kept;

  Rows(const Tensor& queries_in,
       const Table<T>& keys_in,
       const Table<T>& values_in,
       int64_t num_items,
       const Tensor& grad_embedding_in,  // undefined for zero
       const Tensor& grad_logsumexp,     // undefined for zero
       const Tensor& embedding,
       const Tensor& logsumexp_in,
       const Tensor& remainder_in,
       const Kept<T>& kept_in)
      : rows(queries_in.size(0)),
        items(num_items),
        rank(queries_in.size(1)),
        width(embedding.size(1)),
        keys(keys_in),
        queries(queries_in),
        grad_embedding(grad_embedding_in),
        queries_lanes(pack_lanes<T>(queries_in)),
        logsumexp(pack_vector<T>(logsumexp_in, std::numeric_limits<T>::infinity())),
        remainder(pack_vector<T>(remainder_in, T(0))),
        kept(kept_in) {
    const int64_t padded = panels() * P;
    inner = Scratch<T>(padded);
    std::fill_n(inner.data(), padded, T(0));
    if (grad_embedding.defined()) {
      values = values_in;
      grad_lanes = pack_lanes<T>(grad_embedding);
      const Tensor products = grad_embedding.mul(embedding).sum({1});
      std::copy_n(products.const_data_ptr<T>(), rows, inner.data());
    }
    if (grad_logsumexp.defined()) {
      shift = pack_vector<T>(grad_logsumexp, T(0));
    } else {
      shift = Scratch<T>(padded);
      std::fill_n(shift.data(), padded, T(0));
    }
    for (int64_t i = 0; i < padded; ++i) shift.data()[i] -= inner.data()[i];
  }

  int64_t panels() const { return ceil_div(rows, P); }
  int64_t lanes(int64_t panel) const { return lanes_of<T>(rows, panel); }

  // The probabilities of a tile, from those that are kept or made anew.
  void probabilities(int64_t panel, int64_t begin, int64_t count, const T* key, T* out) const {
    if (kept.holds(panel)) return kept.probabilities(panel, begin, count, out);
    tile<T>().product(key, rank, Walk::kRows, count, rank, queries_lanes.data() + panel * rank * P, out,
                      lanes(panel), false);
    tile<T>().probabilities(out, count, logsumexp.data() + panel * P, remainder.data() + panel * P);
  }

  // Sums over these rows for the items of one tile, in `table` (items, columns), or none where that is
  // undefined.
  TileSums<T> sums_of_tile(
      const Tensor& table, int64_t begin, int64_t count, T* scratch, bool accumulate) const {
    if (!table.defined()) return {nullptr, 0, count, scratch, accumulate};
    const int64_t columns = table.size(1);
    return {table.mutable_data_ptr<T>() + begin * columns, columns, count, scratch, accumulate};
  }

  // w = grad_embedding . value, or null where no gradient reaches the embedding.
  const T* value_grads(int64_t panel, int64_t count, const T* value, T* out) const {
    if (!values.present()) return nullptr;
    tile<T>().product(value, width, Walk::kRows, count, width, grad_lanes.data() + panel * width * P, out,
                      lanes(panel), false);
    return out;
  }
};

// Outputs are undefined where not asked for; with `accumulate_tables` those of tables are added to.
template <typename T>
void backward(const Rows<T>& r,
              const Tensor& grad_queries,
              const Tensor& grad_keys,
              const Tensor& grad_values,
              bool accumulate_tables);

// The cotangents of one block of rows, and u and s of a tile.
template <typename T>
struct Cotangents {
  static constexpr int64_t P = kPanel<T>;

  const Rows<T>& r;
  Tensor grad_grad_queries;                   // undefined for zero
  Table<T> grad_grad_keys, grad_grad_values;  // absent for zero
  Scratch<T> query_lanes;

  Cotangents(const Rows<T>& rows,
             const Tensor& grad_grad_queries_in,
             const Table<T>& keys,
             const Table<T>& values)
      : r(rows), grad_grad_queries(grad_grad_queries_in), grad_grad_keys(keys), grad_grad_values(values) {
    if (grad_grad_queries.defined()) query_lanes = pack_lanes<T>(grad_grad_queries);
  }

  int64_t scratch_size(int64_t step) const {
    return r.keys.scratch_size(step) + r.values.scratch_size(step) + grad_grad_keys.scratch_size(step) +
           grad_grad_values.scratch_size(step) + 4 * P;
  }

  void u(int64_t panel, int64_t count, const T* key, const T* grad_grad_key, T* out) const {
    bool accumulate = false;
    if (grad_grad_queries.defined()) {
      tile<T>().product(key, r.rank, Walk::kRows, count, r.rank, query_lanes.data() + panel * r.rank * P, out,
                        r.lanes(panel), false);
      accumulate = true;
    }
    if (grad_grad_keys.present()) {
      tile<T>().product(grad_grad_key, r.rank, Walk::kRows, count, r.rank,
                        r.queries_lanes.data() + panel * r.rank * P, out, r.lanes(panel), accumulate);
      accumulate = true;
    }
    if (!accumulate) std::fill_n(out, count * P, T(0));
  }

  const T* s(int64_t panel, int64_t count, const T* grad_grad_value, T* out) const {
    if (!grad_grad_values.present()) return nullptr;
    tile<T>().product(grad_grad_value, r.width, Walk::kRows, count, r.width,
                      r.grad_lanes.data() + panel * r.width * P, out, r.lanes(panel), false);
    return out;
  }
};

// u_mean and offset of every row, [2][panel][lane].
template <typename T>
Scratch<T> row_means(const Cotangents<T>& c);

// The expected row of grad_grad_keys, sum p grad_grad_key, and the largest p of every query row.
template <typename T>
struct ExpectedKeys {
  static constexpr int64_t P = kPanel<T>;

  ChunkSums<T> rows;  // its totals: [panel][column][lane] of the first chunk
  Scratch<T> largest;

  explicit ExpectedKeys(const Cotangents<T>& c);

  const T* at(int64_t panel) const { return rows.at(0, panel); }
};

// u_mean of the rows of an item logsumexp, of which `mean` is the expected item. u is linear in the items, so
// its mean is that of two expected rows. Where one item has most of the probability, the difference of u
// there and its mean would be lost to rounding: such panels take the pass over u.
template <typename T>
Scratch<T> row_means_of_logsumexp(const Cotangents<T>& c,
                                  const ExpectedKeys<T>& expected,
                                  const Tensor& mean);

// `means` as row_means() gives them. Outputs are undefined where not asked for; `expected` may be null.
template <typename T>
void double_backward(const Cotangents<T>& c,
                     const Scratch<T>& means,
                     const ExpectedKeys<T>* expected,
                     const Tensor& grad_queries,
                     const Tensor& grad_keys,
                     const Tensor& grad_values,
                     const Tensor& grad_grad_embedding,  // the gradient towards grad_embedding
                     bool accumulate_tables);

}  // namespace td3_fast::cpu
