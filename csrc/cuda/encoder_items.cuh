// The loss of the encoder's outputs against all items: see encoder.cuh.
#pragma once

#include "encoder.cuh"

namespace td3_fast::cuda {

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::compare_with_items() {
  const N* const outputs = outputs_of(layers() - 1);
  const T share = T(1) / static_cast<T>(p_.batch * asked_);
  const int n = static_cast<int>(p_.num_items);
#pragma unroll 1
  for (int r = 0; r < asked_; r += kRowsAtOnce) score_items(r, outputs);
  block_barrier();
#pragma unroll 1
  for (int r = 0; r < asked_; ++r) {
    const T peak = peak_of(r);
    N mass{};
    tasks(n, [&](int item) {
      N& logit = logits_[int64_t{r} * n + item];
      logit = exponential(minus(logit, peak));
      mass = mass + logit;
    });
    mass = warp_sum(mass);
    if (lane_ == 0) masses_[r * kMostWarps + warp_] = mass;
  }
  block_barrier();
#pragma unroll 1
  for (int r = 0; r < asked_; r += kRowsAtOnce) average_items(r);
  block_barrier();
  grid(asked_, by_width_, [&](int r, int f) {
    const N mean = grad_[r * stride() + f] * inverse(mass_of(r));
    grad_[r * stride() + f] = (mean - input(at_[r] + 1, f)) * share;
  });
  if (!kTangents && warp_ == 0) {
#pragma unroll 1
    for (int r = 0; r < asked_; ++r) {
      T score = 0;
      for (int f = lane_; f < d(); f += kWarp) {
        score += value_of(outputs[r * stride() + f]) * value_of(input(at_[r] + 1, f));
      }
      loss_ += (peak_of(r) + logarithm(value_of(mass_of(r))) - warp_sum(score)) * share;
    }
  }
  block_barrier();
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::score_items(int first,
                                                                           const N* outputs) const {
  constexpr int kItems = 4;
  const T* const items = static_cast<const T*>(p_.items);
  const int n = static_cast<int>(p_.num_items);
  T peaks[kRowsAtOnce];
  for (int r = 0; r < kRowsAtOnce; ++r) peaks[r] = minus_infinity<T>();
#pragma unroll 1
  for (int item = thread_; item < n; item += kItems * threads_) {
    N sums[kItems][kRowsAtOnce]{};
    int at[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) at[i] = item + i * threads_ < n ? item + i * threads_ : item;
#pragma unroll 8
    for (int f = 0; f < d(); ++f) {
      const T* const column = items + int64_t{f} * n;
      T e[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) e[i] = column[at[i]];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const N h = outputs[row_within(first + r) * stride() + f];
#pragma unroll
        for (int i = 0; i < kItems; ++i) sums[i][r] = multiply_add(h, e[i], sums[i][r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (first + r >= asked_) continue;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        logits_[int64_t{first + r} * n + at[i]] = sums[i][r];
        peaks[r] = value_of(sums[i][r]) > peaks[r] ? value_of(sums[i][r]) : peaks[r];
      }
    }
  }
  for (int r = 0; r < kRowsAtOnce; ++r) {
    const T peak = warp_max(peaks[r]);
    if (lane_ == 0 && first + r < asked_) peaks_[(first + r) * kMostWarps + warp_] = peak;
  }
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::average_items(int first) const {
  constexpr int kColumns = 2;
  const T* const items = static_cast<const T*>(p_.items);
  const int n = static_cast<int>(p_.num_items);
#pragma unroll 1
  for (int column = warp_; column < d(); column += kColumns * warps_) {
    N sums[kColumns][kRowsAtOnce]{};
    int at[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) at[i] = column + i * warps_ < d() ? column + i * warps_ : column;
#pragma unroll 8
    for (int item = lane_; item < n; item += kWarp) {
      N weights[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) weights[r] = logits_[int64_t{row_within(first + r)} * n + item];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const T e = items[int64_t{at[i]} * n + item];
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) sums[i][r] = multiply_add(weights[r], e, sums[i][r]);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const N sum = warp_sum(sums[i][r]);
        if (lane_ == 0 && first + r < asked_) grad_[(first + r) * stride() + at[i]] = sum;
      }
    }
  }
}

}  // namespace td3_fast::cuda
