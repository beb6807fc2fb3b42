// Table elements and inner products that the .cu files share.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace td3_fast::cuda {

constexpr int kWarp = 32;

template <typename T, typename Stored>
__device__ inline T load(const Stored* from) {
  if constexpr (sizeof(Stored) == 2) {
    return to_float(*from);
  } else {
    return *from;
  }
}

// In the order of the columns, so that equal items give equal bits.
template <typename T, typename Stored>
__device__ T inner_product(const T* row, const Stored* item, int64_t depth) {
  T sum = 0;
  for (int64_t k = 0; k < depth; ++k) sum = fused_multiply_add(row[k], load<T>(item + k), sum);
  return sum;
}

template <typename T>
__device__ T minus_infinity() {
  return -static_cast<T>(INFINITY);
}

template <typename T>
__device__ T warp_sum(T value) {
  for (int half = kWarp / 2; half > 0; half /= 2) value += shuffle_xor(value, half);
  return value;
}

template <typename T>
__device__ T warp_max(T value) {
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const T other = shuffle_xor(value, half);
    value = other > value ? other : value;
  }
  return value;
}

// run(accumulate type, stored type) for the element type of a table.
template <typename Run>
const char* with_element(Element element, const Run& run) {
  switch (element) {
    case Element::kFloat32:
      return run(float{}, float{});
    case Element::kFloat64:
      return run(double{}, double{});
    case Element::kFloat16:
      return run(float{}, __half{});
    case Element::kBFloat16:
      return run(float{}, __nv_bfloat16{});
  }
  return "unknown element type";
}

}  // namespace td3_fast::cuda
