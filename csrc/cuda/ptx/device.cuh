// What the kernels ask of the hardware and of the CUDA runtime. The tests compile the same kernels for the
// host with another header of this name (tests/simt), so nothing else in csrc/cuda names an intrinsic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace td3_fast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(__half value) {
  return __half2float(value);
}
__device__ inline float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

__device__ inline float fused_multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ inline double fused_multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}
__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline double exponential(double x) {
  return exp(x);
}

__device__ inline void block_barrier() {
  __syncthreads();
}
__device__ inline void warp_barrier() {
  __syncwarp();
}
template <typename T>
__device__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <typename T>
__device__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
__device__ inline unsigned ballot(bool vote) {
  return __ballot_sync(kAllLanes, vote);
}
__device__ inline int first_set(unsigned bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}
// Whole numbers only: their sum does not depend on the order.
__device__ inline void atomic_add(int64_t* to, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
__device__ inline void trap() {
  __trap();
}

// The block's dynamic shared memory.
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// The most dynamic shared memory that a block of the current device can have.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Null, or what CUDA says went wrong. `stream` is a cudaStream_t.
template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...),
                   dim3 grid,
                   int threads,
                   int64_t shared_bytes,
                   void* stream,
                   const Parameters&... parameters) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // more than a kernel gets unasked
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<grid, threads, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)>>>(
        parameters...);
  }
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace td3_fast::cuda
