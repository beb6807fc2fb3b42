// The passes of soft embedding and item logsumexp for float64 and for widths beyond those of tiles; formulas
// and symbols: ops/README.md.
//
// A warp owns one row and walks over items 32 at a time (forward, row means, sums over items), or owns one
// item and walks over rows 32 at a time (sums over rows): lanes make the coefficients of 32 pairs, and then
// take columns of the sums, kept in shared memory. Items are split over blocks; the splits are merged in
// order by the caller. No atomics: same input, same bits. Sums are in the accumulate type. Simple, not fast:
// tables are read through cache.

#include "elements.cuh"
#include "means.cuh"

namespace td3_fast::cuda {
namespace {

constexpr int kWarps = 8;

struct Range {
  int64_t begin, end;
};

__device__ Range split_of(int64_t size, int64_t count) {
  const int64_t begin = blockIdx.y * size, end = begin + size;
  return {begin, end < count ? end : count};
}

template <typename T, typename Stored>
__global__ void __launch_bounds__(kWarp* kWarps) forward_kernel(SoftEmbedding problem) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp, width = problem.width;
  if (row >= problem.rows) return;
  T* p = shared_memory<T>() + warp * (kWarp + width);
  T* sum = p + kWarp;
  for (int64_t column = lane; column < width; column += kWarp) sum[column] = 0;
  const T* query = static_cast<const T*>(problem.queries) + row * problem.rank;
  const Stored* keys = static_cast<const Stored*>(problem.keys);
  const Stored* values = static_cast<const Stored*>(problem.values);
  T maximum = minus_infinity<T>(), total = 0;
  const Range range = split_of(problem.split_items, problem.items);
  for (int64_t begin = range.begin; begin < range.end; begin += kWarp) {
    const int64_t item = begin + lane;
    const bool inside = item < range.end;
    const T score =
        inside ? inner_product(query, keys + item * problem.rank, problem.rank) : minus_infinity<T>();
    const T tile_maximum = warp_max(score);
    const T peak = tile_maximum > maximum ? tile_maximum : maximum;
    const T factor = exponential(maximum - peak);
    const T weight = inside ? exponential(score - peak) : T(0);
    total = total * factor + warp_sum(weight);
    maximum = peak;
    p[lane] = weight;
    warp_barrier();
    const int count = static_cast<int>(range.end - begin < kWarp ? range.end - begin : kWarp);
    for (int64_t column = lane; column < width; column += kWarp) {
      T added = 0;
      for (int i = 0; i < count; ++i) added += p[i] * load<T>(values + (begin + i) * width + column);
      sum[column] = sum[column] * factor + added;
    }
    warp_barrier();
  }
  const int64_t at = int64_t{blockIdx.y} * problem.rows + row;
  if (lane == 0) {
    static_cast<T*>(problem.maxima)[at] = maximum;
    static_cast<T*>(problem.sums)[at] = total;
  }
  for (int64_t column = lane; column < width; column += kWarp) {
    static_cast<T*>(problem.weighted)[at * width + column] = sum[column];
  }
}

template <typename T>
struct Pair {
  T p, w, u, s;  // w is w - D
};

// p, w - D, u and s of one row and one item.
template <typename T, typename Stored, bool kSecondOrder>
__device__ Pair<T> pair_of(const SoftEmbedding& problem, int64_t row, int64_t item) {
  const int64_t rank = problem.rank, width = problem.width;
  const T* query = static_cast<const T*>(problem.queries) + row * rank;
  const T* grad = static_cast<const T*>(problem.grad_embedding);
  const Stored* key = static_cast<const Stored*>(problem.keys) + item * rank;
  const auto statistic = [row](const void* of) { return static_cast<const T*>(of)[row]; };
  Pair<T> pair{};
  pair.p = exp(inner_product(query, key, rank) - statistic(problem.logsumexp) - statistic(problem.remainder));
  if (grad != nullptr) {
    const Stored* value = static_cast<const Stored*>(problem.values) + item * width;
    pair.w = inner_product(grad + row * width, value, width) - statistic(problem.inner);
  }
  if constexpr (kSecondOrder) {
    if (problem.grad_grad_queries != nullptr) {
      pair.u = inner_product(static_cast<const T*>(problem.grad_grad_queries) + row * rank, key, rank);
    }
    if (problem.grad_grad_keys != nullptr) {
      pair.u += inner_product(query, static_cast<const Stored*>(problem.grad_grad_keys) + item * rank, rank);
    }
    if (problem.grad_grad_values != nullptr) {
      pair.s = inner_product(grad + row * width,
                             static_cast<const Stored*>(problem.grad_grad_values) + item * width, width);
    }
  }
  return pair;
}

template <typename T>
struct Coefficients {
  T p, grad, b, centred;
};

template <typename T, typename Stored, bool kSecondOrder>
__device__ Coefficients<T> coefficients_of(const SoftEmbedding& problem, int64_t row, int64_t item) {
  const Pair<T> pair = pair_of<T, Stored, kSecondOrder>(problem, row, item);
  const auto statistic = [row](const void* of) { return static_cast<const T*>(of)[row]; };
  // shift + D is the upstream gradient of the logsumexp, which goes with w - D.
  const T weight = pair.w + (statistic(problem.shift) + statistic(problem.inner));
  Coefficients<T> result{pair.p, pair.p * weight, 0, 0};
  if constexpr (kSecondOrder) {
    const T centred = pair.u - statistic(problem.u_mean);
    result.b = pair.p * (weight * centred - statistic(problem.offset) + pair.s);
    result.centred = pair.p * centred;
  }
  return result;
}

template <typename T, typename Stored>
__global__ void __launch_bounds__(kWarp* kWarps) row_means_kernel(SoftEmbedding problem) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp;
  if (row >= problem.rows) return;
  const Range range = split_of(problem.split_items, problem.items);
  Means<T> means{};
  for (int64_t item = range.begin + lane; item < range.end; item += kWarp) {
    const Pair<T> pair = pair_of<T, Stored, true>(problem, row, item);
    means.add_item(pair.p, pair.u, pair.w, pair.s);
  }
  for (int mask = 1; mask < kWarp; mask *= 2) means.add(means.of_lane(mask));
  if (lane == 0) means.write(static_cast<T*>(problem.means), int64_t{blockIdx.y} * problem.rows + row);
}

