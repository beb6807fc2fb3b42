// The passes of soft embedding and item logsumexp on tensor cores; formulas and symbols: ops/README.md.
//
// A block owns up to 128 rows (forward, row means, sums over items) or items (sums over rows), 16 to a warp,
// and keeps their operands in shared memory; tiles of the other side stream through two or three stages of
// asynchronous copies. Products of a tile become coefficients in registers, and these, times the tile, sums
// in registers. With keys = values each tile is loaded once. The streamed side is split over blocks; splits
// are merged in order (merge.cu). No atomics: same input, same bits.
#pragma once

#include "means.cuh"
#include "tile_stream.cuh"

namespace td3_fast::cuda {

// Online softmax: row maxima are shared by the lanes of a quad, row sums are put together at the end.
template <typename Math, int kDepth, int kColumns>
__global__ void __launch_bounds__(kWarp* kMostWarps)
    forward_tiles(const __grid_constant__ TileArguments arguments) {
  using Stored = typename Math::Stored;
  const SoftEmbedding& problem = arguments.problem;
  const int rank = padded(static_cast<int>(problem.rank)), width = padded(static_cast<int>(problem.width));
  Eight sums[kDepth / 8] = {};
  float maxima[2] = {minus_infinity<float>(), minus_infinity<float>()}, totals[2] = {0, 0};
  for_each_tile<Stored, kDepth, kColumns, false>(
      arguments, [&](const Operands<Stored>& at, int64_t /*first*/, int count) {
        Eight p[kColumns / 8] = {};
        add_products<Math, kDepth, kColumns>(p, at.rows[kQueries], at.items[kKeys], rank);
        float factor[2];
        for (int row = 0; row < 2; ++row) {
          float peak = minus_infinity<float>();
#pragma unroll
          for (int i = 0; i < kColumns / 8; ++i) {
            for (int j = 0; j < 2; ++j) {
              float& score = p[i][2 * row + j];
              if (8 * i + fragment_column() + j >= count) score = minus_infinity<float>();
              peak = score > peak ? score : peak;
            }
          }
          peak = quad_max(peak);
          peak = peak > maxima[row] ? peak : maxima[row];
          factor[row] = fast_exponential(maxima[row] - peak);
          maxima[row] = peak;
          totals[row] *= factor[row];
#pragma unroll
          for (int i = 0; i < kColumns / 8; ++i) {
            for (int j = 2 * row; j < 2 * row + 2; ++j) {
              p[i][j] = fast_exponential(p[i][j] - peak);
              totals[row] += p[i][j];
            }
          }
        }
        if (width > 0) {
          const Coefficients<Math, kColumns> coefficients(p);
          add_weighted<Math, kDepth, kColumns>(sums, factor, coefficients, at.items[kValues], width);
        }
      });
  const int64_t first = first_of_warp();
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first + fragment_row() + 8 * i;
    const float total = quad_sum(totals[i]);
    if (row < problem.rows && fragment_column() == 0) {
      of_split<float>(problem.maxima, problem.rows, 1)[row] = maxima[i];
      of_split<float>(problem.sums, problem.rows, 1)[row] = total;
    }
  }
  if (width > 0) {
    write_sums<kDepth>(of_split<float>(problem.weighted, problem.rows, problem.width), sums, first,
                       problem.rows, static_cast<int>(problem.width));
  }
}

// p, w - D, u and s of the pairs of a warp's own with a streamed tile; w, u and s only where they are needed.
template <typename Math, int kDepth, int kColumns, bool kOwnItems, bool kSecond>
struct Pairs {
  using Stored = typename Math::Stored;
  Eight p[kColumns / 8] = {}, w[kColumns / 8] = {};
  Eight u[kSecond ? kColumns / 8 : 1] = {}, s[kSecond ? kColumns / 8 : 1] = {};
  float own_statistics[kOwnItems ? 1 : kStatistics][2];  // of rows g and g + 8

  // To be called once; the statistics of owned rows stay.
  __device__ void read_statistics(const SoftEmbedding& problem) {
    if constexpr (!kOwnItems) {
      const int64_t first = first_of_warp() + fragment_row();
#pragma unroll
      for (int which = 0; which < kStatistics; ++which) {
        const float* from = statistic_of(problem, which);
        for (int i = 0; i < 2; ++i) {
          const int64_t row = first + 8 * i;
          own_statistics[which][i] = from != nullptr && row < problem.rows ? from[row] : 0.0f;
        }
      }
    }
  }

