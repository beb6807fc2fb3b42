// Ranks on CUDA. Every score is a chain of fused multiply-adds in the order of the columns, wherever it is
// made, so equal embeddings tie exactly; tensor cores, which promise no order, have no part in it. Counts are
// whole numbers, and may be added in any order.
//
// Full ranking: a block for each row makes the score of its target, and takes back in advance what the row
// leaves out; then blocks of 64 rows count over tiles of 128 items, 4 × 8 scores to a thread. Candidates: a
// block for each row.

#include "elements.cuh"

namespace td3_fast::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Stored>
struct Scores {
  const T* hidden;
  const Stored* items;
  int64_t num_items, depth;

  // An id that is no item ends the kernel with an error, as an index out of range does in PyTorch.
  __device__ T operator()(int64_t item) const {
    if (item < 0 || item >= num_items) trap();
    return inner_product(hidden, items + item * depth, depth);
  }
};

template <typename T, typename Stored>
__device__ Scores<T, Stored> scores_of(const Ranking& problem, int64_t row) {
  return {static_cast<const T*>(problem.hidden) + row * problem.depth,
          static_cast<const Stored*>(problem.item_embeddings), problem.items, problem.depth};
}

// The rank, from the counts of the threads of a block.
__device__ void write_rank(const Ranking& problem, int64_t row, int ahead) {
  if (threadIdx.x == 0) problem.ranks[row] = 1;
  block_barrier();
  ahead = warp_sum(ahead);
  if (threadIdx.x % kWarp == 0) atomic_add(problem.ranks + row, ahead);
}

template <typename T>
__device__ bool is_ahead(const Ranking& problem, int64_t item, int64_t target, T score, T target_score) {
  // A score that is not a number counts.
  return item != target && !(problem.exclude_padding && item == 0) && !(score < target_score);
}

template <typename T, typename Stored>
__global__ void __launch_bounds__(kThreads) target_scores_kernel(Ranking problem) {
  const int64_t row = blockIdx.x, target = problem.target[row];
  const Scores<T, Stored> score = scores_of<T, Stored>(problem, row);
  const T target_score = score(target);
  if (threadIdx.x == 0) static_cast<T*>(problem.target_scores)[row] = target_score;
  int ahead = 0;
  if (problem.excluded_offsets != nullptr) {
    const int64_t begin = problem.excluded_offsets[row], end = problem.excluded_offsets[row + 1];
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      const int64_t item = problem.excluded_items[at];
      bool repeated = false;
      for (int64_t before = begin; before < at && !repeated; ++before) {
        repeated = problem.excluded_items[before] == item;
      }
      if (!repeated) ahead -= is_ahead(problem, item, target, score(item), target_score);
    }
  }
  write_rank(problem, row, ahead);
}

constexpr int kTileRows = 64, kTileItems = 128, kTileDepth = 16, kPad = 4;

// Columns [column, column + kTileDepth) of rows [first, first + kRows), transposed, zeros outside the matrix.
template <int kRows, typename T, typename Stored>
__device__ void load_transposed(
    T* tile, const Stored* from, int64_t first, int64_t rows, int64_t column, int64_t depth) {
  for (int at = static_cast<int>(threadIdx.x); at < kRows * kTileDepth; at += kThreads) {
    const int row = at / kTileDepth, k = at % kTileDepth;
    const bool inside = first + row < rows && column + k < depth;
    tile[k * (kRows + kPad) + row] = inside ? load<T>(from + (first + row) * depth + column + k) : T(0);
  }
}

template <typename T, typename Stored>
__global__ void __launch_bounds__(kThreads) count_ahead_kernel(Ranking problem) {
  T* row_tile = shared_memory<T>();
  T* item_tile = row_tile + kTileDepth * (kTileRows + kPad);
  const int across = static_cast<int>(threadIdx.x % 16), down = static_cast<int>(threadIdx.x / 16);
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int64_t begin = blockIdx.y * problem.split_items;
  const int64_t end =
      begin + problem.split_items < problem.items ? begin + problem.split_items : problem.items;
  int64_t target[4];
  T target_score[4];
  int ahead[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + 4 * down + i;
    target[i] = row < problem.rows ? problem.target[row] : 0;
    target_score[i] = row < problem.rows ? static_cast<const T*>(problem.target_scores)[row] : T(0);
  }
  for (int64_t first_item = begin; first_item < end; first_item += kTileItems) {
    T scores[4][8] = {};
    for (int64_t column = 0; column < problem.depth; column += kTileDepth) {
      block_barrier();
      load_transposed<kTileRows>(row_tile, static_cast<const T*>(problem.hidden), first_row, problem.rows,
                                 column, problem.depth);
      load_transposed<kTileItems>(item_tile, static_cast<const Stored*>(problem.item_embeddings), first_item,
                                  end, column, problem.depth);
      block_barrier();
#pragma unroll
      for (int k = 0; k < kTileDepth; ++k) {
        const T* rows = row_tile + k * (kTileRows + kPad) + 4 * down;
        const T* items = item_tile + k * (kTileItems + kPad) + 4 * across;
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 8; ++j) {
            scores[i][j] = fused_multiply_add(rows[i], items[j / 4 * 64 + j % 4], scores[i][j]);
          }
        }
      }
    }
    for (int j = 0; j < 8; ++j) {
      const int64_t item = first_item + j / 4 * 64 + 4 * across + j % 4;
      for (int i = 0; i < 4; ++i) {
        ahead[i] += item < end && is_ahead(problem, item, target[i], scores[i][j], target_score[i]);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int mask = 1; mask < 16; mask *= 2) ahead[i] += shuffle_xor(ahead[i], mask);
    const int64_t row = first_row + 4 * down + i;
    if (across == 0 && row < problem.rows) atomic_add(problem.ranks + row, ahead[i]);
  }
}

template <typename T, typename Stored>
__global__ void __launch_bounds__(kThreads) candidate_ranks_kernel(Ranking problem) {
  const int64_t row = blockIdx.x, target = problem.target[row];
  const Scores<T, Stored> score = scores_of<T, Stored>(problem, row);
  const T target_score = score(target);
  int ahead = 0;
  for (int64_t at = threadIdx.x; at < problem.candidates; at += kThreads) {
    const int64_t item = problem.candidate_ids[row * problem.candidates + at];
    ahead += item != target && !(score(item) < target_score);
  }
  write_rank(problem, row, ahead);
}

}  // namespace

const char* full_ranks(const Ranking& problem, void* stream) {
  return with_element(problem.table, [&](auto zero, auto stored) {
    using T = decltype(zero);
    using Stored = decltype(stored);
    const char* error = launch(target_scores_kernel<T, Stored>, dim3(static_cast<unsigned>(problem.rows)),
                               kThreads, 0, stream, problem);
    if (error != nullptr) return error;
    const dim3 grid(static_cast<unsigned>((problem.rows + kTileRows - 1) / kTileRows),
                    static_cast<unsigned>((problem.items + problem.split_items - 1) / problem.split_items));
    const int64_t elements = kTileDepth * (kTileRows + kTileItems + 2 * kPad);
    return launch(count_ahead_kernel<T, Stored>, grid, kThreads, elements * static_cast<int64_t>(sizeof(T)),
                  stream, problem);
  });
}

const char* candidate_ranks(const Ranking& problem, void* stream) {
  return with_element(problem.table, [&](auto zero, auto stored) {
    return launch(candidate_ranks_kernel<decltype(zero), decltype(stored)>,
                  dim3(static_cast<unsigned>(problem.rows)), kThreads, 0, stream, problem);
  });
}

}  // namespace td3_fast::cuda
