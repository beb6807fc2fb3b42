// How a block keeps its own tile and streams those of the other side: see tile_passes.cuh.
#pragma once

#include "tile.cuh"

namespace td3_fast::cuda {

constexpr int kMostWarps = 8;

enum Statistic { kLogsumexp, kRemainder, kShift, kInner, kUMean, kOffset, kStatistics };

// Which operand of the rows, or of the items, a tile is of.
enum RowOperand { kQueries, kGradEmbedding, kGradGradQueries, kRowOperands };
enum ItemOperand { kKeys, kValues, kGradGradKeys, kGradGradValues, kItemOperands };

struct TileArguments {
  SoftEmbedding problem;
  Matrix rows[kRowOperands], items[kItemOperands];
  int stages;
};

// Where the operands of a warp are: its own 16 rows of an owned tile, or a streamed tile. Null where absent.
template <typename Stored>
struct Operands {
  const Stored* rows[kRowOperands];
  const Stored* items[kItemOperands];
  const float* statistics;  // of streamed rows, (kStatistics, kColumns)
};

__device__ inline const float* statistic_of(const SoftEmbedding& problem, int which) {
  switch (which) {
    case kLogsumexp:
      return static_cast<const float*>(problem.logsumexp);
    case kRemainder:
      return static_cast<const float*>(problem.remainder);
    case kShift:
      return static_cast<const float*>(problem.shift);
    case kInner:
      return static_cast<const float*>(problem.inner);
    case kUMean:
      return static_cast<const float*>(problem.u_mean);
    default:
      return static_cast<const float*>(problem.offset);
  }
}

// Floats of shared memory that hold the statistics of a streamed tile.
template <bool kOwnItems, int kColumns>
constexpr int kStatisticsSize = kOwnItems ? kStatistics * kColumns : 0;

// Values that are the keys are not loaded again.
__host__ __device__ inline bool is_loaded(const Matrix (&operands)[kItemOperands], int which) {
  return operands[which].data != nullptr &&
         !(which == kValues && operands[kValues].data == operands[kKeys].data);
}
__host__ __device__ inline bool is_loaded(const Matrix (&operands)[kRowOperands], int which) {
  return operands[which].data != nullptr;
}

template <int kCount>
__host__ __device__ int loaded(const Matrix (&operands)[kCount]) {
  int count = 0;
  for (int i = 0; i < kCount; ++i) count += is_loaded(operands, i);
  return count;
}

template <typename Stored, int kCount>
__device__ void place(const Stored* (&tiles)[kCount],
                      const Matrix (&operands)[kCount],
                      const Stored* base,
                      int size) {
  int slot = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    tiles[i] = nullptr;
    if (operands[i].data == nullptr) continue;
    tiles[i] = is_loaded(operands, i) ? base + slot++ * size : tiles[0];
  }
}

template <typename Stored, int kDepth, int kCount>
__device__ void copy_tiles(
    Stored* to, const Matrix (&operands)[kCount], int64_t first, int64_t end, int rows) {
  int slot = 0;
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {
    if (!is_loaded(operands, i)) continue;
    Tile<Stored, kDepth>::copy(to + slot++ * rows * Tile<Stored, kDepth>::kPitch, operands[i], first, end,
                               rows);
  }
}