  // Of element j of eight i.
  __device__ float statistic(const Operands<Stored>& at, Statistic which, int i, int j) const {
    if constexpr (kOwnItems) {
      return at.statistics[which * kColumns + 8 * i + fragment_column() + j % 2];
    } else {
      return own_statistics[which][j / 2];
    }
  }

  __device__ void multiply(Eight (&eights)[kColumns / 8],
                           const Stored* rows,
                           const Stored* items,
                           int depth) {
    add_products<Math, kDepth, kColumns>(eights, kOwnItems ? items : rows, kOwnItems ? rows : items, depth);
  }

  // w and s only where the sums are `weighted` by them.
  __device__ void make(const Operands<Stored>& at, int count, int rank, int width, bool weighted) {
    clear(p);
    clear(w);
    multiply(p, at.rows[kQueries], at.items[kKeys], rank);
    const bool has_grad = weighted && at.rows[kGradEmbedding] != nullptr;
    if (has_grad) multiply(w, at.rows[kGradEmbedding], at.items[kValues], width);
    if constexpr (kSecond) {
      clear(u);
      clear(s);
      if (at.rows[kGradGradQueries] != nullptr) {
        multiply(u, at.rows[kGradGradQueries], at.items[kKeys], rank);
      }
      if (at.items[kGradGradKeys] != nullptr) {
        multiply(u, at.rows[kQueries], at.items[kGradGradKeys], rank);
      }
      if (weighted && at.items[kGradGradValues] != nullptr) {
        multiply(s, at.rows[kGradEmbedding], at.items[kGradGradValues], width);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      for (int j = 0; j < 4; ++j) {
        const float exponent = (p[i][j] - statistic(at, kLogsumexp, i, j)) - statistic(at, kRemainder, i, j);
        p[i][j] = 8 * i + fragment_column() + j % 2 < count ? fast_exponential(exponent) : 0.0f;
        if (has_grad) w[i][j] -= statistic(at, kInner, i, j);
      }
    }
  }

 private:
  static __device__ void clear(Eight (&eights)[kColumns / 8]) {
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      for (int j = 0; j < 4; ++j) eights[i][j] = 0;
    }
  }
};

template <typename Math, int kDepth, int kColumns>
__global__ void __launch_bounds__(kWarp* kMostWarps)
    row_means_tiles(const __grid_constant__ TileArguments arguments) {
  using Stored = typename Math::Stored;
  const SoftEmbedding& problem = arguments.problem;
  const int rank = padded(static_cast<int>(problem.rank)), width = padded(static_cast<int>(problem.width));
  Pairs<Math, kDepth, kColumns, false, true> pairs;
  pairs.read_statistics(problem);
  Means<float> means[2] = {};
  for_each_tile<Stored, kDepth, kColumns, false>(
      arguments, [&](const Operands<Stored>& at, int64_t /*first*/, int count) {
        pairs.make(at, count, rank, width, true);
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i) {
          for (int j = 0; j < 4; ++j) {
            means[j / 2].add_item(pairs.p[i][j], pairs.u[i][j], pairs.w[i][j], pairs.s[i][j]);
          }
        }
      });
  for (int i = 0; i < 2; ++i) {
    for (int mask = 1; mask < 4; mask *= 2) means[i].add(means[i].of_lane(mask));
    const int64_t row = first_of_warp() + fragment_row() + 8 * i;
    if (row < problem.rows && fragment_column() == 0) {
      means[i].write(of_split<float>(problem.means, problem.rows, Means<float>::kCount), row);
    }
  }
}

