// Products of numbers that have a lane per sequence, with one another or with parameters that all lanes
// share.
//
// For files that are built once per instruction set; see vectors.h.
#pragma once

#include "lanes.h"
#include "numbers.h"

namespace td3_fast::cpu {
namespace {

template <typename T, bool kTangents>
struct Products {
  using V = Vector<T>;
  using W = Weights<T, kTangents>;
  using N = typename W::N;
  static constexpr int L = kLanes<T>;

  // Rows of numbers: element (i, j) is at[i * row + j].
  struct Rows {
    N* at;
    int64_t row;
    Rows from(int64_t i, int64_t j) const { return {at + i * row + j, row}; }
    operator N*() const { return at; }
  };
  // The left side of a product, element (row, depth).
  struct Left {
    const N* at;
    int64_t row, depth;
    Left(Rows rows) : at(rows.at), row(rows.row), depth(1) {}
    Left(const N* at_in, int64_t row_in, int64_t depth_in) : at(at_in), row(row_in), depth(depth_in) {}
    Left from(int64_t i) const { return {at + i * row, row, depth}; }
  };
  // The right side of a product, element (depth, column): numbers of each lane, or parameters of all.
  struct Own {
    const N* at;
    int64_t depth, column;
    TD3_FAST_INLINE void add(N* sum, int64_t k, int64_t j, N x) const {
      add_product(sum, x, at[k * depth + j * column]);
    }
  };
  template <bool kTransposed>
  struct Shared {
    W at;
    int64_t width;  // of a row of the weight
    TD3_FAST_INLINE void add(N* sum, int64_t k, int64_t j, N x) const {
      at.add(sum, kTransposed ? k * width + j : j * width + k, x);
    }
  };
  // Rows and columns of a product that are held in registers.
  static constexpr int kMostRows = (kVectorBytes == 64 ? 4 : 2) / (kTangents ? 2 : 1);

  template <int kRows, int kColumns, typename Right, typename Start>
  static TD3_FAST_INLINE void product_block(
      int64_t depth, Left left, const Right& right, int64_t j, const Start& start, Rows to) {
    N sum[kRows][kColumns];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) sum[r][c] = start(to.at + r * to.row, j + c);
    }
    for (int64_t k = 0; k < depth; ++k) {
      N x[kRows];
      for (int r = 0; r < kRows; ++r) x[r] = left.at[r * left.row + k * left.depth];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) right.add(&sum[r][c], k, j + c, x[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) to.at[r * to.row + j + c] = sum[r][c];
    }
  }
  template <int kRows, typename Right, typename Start>
  static TD3_FAST_INLINE void product_rows(int64_t rows,
                                           int64_t columns,
                                           int64_t depth,
                                           Left left,
                                           const Right& right,
                                           const Start& start,
                                           Rows to) {
    constexpr int kColumns = kRows == 1 && !kTangents ? 8 : 4;
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      int64_t j = 0;
      for (; j + kColumns <= columns; j += kColumns) {
        product_block<kRows, kColumns>(depth, left.from(i), right, j, start, to.from(i, 0));
      }
      for (; j < columns; ++j) product_block<kRows, 1>(depth, left.from(i), right, j, start, to.from(i, 0));
    }
    if constexpr (kRows > 1) {
      product_rows<kRows / 2>(rows - i, columns, depth, left.from(i), right, start, to.from(i, 0));
    }
  }
  // to[i][j] = start(row i of to, j) + the sum over k of left[i][k] right[k][j].
  template <typename Right, typename Start>
  static void product(int64_t rows,
                      int64_t columns,
                      int64_t depth,
                      Left left,
                      const Right& right,
                      const Start& start,
                      Rows to) {
    product_rows<kMostRows>(rows, columns, depth, left, right, start, to);
  }
  // What a product starts from.
  struct Nothing {
    TD3_FAST_INLINE N operator()(const N*, int64_t) const { return N{}; }
  };
  struct Itself {
    TD3_FAST_INLINE N operator()(const N* row, int64_t j) const { return row[j]; }
  };
  struct Bias {
    W at;
    TD3_FAST_INLINE N operator()(const N*, int64_t j) const { return at[j]; }
  };

  // y = W x of each row, W (out, in), and what it starts from.
  template <typename Start>
  static void linear(
      const W& weight, int64_t out, int64_t in, int64_t rows, Left x, Rows y, const Start& start) {
    product(rows, out, in, x, Shared<false>{weight, in}, start, y);
  }
  // y = Wᵀ x of each row, W (out, in), and what it starts from.
  template <typename Start>
  static void linear_transposed(
      const W& weight, int64_t out, int64_t in, int64_t rows, Left x, Rows y, const Start& start) {
    product(rows, in, out, x, Shared<true>{weight, in}, start, y);
  }

  // What of a number is summed and stored.
  static TD3_FAST_INLINE V stored(const N& x) {
    if constexpr (kTangents) {
      return x.t;
    } else {
      return x;
    }
  }
  // sums (out, in) += the gradient of W where y = W x: a product whose depth is rows times lanes. `grads` and
  // `inputs` have room for rows of `out` and of `in` numbers.
  static void weight_gradients(
      int64_t out, int64_t in, int64_t rows, Rows grad_y, Rows x, T* grads, T* inputs, T* sums) {
    T *next_grads = grads, *next_inputs = inputs;
    const auto turn = [&](const auto& of_grad, const auto& of_input) {
      store_rows<T>(out, L, of_grad, [&](int lane) { return next_grads + lane * out; });
      store_rows<T>(in, L, of_input, [&](int lane) { return next_inputs + lane * in; });
      next_grads += L * out, next_inputs += L * in;
    };
    for (int64_t r = 0; r < rows; ++r) {
      const N *g = grad_y.at + r * grad_y.row, *from = x.at + r * x.row;
      if constexpr (kTangents) {
        turn([&](int64_t i) { return g[i].v; }, [&](int64_t j) { return from[j].t; });
        turn([&](int64_t i) { return g[i].t; }, [&](int64_t j) { return from[j].v; });
      } else {
        turn([&](int64_t i) { return g[i]; }, [&](int64_t j) { return from[j]; });
      }
    }
    add_products<T>((kTangents ? 2 : 1) * rows * L, out, in, grads, inputs, sums);
  }
};

}  // namespace
}  // namespace td3_fast::cpu
