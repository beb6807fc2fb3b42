// Table elements and inner products that the .cu files share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace td3_fast::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T, typename Stored>
__device__ inline T load(const Stored* from) {
  return static_cast<T>(*from);
}
template <>
__device__ inline float load<float, __half>(const __half* from) {
  return __half2float(*from);
}
template <>
__device__ inline float load<float, __nv_bfloat16>(const __nv_bfloat16* from) {
  return __bfloat162float(*from);
}

__device__ inline float fused_multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ inline double fused_multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}

// In the order of the columns, so that equal items give equal bits.
template <typename T, typename Stored>
__device__ T inner_product(const T* row, const Stored* item, int64_t depth) {
  T sum = 0;
  for (int64_t k = 0; k < depth; ++k) sum = fused_multiply_add(row[k], load<T>(item + k), sum);
  return sum;
}

// run(accumulate type, stored type) for the element type of a table.
template <typename Run>
void with_element(Element element, const Run& run) {
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
}

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace td3_fast::cuda
