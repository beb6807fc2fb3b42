// Ranks on CUDA: a block owns one row, its threads take items (or candidates) in turn, and the counts, being
// whole numbers, are added in any order. What a row leaves out is scored once more and taken back.

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

// Adds a warp's count to the rank, which starts at one.
__device__ void add_to_rank(const Ranking& problem, int64_t row, int ahead) {
  if (threadIdx.x == 0) problem.ranks[row] = 1;
  block_barrier();
  ahead = warp_sum(ahead);
  if (threadIdx.x % kWarp == 0) atomic_add(problem.ranks + row, ahead);
}

template <typename T, typename Stored>
__global__ void __launch_bounds__(kThreads) full_ranks_kernel(Ranking problem) {
  const int64_t row = blockIdx.x, target = problem.target[row];
  const Scores<T, Stored> score = scores_of<T, Stored>(problem, row);
  const T target_score = score(target);
  const auto counts = [&](int64_t item) {
    return item != target && !(problem.exclude_padding && item == 0) && !(score(item) < target_score);
  };
  int ahead = 0;
  for (int64_t item = threadIdx.x; item < problem.items; item += kThreads) ahead += counts(item);
  if (problem.excluded_offsets != nullptr) {
    const int64_t begin = problem.excluded_offsets[row], end = problem.excluded_offsets[row + 1];
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      bool repeated = false;
      for (int64_t before = begin; before < at && !repeated; ++before) {
        repeated = problem.excluded_items[before] == problem.excluded_items[at];
      }
      if (!repeated) ahead -= counts(problem.excluded_items[at]);
    }
  }
  add_to_rank(problem, row, ahead);
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
  add_to_rank(problem, row, ahead);
}

}  // namespace

const char* full_ranks(const Ranking& problem, void* stream) {
  return with_element(problem.table, [&](auto zero, auto stored) {
    return launch(full_ranks_kernel<decltype(zero), decltype(stored)>,
                  dim3(static_cast<unsigned>(problem.rows)), kThreads, 0, stream, problem);
  });
}

const char* candidate_ranks(const Ranking& problem, void* stream) {
  return with_element(problem.table, [&](auto zero, auto stored) {
    return launch(candidate_ranks_kernel<decltype(zero), decltype(stored)>,
                  dim3(static_cast<unsigned>(problem.rows)), kThreads, 0, stream, problem);
  });
}

}  // namespace td3_fast::cuda