// Towards queries: Σ_item a key, or Σ_item (b key + a γkey); towards keys the same over rows.
// Towards grad_embedding: Σ_item (c value + p γvalue). Towards values: Σ_row p dX, or Σ_row c dX.
// a = p (w - D + dℓ), c = p (u - ū), b = c (w - D + dℓ) - p (offset - s).
template <typename Math, int kDepth, int kColumns, bool kOwnItems, bool kSecond>
__global__ void __launch_bounds__(kWarp* kMostWarps)
    sum_tiles(const __grid_constant__ TileArguments arguments) {
  using Stored = typename Math::Stored;
  constexpr bool kTwoSums = kOwnItems || kSecond;
  const SoftEmbedding& problem = arguments.problem;
  const int rank = padded(static_cast<int>(problem.rank)), width = padded(static_cast<int>(problem.width));
  void* const towards_rank = kOwnItems ? problem.grad_keys : problem.row_sums;
  void* const towards_width = kOwnItems ? problem.grad_values : problem.grad_sums;
  const float one[2] = {1, 1};
  Eight rank_sums[kDepth / 8] = {}, width_sums[kTwoSums ? kDepth / 8 : 1] = {};
  Pairs<Math, kDepth, kColumns, kOwnItems, kSecond> pairs;
  pairs.read_statistics(problem);
  for_each_tile<Stored, kDepth, kColumns, kOwnItems>(
      arguments, [&](const Operands<Stored>& at, int64_t /*first*/, int count) {
        pairs.make(at, count, rank, width, towards_rank != nullptr);
        auto &p = pairs.p, &a = pairs.w;
        auto &c = pairs.u, &b = pairs.s;
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i) {
          for (int j = 0; j < 4; ++j) {
            const auto statistic = [&](Statistic which) { return pairs.statistic(at, which, i, j); };
            // shift + D is the upstream gradient of the logsumexp, which goes with w - D.
            const float weight = a[i][j] + (statistic(kShift) + statistic(kInner));
            a[i][j] = p[i][j] * weight;
            if constexpr (kSecond) {
              const float centred = c[i][j] - statistic(kUMean);
              b[i][j] = p[i][j] * (weight * centred - statistic(kOffset) + b[i][j]);
              c[i][j] = p[i][j] * centred;
            }
          }
        }
        const auto add = [&](Eight(&sums)[kDepth / 8], const Eight(&coefficients)[kColumns / 8],
                             const Stored* tile, int columns) {
          const Coefficients<Math, kColumns> left(coefficients);
          add_weighted<Math, kDepth, kColumns>(sums, one, left, tile, columns);
        };
        const Stored* key_side = kOwnItems ? at.rows[kQueries] : at.items[kKeys];
        const Stored* second_key_side = kOwnItems ? at.rows[kGradGradQueries] : at.items[kGradGradKeys];
        if (towards_rank != nullptr) {
          if constexpr (kSecond) {
            add(rank_sums, b, key_side, rank);
            if (second_key_side != nullptr) add(rank_sums, a, second_key_side, rank);
          } else {
            add(rank_sums, a, key_side, rank);
          }
        }
        if constexpr (kTwoSums) {
          if (towards_width != nullptr) {
            const Stored* value_side = kOwnItems ? at.rows[kGradEmbedding] : at.items[kValues];
            if constexpr (kSecond) {
              add(width_sums, c, value_side, width);
            } else {
              add(width_sums, p, value_side, width);
            }
            if (!kOwnItems && at.items[kGradGradValues] != nullptr) {
              add(width_sums, p, at.items[kGradGradValues], width);
            }
          }
        }
      });
  const int64_t owners = kOwnItems ? problem.items : problem.rows;
  if (towards_rank != nullptr) {
    write_sums<kDepth>(of_split<float>(towards_rank, owners, problem.rank), rank_sums, first_of_warp(),
                       owners, static_cast<int>(problem.rank));
  }
  if constexpr (kTwoSums) {
    if (towards_width != nullptr) {
      write_sums<kDepth>(of_split<float>(towards_width, owners, problem.width), width_sums, first_of_warp(),
                         owners, static_cast<int>(problem.width));
    }
  }
}

inline Matrix matrix_of(const void* data, Element element, int64_t columns) {
  const int64_t row = columns * (element == Element::kFloat32 ? 4 : 2);
  const auto address = reinterpret_cast<uintptr_t>(data);
  const int copy_bytes = row % 16 == 0 && address % 16 == 0 ? 16 : row % 4 == 0 && address % 4 == 0 ? 4 : 2;
  return {columns > 0 ? data : nullptr, element, static_cast<int>(columns), copy_bytes};
}

