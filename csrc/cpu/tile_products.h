// Products of tiles, in blocks of vectors of lanes.
//
// For files that are built once per instruction set; see vectors.h.
#pragma once

#include "tile.h"
#include "vectors.h"

namespace td3_fast::cpu {
namespace {

// Rows of a block of V vectors of lanes: as many sums as registers hold beside the operands.
constexpr int max_unroll(int vectors) {
  return kVectorBytes == 64   ? 14
         : kVectorBytes == 32 ? (vectors == 1 ? 12 : 6)
                              : (vectors == 4 ? 3 : 12 / vectors);
}
constexpr int kVectorsPerPanel = 64 / kVectorBytes;

// Elements ahead of the columns in use, in the rows of a wide product: too many rows for the hardware to see
// the next columns coming.
constexpr int64_t kAhead = 32;

// One block of M rows of c by V vectors of lanes, held in registers while the depth runs; kRow lanes from one
// row of b to the next.
// The sum starts at zero and is added to c once: partial sums keep long reductions accurate.
template <typename T, int M, int V, Walk kWalk, int64_t kRow>
TD3_FAST_INLINE void block(const T* a,
                           int64_t stride,
                           int64_t a_segment,
                           int64_t segment,
                           int64_t depth,
                           const T* b,
                           T* c,
                           int64_t c_stride,
                           bool accumulate) {
  constexpr bool kPrefetches = kRow == kWide<T> && kWalk == Walk::kColumns;
  Vector<T> sum[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = Vector<T>{};
  }
  for (int64_t start = 0; start < depth; start += segment, a += a_segment) {
    const int64_t length = depth - start < segment ? depth - start : segment;
    const T* a_k = a;
    for (int64_t k = 0; k < length; ++k) {
      Vector<T> b_k[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) b_k[v] = *reinterpret_cast<const Vector<T>*>(b + v * kLanes<T>);
      b += kRow;
      if constexpr (kPrefetches) __builtin_prefetch(a_k + kAhead);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const T a_ik = kWalk == Walk::kRows ? a[i * stride + k] : a_k[i];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[i][v] += a_ik * b_k[v];
      }
      a_k += stride;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      UnalignedVector<T>* out = reinterpret_cast<UnalignedVector<T>*>(c + i * c_stride + v * kLanes<T>);
      *out = accumulate ? *out + sum[i][v] : sum[i][v];
    }
  }
}

template <typename T>
using Block = void (*)(const T*, int64_t, int64_t, int64_t, int64_t, const T*, T*, int64_t, bool);

template <typename T, int M, int V, Walk kWalk, int64_t kRow>
void block_of(const T* a,
              int64_t stride,
              int64_t a_segment,
              int64_t segment,
              int64_t depth,
              const T* b,
              T* c,
              int64_t c_stride,
              bool accumulate) {
  block<T, M, V, kWalk, kRow>(a, stride, a_segment, segment, depth, b, c, c_stride, accumulate);
}

template <typename T, int V, Walk kWalk, int64_t kRow, int M>
struct Blocks {
  static Block<T> of(int64_t m) {
    return m == M ? static_cast<Block<T>>(block_of<T, M, V, kWalk, kRow>)
                  : Blocks<T, V, kWalk, kRow, M - 1>::of(m);
  }
};
template <typename T, int V, Walk kWalk, int64_t kRow>
struct Blocks<T, V, kWalk, kRow, 0> {
  static Block<T> of(int64_t) { return nullptr; }
};

// Rows of c in blocks of nearly equal size, so that none is left with too few sums to hide their latency.
template <typename T, int V, Walk kWalk, int64_t kRow = kPanel<T>>
void blocks(const T* a,
            int64_t stride,
            int64_t a_segment,
            int64_t segment,
            int64_t count,
            int64_t depth,
            const T* b,
            T* c,
            int64_t c_stride,
            bool accumulate) {
  constexpr int kMaxUnroll = max_unroll(V);
  const int64_t num_blocks = (count + kMaxUnroll - 1) / kMaxUnroll;
  if (num_blocks == 0) return;
  const int64_t small = count / num_blocks;
  const int64_t num_large = count % num_blocks;
  const int64_t a_step = kWalk == Walk::kRows ? stride : 1;
  const Block<T> run_small = Blocks<T, V, kWalk, kRow, kMaxUnroll>::of(small);
  const Block<T> run_large = Blocks<T, V, kWalk, kRow, kMaxUnroll>::of(small + 1);
  for (int64_t index = 0; index < num_blocks; ++index) {
    const int64_t size = index < num_large ? small + 1 : small;
    (index < num_large ? run_large : run_small)(a, stride, a_segment, segment, depth, b, c, c_stride,
                                                accumulate);
    a += size * a_step;
    c += size * c_stride;
  }
}

template <typename T, Walk kWalk, int V>
void blocks_of_lanes(const T* a,
                     int64_t stride,
                     int64_t a_segment,
                     int64_t segment,
                     int64_t count,
                     int64_t depth,
                     const T* b,
                     T* c,
                     int64_t c_stride,
                     int64_t lanes,
                     bool accumulate) {
  if constexpr (V > 1) {
    if (lanes <= (V - 1) * kLanes<T>) {
      blocks_of_lanes<T, kWalk, V - 1>(a, stride, a_segment, segment, count, depth, b, c, c_stride, lanes,
                                       accumulate);
      return;
    }
  }
  blocks<T, V, kWalk>(a, stride, a_segment, segment, count, depth, b, c, c_stride, accumulate);
}

template <typename T>
void product(const T* a,
             int64_t stride,
             Walk walk,
             int64_t count,
             int64_t depth,
             const T* b,
             T* c,
             int64_t lanes,
             bool accumulate) {
  const auto run = walk == Walk::kRows ? blocks_of_lanes<T, Walk::kRows, kVectorsPerPanel>
                                       : blocks_of_lanes<T, Walk::kColumns, kVectorsPerPanel>;
  run(a, stride, 0, depth > 0 ? depth : 1, count, depth, b, c, kPanel<T>, lanes, accumulate);
}

template <typename T, Walk kWalk>
void wide_product_of(const T* a,
                     int64_t stride,
                     int64_t count,
                     int64_t depth,
                     const T* b,
                     T* c,
                     int64_t c_stride,
                     int64_t lanes,
                     bool accumulate) {
  constexpr int V = kVectorBytes == 16 ? 4 : 2;
  const int64_t segment = depth > 0 ? depth : 1;
  int64_t lane = 0;
  for (; lane + (V - 1) * kLanes<T> < lanes; lane += V * kLanes<T>) {
    blocks<T, V, kWalk, kWide<T>>(a, stride, 0, segment, count, depth, b + lane, c + lane, c_stride,
                                  accumulate);
  }
  for (; lane < lanes; lane += kLanes<T>) {
    blocks<T, 1, kWalk, kWide<T>>(a, stride, 0, segment, count, depth, b + lane, c + lane, c_stride,
                                  accumulate);
  }
}

template <typename T>
void wide_product(const T* a,
                  int64_t stride,
                  Walk walk,
                  int64_t count,
                  int64_t depth,
                  const T* b,
                  T* c,
                  int64_t c_stride,
                  int64_t lanes,
                  bool accumulate) {
  const auto run = walk == Walk::kRows ? wide_product_of<T, Walk::kRows> : wide_product_of<T, Walk::kColumns>;
  run(a, stride, count, depth, b, c, c_stride, lanes, accumulate);
}

template <typename T>
void sum_rows(const T* a,
              int64_t a_panel,
              int64_t items,
              int64_t rows,
              const T* b,
              T* c,
              int64_t c_stride,
              int64_t lanes,
              bool accumulate) {
  blocks_of_lanes<T, Walk::kRows, kVectorsPerPanel>(a, kPanel<T>, a_panel, kPanel<T>, items, rows, b, c,
                                                    c_stride, lanes, accumulate);
}

}  // namespace
}  // namespace td3_fast::cpu