// Towards queries: sum_item grad key, or sum_item (b key + grad grad_grad_key).
// Towards grad_embedding: sum_item (centred value + p grad_grad_value).
template <typename T, typename Stored, bool kSecondOrder>
__global__ void __launch_bounds__(kWarp* kWarps) sum_over_items_kernel(SoftEmbedding problem) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp, rank = problem.rank, width = problem.width;
  if (row >= problem.rows) return;
  auto* pairs = reinterpret_cast<Coefficients<T>*>(shared_memory<T>()) + warp * kWarp;
  T* sums = shared_memory<T>() + kWarps * kWarp * 4 + warp * (rank + width);
  for (int64_t column = lane; column < rank + width; column += kWarp) sums[column] = 0;
  warp_barrier();
  const Stored* keys = static_cast<const Stored*>(problem.keys);
  const Stored* values = static_cast<const Stored*>(problem.values);
  const Stored* grad_grad_keys = static_cast<const Stored*>(problem.grad_grad_keys);
  const Stored* grad_grad_values = static_cast<const Stored*>(problem.grad_grad_values);
  const Range range = split_of(problem.split_items, problem.items);
  for (int64_t begin = range.begin; begin < range.end; begin += kWarp) {
    const int count = static_cast<int>(range.end - begin < kWarp ? range.end - begin : kWarp);
    if (lane < count) pairs[lane] = coefficients_of<T, Stored, kSecondOrder>(problem, row, begin + lane);
    warp_barrier();
    for (int64_t column = lane; problem.row_sums != nullptr && column < rank; column += kWarp) {
      T added = 0;
      for (int i = 0; i < count; ++i) {
        const int64_t at = (begin + i) * rank + column;
        added += (kSecondOrder ? pairs[i].b : pairs[i].grad) * load<T>(keys + at);
        if (kSecondOrder && grad_grad_keys != nullptr) added += pairs[i].grad * load<T>(grad_grad_keys + at);
      }
      sums[column] += added;
    }
    for (int64_t column = lane; problem.grad_sums != nullptr && column < width; column += kWarp) {
      T added = 0;
      for (int i = 0; i < count; ++i) {
        const int64_t at = (begin + i) * width + column;
        added += pairs[i].centred * load<T>(values + at);
        if (grad_grad_values != nullptr) added += pairs[i].p * load<T>(grad_grad_values + at);
      }
      sums[rank + column] += added;
    }
    warp_barrier();
  }
  const int64_t at = int64_t{blockIdx.y} * problem.rows + row;
  for (int64_t column = lane; problem.row_sums != nullptr && column < rank; column += kWarp) {
    static_cast<T*>(problem.row_sums)[at * rank + column] = sums[column];
  }
  for (int64_t column = lane; problem.grad_sums != nullptr && column < width; column += kWarp) {
    static_cast<T*>(problem.grad_sums)[at * width + column] = sums[rank + column];
  }
}