// Calls body(operands, first, count) for each tile of kColumns streamed rows or items of this block's split.
// Warps that own nothing only help to copy.
template <typename Stored, int kDepth, int kColumns, bool kOwnItems, typename Body>
__device__ void for_each_tile(const TileArguments& arguments, const Body& body) {
  constexpr int kPitch = Tile<Stored, kDepth>::kPitch;
  const SoftEmbedding& problem = arguments.problem;
  const auto& own = [&]() -> const auto& {
    if constexpr (kOwnItems) {
      return arguments.items;
    } else {
      return arguments.rows;
    }
  }();
  const auto& streamed = [&]() -> const auto& {
    if constexpr (kOwnItems) {
      return arguments.rows;
    } else {
      return arguments.items;
    }
  }();
  const int64_t owners = kOwnItems ? problem.items : problem.rows;
  const int64_t others = kOwnItems ? problem.rows : problem.items;
  const int64_t split = kOwnItems ? problem.split_rows : problem.split_items;
  const int64_t begin = blockIdx.y * split, end = begin + split < others ? begin + split : others;
  const int own_rows = static_cast<int>(blockDim.x / kWarp * 16),
            warp = static_cast<int>(threadIdx.x / kWarp);
  const int64_t first_owner = int64_t{blockIdx.x} * own_rows;
  const bool works = first_owner + warp * 16 < owners;

  Stored* own_tiles = shared_memory<Stored>();
  unsigned char* stages =
      shared_memory<unsigned char>() + loaded(own) * own_rows * kPitch * static_cast<int>(sizeof(Stored));
  const int tiles_bytes = loaded(streamed) * kColumns * kPitch * static_cast<int>(sizeof(Stored));
  const int stage_bytes =
      tiles_bytes + kStatisticsSize<kOwnItems, kColumns> * static_cast<int>(sizeof(float));

  const auto issue = [&](int tile, int stage) {
    unsigned char* to = stages + stage * stage_bytes;
    const int64_t first = begin + int64_t{tile} * kColumns;
    copy_tiles<Stored, kDepth>(reinterpret_cast<Stored*>(to), streamed, first, end, kColumns);
    if constexpr (kOwnItems) {
      float* statistics = reinterpret_cast<float*>(to + tiles_bytes);
      for (int at = static_cast<int>(threadIdx.x); at < kStatistics * kColumns;
           at += static_cast<int>(blockDim.x)) {
        const float* from = statistic_of(problem, at / kColumns);
        if (from == nullptr) continue;
        const int64_t row = first + at % kColumns;
        copy_async<4>(statistics + at, row < end ? from + row : from, row < end ? 4 : 0);
      }
    }
  };

  const int tiles = static_cast<int>((end - begin + kColumns - 1) / kColumns);
  copy_tiles<Stored, kDepth>(own_tiles, own, first_owner, owners, own_rows);
  for (int tile = 0; tile < arguments.stages - 1; ++tile) {
    if (tile < tiles) issue(tile, tile);
    commit_copies();
  }
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies(arguments.stages - 2);
    block_barrier();  // this tile is there for all, and the one before is done with
    const int next = tile + arguments.stages - 1;
    if (next < tiles) issue(next, stage == 0 ? arguments.stages - 1 : stage - 1);
    commit_copies();
    if (works) {
      Operands<Stored> operands;
      const unsigned char* at = stages + stage * stage_bytes;
      const auto* own_at = own_tiles + warp * 16 * kPitch;
      const auto* streamed_at = reinterpret_cast<const Stored*>(at);
      place(operands.rows, arguments.rows, kOwnItems ? streamed_at : own_at,
            (kOwnItems ? kColumns : own_rows) * kPitch);
      place(operands.items, arguments.items, kOwnItems ? own_at : streamed_at,
            (kOwnItems ? own_rows : kColumns) * kPitch);
      operands.statistics = reinterpret_cast<const float*>(at + tiles_bytes);
      const int64_t first = begin + int64_t{tile} * kColumns;
      body(operands, first, static_cast<int>(end - first < kColumns ? end - first : kColumns));
    }
    stage = stage + 1 == arguments.stages ? 0 : stage + 1;
  }
}

__device__ inline int64_t first_of_warp() {
  return int64_t{blockIdx.x} * (blockDim.x / kWarp * 16) + threadIdx.x / kWarp * 16;
}

// `row` of a split's scratch (splits, rows, columns).
template <typename T>
__device__ T* of_split(void* scratch, int64_t rows, int64_t columns) {
  return static_cast<T*>(scratch) + int64_t{blockIdx.y} * rows * columns;
}

__device__ inline float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}
__device__ inline float quad_max(float value) {
  for (int mask = 1; mask < 4; mask *= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace td3_fast::cuda