// Launches with as many warps as the block has owners for and shared memory allows.
template <typename Stored, int kDepth, int kColumns, bool kOwnItems>
const char* launch_tiles(void (*kernel)(TileArguments), const SoftEmbedding& problem, void* stream) {
  constexpr int kPitch = Tile<Stored, kDepth>::kPitch;
  TileArguments arguments{};
  arguments.problem = problem;
  const Element of_rows = sizeof(Stored) == 4 ? Element::kFloat32 : problem.table;
  arguments.rows[kQueries] = matrix_of(problem.queries, of_rows, problem.rank);
  arguments.rows[kGradEmbedding] = matrix_of(problem.grad_embedding, of_rows, problem.width);
  arguments.rows[kGradGradQueries] = matrix_of(problem.grad_grad_queries, of_rows, problem.rank);
  arguments.items[kKeys] = matrix_of(problem.keys, problem.table, problem.rank);
  arguments.items[kValues] = matrix_of(problem.values, problem.table, problem.width);
  arguments.items[kGradGradKeys] = matrix_of(problem.grad_grad_keys, problem.table, problem.rank);
  arguments.items[kGradGradValues] = matrix_of(problem.grad_grad_values, problem.table, problem.width);
  const int64_t owners = kOwnItems ? problem.items : problem.rows;
  const int64_t others = kOwnItems ? problem.rows : problem.items;
  const int64_t split = kOwnItems ? problem.split_rows : problem.split_items;
  const int row_tiles = loaded(arguments.rows), item_tiles = loaded(arguments.items);
  const int64_t row_bytes = kPitch * static_cast<int64_t>(sizeof(Stored));
  const int64_t own_bytes = 16 * row_bytes * (kOwnItems ? item_tiles : row_tiles);
  const int64_t stage_bytes = kColumns * row_bytes * (kOwnItems ? row_tiles : item_tiles) +
                              kStatisticsSize<kOwnItems, kColumns> * static_cast<int64_t>(sizeof(float));
  const int64_t limit = shared_memory_limit();
  // Large blocks read the streamed side less often; where there is little of it, small ones overlap better.
  int64_t warps = owners > 64 && others > 256 ? kMostWarps : kMostWarps / 2;
  while (warps > 1 && warps * own_bytes + 2 * stage_bytes > limit) --warps;
  // A third stage where it leaves room for another block.
  arguments.stages = warps * own_bytes + 3 * stage_bytes <= limit / 2 ? 3 : 2;
  const int64_t bytes = warps * own_bytes + arguments.stages * stage_bytes;
  const dim3 grid(static_cast<unsigned>((owners + warps * 16 - 1) / (warps * 16)),
                  static_cast<unsigned>((others + split - 1) / split));
  return launch(kernel, grid, static_cast<int>(warps) * kWarp, bytes, stream, arguments);
}

template <typename Math, int kDepth>
const char* launch_pass(Pass pass, const SoftEmbedding& problem, void* stream) {
  using Stored = typename Math::Stored;
  // What fits into the registers beside the sums.
  constexpr int kWide = kDepth == 64 ? 64 : 32, kMiddle = 32, kNarrow = kDepth == 64 ? 32 : 16;
  switch (pass) {
    case Pass::kForward:
      return launch_tiles<Stored, kDepth, kWide, false>(forward_tiles<Math, kDepth, kWide>, problem, stream);
    case Pass::kRowMeans:
      return launch_tiles<Stored, kDepth, kMiddle, false>(row_means_tiles<Math, kDepth, kMiddle>, problem,
                                                          stream);
    case Pass::kSumOverItems:
      return launch_tiles<Stored, kDepth, kMiddle, false>(sum_tiles<Math, kDepth, kMiddle, false, false>,
                                                          problem, stream);
    case Pass::kSumOverRows:
      return launch_tiles<Stored, kDepth, kMiddle, true>(sum_tiles<Math, kDepth, kMiddle, true, false>,
                                                         problem, stream);
    case Pass::kSecondSumOverItems:
      return launch_tiles<Stored, kDepth, kNarrow, false>(sum_tiles<Math, kDepth, kNarrow, false, true>,
                                                          problem, stream);
    case Pass::kSecondSumOverRows:
      return launch_tiles<Stored, kDepth, kNarrow, true>(sum_tiles<Math, kDepth, kNarrow, true, true>,
                                                         problem, stream);
  }
  return "unknown pass";
}

template <typename Math>
const char* launch_pass(Pass pass, const SoftEmbedding& problem, void* stream) {
  const bool narrow = problem.rank <= 64 && problem.width <= 64;
  return narrow ? launch_pass<Math, 64>(pass, problem, stream)
                : launch_pass<Math, kTileWidth>(pass, problem, stream);
}

}  // namespace td3_fast::cuda