// Towards keys: sum_row grad query, or sum_row (b query + grad grad_grad_query).
// Towards values: sum_row p grad_embedding, or sum_row centred grad_embedding.
template <typename T, typename Stored, bool kSecondOrder>
__global__ void __launch_bounds__(kWarp* kWarps) sum_over_rows_kernel(SoftEmbedding problem) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t item = int64_t{blockIdx.x} * kWarps + warp, rank = problem.rank, width = problem.width;
  if (item >= problem.items) return;
  auto* pairs = reinterpret_cast<Coefficients<T>*>(shared_memory<T>()) + warp * kWarp;
  T* sums = shared_memory<T>() + kWarps * kWarp * 4 + warp * (rank + width);
  for (int64_t column = lane; column < rank + width; column += kWarp) sums[column] = 0;
  warp_barrier();
  const T* queries = static_cast<const T*>(problem.queries);
  const T* grad_grad_queries = static_cast<const T*>(problem.grad_grad_queries);
  const T* grad_embedding = static_cast<const T*>(problem.grad_embedding);
  const Range range = split_of(problem.split_rows, problem.rows);
  for (int64_t begin = range.begin; begin < range.end; begin += kWarp) {
    const int count = static_cast<int>(range.end - begin < kWarp ? range.end - begin : kWarp);
    if (lane < count) pairs[lane] = coefficients_of<T, Stored, kSecondOrder>(problem, begin + lane, item);
    warp_barrier();
    for (int64_t column = lane; problem.grad_keys != nullptr && column < rank; column += kWarp) {
      T added = 0;
      for (int i = 0; i < count; ++i) {
        const int64_t at = (begin + i) * rank + column;
        added += (kSecondOrder ? pairs[i].b : pairs[i].grad) * queries[at];
        if (kSecondOrder && grad_grad_queries != nullptr) added += pairs[i].grad * grad_grad_queries[at];
      }
      sums[column] += added;
    }
    for (int64_t column = lane; problem.grad_values != nullptr && column < width; column += kWarp) {
      T added = 0;
      for (int i = 0; i < count; ++i) {
        added +=
            (kSecondOrder ? pairs[i].centred : pairs[i].p) * grad_embedding[(begin + i) * width + column];
      }
      sums[rank + column] += added;
    }
    warp_barrier();
  }
  const int64_t at = int64_t{blockIdx.y} * problem.items + item;
  for (int64_t column = lane; problem.grad_keys != nullptr && column < rank; column += kWarp) {
    static_cast<T*>(problem.grad_keys)[at * rank + column] = sums[column];
  }
  for (int64_t column = lane; problem.grad_values != nullptr && column < width; column += kWarp) {
    static_cast<T*>(problem.grad_values)[at * width + column] = sums[rank + column];
  }
}

// Launches a warp for each owner of a sum, and for each split of what it sums over.
template <typename T>
const char* launch_warps(void (*kernel)(SoftEmbedding),
                         const SoftEmbedding& problem,
                         bool own_items,
                         int64_t elements_per_warp,
                         void* stream) {
  const int64_t bytes = kWarps * elements_per_warp * static_cast<int64_t>(sizeof(T));
  if (bytes > shared_memory_limit()) return "rank and d are too large for the shared memory of a block";
  const int64_t owners = own_items ? problem.items : problem.rows;
  const int64_t others = own_items ? problem.rows : problem.items;
  const int64_t split = own_items ? problem.split_rows : problem.split_items;
  const dim3 grid(static_cast<unsigned>((owners + kWarps - 1) / kWarps),
                  static_cast<unsigned>((others + split - 1) / split));
  return launch(kernel, grid, kWarp * kWarps, bytes, stream, problem);
}

template <typename T, typename Stored>
const char* launch_pass(Pass pass, const SoftEmbedding& problem, void* stream) {
  const int64_t pairs_and_sums = 4 * kWarp + problem.rank + problem.width;
  switch (pass) {
    case Pass::kForward:
      return launch_warps<T>(forward_kernel<T, Stored>, problem, false, kWarp + problem.width, stream);
    case Pass::kRowMeans:
      return launch_warps<T>(row_means_kernel<T, Stored>, problem, false, 0, stream);
    case Pass::kSumOverItems:
      return launch_warps<T>(sum_over_items_kernel<T, Stored, false>, problem, false, pairs_and_sums, stream);
    case Pass::kSumOverRows:
      return launch_warps<T>(sum_over_rows_kernel<T, Stored, false>, problem, true, pairs_and_sums, stream);
    case Pass::kSecondSumOverItems:
      return launch_warps<T>(sum_over_items_kernel<T, Stored, true>, problem, false, pairs_and_sums, stream);
    case Pass::kSecondSumOverRows:
      return launch_warps<T>(sum_over_rows_kernel<T, Stored, true>, problem, true, pairs_and_sums, stream);
  }
  return "unknown pass";
}

}  // namespace

const char* warp_pass(Pass pass, const SoftEmbedding& problem, void* stream) {
  return with_element(problem.table, [&](auto zero, auto stored) {
    return launch_pass<decltype(zero), decltype(stored)>(pass, problem, stream);
  });
}

}  // namespace td3_fast::cuda
