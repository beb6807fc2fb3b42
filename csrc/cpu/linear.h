// Products of a weight matrix, or its transpose, with vectors whose numbers have a lane per sequence.
//
// For files that are built once per instruction set; see vectors.h.
#pragma once

#include "lanes.h"
#include "numbers.h"

namespace td3_fast::cpu {
namespace {

// Sums that are held in registers while a product runs.
template <typename T, bool kTangents>
constexpr int kSums = kVectorBytes == 64 && !kTangents ? 8 : 4;

// y[i] = start(i) + sum_j w[i, j] x[j], w (out, in).
template <typename T, bool kTangents, typename Start>
void linear(const Weights<T, kTangents>& w,
            int64_t out,
            int64_t in,
            const typename Weights<T, kTangents>::N* x,
            typename Weights<T, kTangents>::N* y,
            const Start& start) {
  using N = typename Weights<T, kTangents>::N;
  constexpr int kBlock = kSums<T, kTangents>;
  int64_t i = 0;
  for (; i + kBlock <= out; i += kBlock) {
    N sum[kBlock];
    for (int b = 0; b < kBlock; ++b) sum[b] = start(i + b);
    for (int64_t j = 0; j < in; ++j) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlock; ++b) w.add(sum + b, (i + b) * in + j, x[j]);
    }
    for (int b = 0; b < kBlock; ++b) y[i + b] = sum[b];
  }
  for (; i < out; ++i) {
    N sum = start(i);
    for (int64_t j = 0; j < in; ++j) w.add(&sum, i * in + j, x[j]);
    y[i] = sum;
  }
}

// y[j] = start(j) + sum_i w[i, j] x[i], w (out, in).
template <typename T, bool kTangents, typename Start>
void linear_transposed(const Weights<T, kTangents>& w,
                       int64_t out,
                       int64_t in,
                       const typename Weights<T, kTangents>::N* x,
                       typename Weights<T, kTangents>::N* y,
                       const Start& start) {
  using N = typename Weights<T, kTangents>::N;
  constexpr int kBlock = kSums<T, kTangents>;
  int64_t j = 0;
  for (; j + kBlock <= in; j += kBlock) {
    N sum[kBlock];
    for (int b = 0; b < kBlock; ++b) sum[b] = start(j + b);
    for (int64_t i = 0; i < out; ++i) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlock; ++b) w.add(sum + b, i * in + j + b, x[i]);
    }
    for (int b = 0; b < kBlock; ++b) y[j + b] = sum[b];
  }
  for (; j < in; ++j) {
    N sum = start(j);
    for (int64_t i = 0; i < out; ++i) w.add(&sum, i * in + j, x[i]);
    y[j] = sum;
  }
}

}  // namespace
}  // namespace td3_fast::cpu
