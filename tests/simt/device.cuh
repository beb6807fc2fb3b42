// csrc/cuda/ptx/device.cuh for the host: the same names, carried out by simt.cpp one CUDA thread after
// another.
//
// Each thread of a block is a fiber that runs until it has to wait for others, so threads are as far apart as
// the barriers allow. What a missing barrier or wait would leave to chance is made to fail: shared memory
// starts as NaN, a copy arrives no sooner than it is waited for (its destination is NaN until then), and
// lanes of a warp that meet in different operations, or threads that wait for one that has left, end the
// launch.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;

namespace simt {

inline dim3 block_index, thread_index, block_size, grid_size;

// Waits until every lane of the warp is here with the same `name`; then `run` sees all operands, once.
void collective(const char* name, void* operand, void (*run)(void* const* operands));
void block_barrier();
[[noreturn]] void fail(const char* what);
unsigned char* shared_memory();
void copy_async(void* to, const void* from, int bytes, int valid);
void commit_copies();
void wait_copies(int newer);
const char* run_grid(dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

inline int lane() {
  return static_cast<int>(thread_index.x % 32);
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size

namespace td3_fast::cuda {

inline float to_float(__half value) {
  return value;
}
inline float to_float(__nv_bfloat16 value) {
  return value;
}

inline float fused_multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double fused_multiply_add(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline float exponential(float x) {
  return std::exp(x);
}
inline double exponential(double x) {
  return std::exp(x);
}

inline void block_barrier() {
  simt::block_barrier();
}
inline void warp_barrier() {
  simt::collective("warp barrier", nullptr, [](void* const*) {});
}

template <typename T>
struct Exchange {
  T value;
  int from;
  T received;
};

template <typename T>
T exchange(const char* name, T value, int from) {
  Exchange<T> mine{value, from, value};
  simt::collective(name, &mine, [](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* own = static_cast<Exchange<T>*>(lanes[lane]);
      own->received = static_cast<Exchange<T>*>(lanes[own->from])->value;
    }
  });
  return mine.received;
}
template <typename T>
T shuffle(T value, int lane) {
  return exchange("shuffle", value, lane);
}
template <typename T>
T shuffle_xor(T value, int mask) {
  return exchange("shuffle_xor", value, simt::lane() ^ mask);
}

inline unsigned ballot(bool vote) {
  unsigned bits = vote;
  simt::collective("ballot", &bits, [](void* const* lanes) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= *static_cast<unsigned*>(lanes[lane]) << lane;
    for (int lane = 0; lane < 32; ++lane) *static_cast<unsigned*>(lanes[lane]) = all;
  });
  return bits;
}
inline int first_set(unsigned bits) {
  return __builtin_ffs(static_cast<int>(bits)) - 1;
}
inline void atomic_add(int64_t* to, int64_t value) {
  *to += value;
}
inline void trap() {
  simt::fail("trap");
}

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(simt::shared_memory());
}

// That of compute capability 8.0, the smallest that is built for.
inline int64_t shared_memory_limit() {
  return 163 * 1024;
}

template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...),
                   dim3 grid,
                   int threads,
                   int64_t shared_bytes,
                   void* /*stream*/,
                   const Parameters&... parameters) {
  return simt::run_grid(grid, threads, shared_bytes, [&] { kernel(parameters...); });
}

}  // namespace td3_fast::cuda
