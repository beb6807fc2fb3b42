// Arithmetic on tiles of items x query rows: the only code that is built once per instruction set.
//
// Query rows are lanes. Rows are packed into panels of kPanel rows (64 bytes), so that a tile of scores is
// [item][lane], row statistics are vectors of lanes, and no product needs the item tables repacked: every
// product is a scalar of one operand times a vector of lanes of the other.
//
// Included by code built with wider instructions: nothing here may define an inline function.
#pragma once

#include <cstdint>

namespace td3_fast::cpu {

template <typename T>
constexpr int64_t kPanel = 64 / sizeof(T);

// Columns that a wide product takes at once: enough to use each scalar that was loaded twice or more.
template <typename T>
constexpr int64_t kWide = 2 * kPanel<T>;

// How the scalar operand of a product lies in memory.
enum class Walk {
  kRows,     // a(i, k) = a[i * stride + k]
  kColumns,  // a(i, k) = a[k * stride + i]
};

// Lane vectors of one panel that the second order needs; see ops/README.md for the symbols.
template <typename T>
struct SecondOrderRows {
  const T* shift;   // grad_logsumexp - D
  const T* u_mean;  // row mean of u
  const T* offset;  // sum p (w - D) (u - u_mean) + s_mean
};

// Lane vectors that row means come from. Sums of u are relative to its value at the most probable item so
// far: where one item has nearly all of the probability, the differences that the second order is made of are
// then exact.
template <typename T>
struct RowSums {
  T* peak;        // largest p
  T* centre;      // u there
  T* mass;        // sum p
  T* u;           // sum p (u - centre)
  T* w;           // sum p (w - D)
  T* covariance;  // sum p (w - D) (u - centre)
  T* s;           // sum p s
};

// Every pointer to lanes is aligned to 64 bytes; "items" counts the rows of a tile.
template <typename T>
struct Tile {
  const char* name;

  // c[i][lane] = sum_k a(i, k) b[k][lane] for i < count, added to c where accumulate is set.
  void (*product)(const T* a,
                  int64_t stride,
                  Walk walk,
                  int64_t count,
                  int64_t depth,
                  const T* b,
                  T* c,
                  int64_t lanes,
                  bool accumulate);

  // The same with rows of b that are kWide lanes apart and rows of c that are c_stride apart, which may lie
  // anywhere. Of c the first `lanes` columns are written, and those that share a vector with them.
  void (*wide_product)(const T* a,
                       int64_t stride,
                       Walk walk,
                       int64_t count,
                       int64_t depth,
                       const T* b,
                       T* c,
                       int64_t c_stride,
                       int64_t lanes,
                       bool accumulate);

  // c[item * c_stride + column] = sum_row a[row / kPanel][item][row % kPanel] b[row][column] for the first
  // `lanes` columns and those that share a vector with them: the sum over query rows, added to c where
  // accumulate is set. Panels of a are a_panel elements apart; c may lie anywhere.
  void (*sum_rows)(const T* a,
                   int64_t a_panel,
                   int64_t items,
                   int64_t rows,
                   const T* b,
                   T* c,
                   int64_t c_stride,
                   int64_t lanes,
                   bool accumulate);

  // Online softmax: scores become exp(scores - maximum) with the maximum so far; sum and the `width` rows of
  // the weighted sum are rescaled to it, and the tile is added to sum.
  void (*online_softmax)(T* scores, int64_t items, T* maximum, T* sum, T* weighted, int64_t width);

  // out[i] = softmax(scores)[i] for i < count, which out may end with; scores, which are overwritten, up to
  // the end of their last panel.
  void (*softmax)(T* scores, int64_t count, T* out);

  // scores become exp(scores - logsumexp - remainder); remainder may be null, for zero.
  void (*probabilities)(T* scores, int64_t items, const T* logsumexp, const T* remainder);

  // scaled = p factor, with zero where the factor is zero, whatever p holds.
  void (*scale)(const T* p, int64_t items, const T* factor, T* scaled);

  // sum += p factor of each item, or = p factor where it is the first that is added.
  void (*add_scaled)(const T* p, int64_t items, const T* factor, T* sum, bool first);

  // largest[lane] = the larger of itself and every p of that lane.
  void (*largest)(const T* p, int64_t items, T* largest);

  // grad_scores = p (w + shift); w may be null, for zero.
  void (*grad_scores)(const T* p, const T* w, int64_t items, const T* shift, T* grad_scores);

  // Adds a tile to the sums that the row means come from. w and s may be null, for zero.
  void (*row_means)(const T* p,
                    const T* w,
                    const T* u,
                    const T* s,
                    int64_t items,
                    const T* inner,  // D
                    const RowSums<T>& sums);

  // b = p [(w + shift)(u - u_mean) - offset + s], grad_scores = p (w + shift), centred = p (u - u_mean).
  // w and s may be null, for zero; each output may be null, or be w, u or s itself.
  void (*second_order)(const T* p,
                       const T* w,
                       const T* u,
                       const T* s,
                       int64_t items,
                       const SecondOrderRows<T>& rows,
                       T* b,
                       T* grad_scores,
                       T* centred);

  // ahead[lane] += number of items whose score is not below target[lane].
  void (*count_ahead)(const T* scores, int64_t items, const T* target, int64_t* ahead);

  // Inner products of one row of length depth with one item; the order of the sum depends on depth alone.
  T (*inner_product)(const T* row, const T* item, int64_t depth);
};

// The tile arithmetic of the best instruction set of this machine, or of the one that was selected.
template <typename T>
const Tile<T>& tile();

// Names of the instruction sets that this machine runs, best first.
int instruction_sets(const char** names, int capacity);

// Use the named instruction set from now on; for tests. Returns false where the machine lacks it.
bool select_instruction_set(const char* name);

}  // namespace td3_fast::cpu
