// How a block's threads share out work that is counted: among all of them, groups of eight lanes, or warps.
#pragma once

#include "numbers.cuh"

namespace td3_fast::cuda {

class BlockThreads {
 protected:
  // Tasks of a grid with so many columns, from this thread's first one on.
  struct Columns {
    int count, row, column, row_step, column_step;
  };

  __device__ void take_place(int thread, int threads) {
    thread_ = thread, threads_ = threads;
    lane_ = thread % kWarp, warp_ = thread / kWarp, warps_ = threads / kWarp;
  }

  // run(i) for each i below count.
  template <typename Run>
  __device__ void tasks(int count, const Run& run) const {
#pragma unroll 1
    for (int i = thread_; i < count; i += threads_) run(i);
  }
  // store(i, load(i)) for each i below count, with loads that do not wait for one another.
  template <typename Load, typename Store>
  __device__ void in_batches(int count, const Load& load, const Store& store) const {
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int first = thread_; first < count; first += kAtOnce * threads_) {
      decltype(load(0)) loaded[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * threads_;
        if (at < count) loaded[i] = load(at);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * threads_;
        if (at < count) store(at, loaded[i]);
      }
    }
  }
  // run(row, column) for each of (rows, columns).
  template <typename Run>
  __device__ void grid(int rows, const Columns& columns, const Run& run) const {
    int row = columns.row, column = columns.column;
#pragma unroll 1
    while (row < rows) {
      run(row, column);
      row += columns.row_step, column += columns.column_step;
      if (column >= columns.count) row += 1, column -= columns.count;
    }
  }
  __device__ Columns columns(int count) const {
    return {count, thread_ / count, thread_ % count, threads_ / count, threads_ % count};
  }

  // Groups of lanes work on one number or row each, so that few of them keep all threads busy.
  static constexpr int kGroup = 8, kGroups = kWarp / kGroup;  // lanes of a group, groups of a warp
  __device__ int part() const { return lane_ % kGroup; }
  template <typename X>
  __device__ static X group_sum(X x) {
    for (int mask = kGroup / 2; mask > 0; mask /= 2) x = x + lane_apart(x, mask);
    return x;
  }
  // run(i, active) by a group for each i below count; a group that has nothing to do repeats the last,
  // inactive.
  template <typename Run>
  __device__ void by_group(int count, const Run& run) const {
#pragma unroll 1
    for (int first = warp_ * kGroups; first < count; first += warps_ * kGroups) {
      const int own = first + lane_ / kGroup;
      run(own < count ? own : count - 1, own < count);
    }
  }
  // A lane's share of `count` numbers: from, ..., to - 1.
  struct Share {
    int from, to;
  };
  __device__ Share share_of(int count) const {
    const int each = (count + kGroup - 1) / kGroup, from = part() * each;
    if (count % kGroup == 0) return {from, from + each};
    return {from, from + each < count ? from + each : count};
  }

  int thread_ = 0, threads_ = 0, lane_ = 0, warp_ = 0, warps_ = 0;

 private:
  template <typename T>
  __device__ static T lane_apart(T x, int mask) {
    return shuffle_xor(x, mask);
  }
  template <typename T>
  __device__ static Dual<T> lane_apart(Dual<T> x, int mask) {
    return {shuffle_xor(x.v, mask), shuffle_xor(x.t, mask)};
  }
};

}  // namespace td3_fast::cuda
