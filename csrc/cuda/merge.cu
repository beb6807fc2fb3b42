// What the splits of a pass left, put together in the order of the splits: a thread for each result.

#include "elements.cuh"
#include "means.cuh"

namespace td3_fast::cuda {
namespace {

constexpr int kThreads = 256;

__device__ int64_t this_thread() {
  return int64_t{blockIdx.x} * kThreads + threadIdx.x;
}

// A thread for each row and column; that of column 0, which is there where the width is 0, also has the row.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_forward_kernel(Merge merge) {
  const int64_t columns = merge.width > 0 ? merge.width : 1;
  const int64_t row = this_thread() / columns, column = this_thread() % columns;
  if (row >= merge.rows) return;
  const T* maxima = static_cast<const T*>(merge.maxima);
  const T* sums = static_cast<const T*>(merge.sums);
  const T* weighted = static_cast<const T*>(merge.weighted);
  T peak = minus_infinity<T>();
  for (int64_t split = 0; split < merge.splits; ++split) {
    const T maximum = maxima[split * merge.rows + row];
    peak = maximum > peak ? maximum : peak;
  }
  T total = 0, sum = 0;
  for (int64_t split = 0; split < merge.splits; ++split) {
    const int64_t at = split * merge.rows + row;
    const T factor = exponential(maxima[at] - peak);
    total += sums[at] * factor;
    if (merge.width > 0) sum += weighted[at * merge.width + column] * factor;
  }
  if (merge.width > 0) static_cast<T*>(merge.embedding)[row * merge.width + column] = sum / total;
  if (column == 0) {
    const double exact = static_cast<double>(peak) + logarithm(static_cast<double>(total));
    // what a score differs from an infinite one is no number
    const bool infinite = peak == minus_infinity<T>() || peak == -minus_infinity<T>();
    const T rounded = infinite ? peak : static_cast<T>(exact);
    static_cast<T*>(merge.logsumexp)[row] = rounded;
    static_cast<T*>(merge.remainder)[row] =
        infinite ? T(0) : static_cast<T>(exact - static_cast<double>(rounded));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_means_kernel(Merge merge) {
  const int64_t row = this_thread();
  if (row >= merge.rows) return;
  Means<T> all{};
  for (int64_t split = 0; split < merge.splits; ++split) {
    all.add(Means<T>::read(static_cast<const T*>(merge.means), split * merge.rows + row));
  }
  const T from_centre = all.u / all.mass;
  static_cast<T*>(merge.u_mean)[row] = all.centre + from_centre;
  static_cast<T*>(merge.offset)[row] = all.wu - from_centre * all.w + all.s;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_sums_kernel(Merge merge) {
  const int64_t size = merge.rows * merge.width, at = this_thread();
  if (at >= size) return;
  T sum = 0;
  for (int64_t split = 0; split < merge.splits; ++split) {
    sum += static_cast<const T*>(merge.weighted)[split * size + at];
  }
  static_cast<T*>(merge.embedding)[at] = sum;
}

const char* launch_threads(
    void (*of_float)(Merge), void (*of_double)(Merge), const Merge& merge, int64_t threads, void* stream) {
  if (threads == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  return launch(merge.float64 ? of_double : of_float, grid, kThreads, 0, stream, merge);
}

}  // namespace

const char* merge_forward(const Merge& merge, void* stream) {
  const int64_t columns = merge.width > 0 ? merge.width : 1;
  return launch_threads(merge_forward_kernel<float>, merge_forward_kernel<double>, merge,
                        merge.rows * columns, stream);
}

const char* merge_means(const Merge& merge, void* stream) {
  return launch_threads(merge_means_kernel<float>, merge_means_kernel<double>, merge, merge.rows, stream);
}

const char* merge_sums(const Merge& merge, void* stream) {
  return launch_threads(merge_sums_kernel<float>, merge_sums_kernel<double>, merge, merge.rows * merge.width,
                        stream);
}

}  // namespace td3_fast::cuda
