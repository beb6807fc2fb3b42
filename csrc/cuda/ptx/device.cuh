// What the kernels ask of the hardware and of the CUDA runtime. The tests compile the same kernels for the
// host with another header of this name (tests/simt), so nothing else in csrc/cuda names an intrinsic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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
// Relative error up to 2^-21 and an ulp for each unit of |x|: enough where the sum is dominated by x near 0.
__device__ inline float fast_exponential(float x) {
  return __expf(x);
}
__device__ inline float logarithm(float x) {
  return logf(x);
}
__device__ inline double logarithm(double x) {
  return log(x);
}
__device__ inline float square_root(float x) {
  return __fsqrt_rn(x);
}
__device__ inline double square_root(double x) {
  return __dsqrt_rn(x);
}
__device__ inline float error_function(float x) {
  return erff(x);
}
__device__ inline double error_function(double x) {
  return erf(x);
}
__device__ inline uint32_t bits_of(float value) {
  return __float_as_uint(value);
}
__device__ inline float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}
// To the nearest of 10 bits of mantissa.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
// Two elements in a word, the first in its lower half.
template <typename Half>
__device__ uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
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

// Copies kBytes (4 or 16) to shared memory once waited for; what is beyond the first `valid` bytes becomes
// zero.
template <int kBytes>
__device__ void copy_async(void* to, const void* from, int valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(valid)
                 : "memory");
  }
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for this thread's committed groups but the `newer` last ones.
__device__ inline void wait_copies(int newer) {
  if (newer == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  }
}

// Four matrices of 8 rows of 16 bytes; lane i names row i % 8 of matrix i / 8, and gets of each matrix the
// word i % 4 of row i / 4; transposed, as matrices of 2-byte elements: rows 2 (i % 4) and the next, column i
// / 4.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// c (16, 8) += a (16, depth) b (depth, 8) across a warp, depth 8 for floats (of which tf32 is read) and 16
// for halves, in the fragment layouts of mma.sync.
template <typename Stored>
__device__ void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(Stored) == 4) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<Stored, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
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
