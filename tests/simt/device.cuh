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

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
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
inline float fast_exponential(float x) {
  return std::exp(x);
}
inline double logarithm(double x) {
  return std::log(x);
}
inline float square_root(float x) {
  return std::sqrt(x);
}
inline double square_root(double x) {
  return std::sqrt(x);
}
inline uint32_t bits_of(float value) {
  return std::bit_cast<uint32_t>(value);
}
inline float float_of(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
inline uint32_t to_tf32(float value) {
  return std::isnan(value) ? bits_of(value) : (bits_of(value) + 0x1000u) & 0xffffe000u;
}
template <typename Half>
uint32_t pack(float first, float second) {
  return std::bit_cast<uint16_t>(Half(first)) | uint32_t{std::bit_cast<uint16_t>(Half(second))} << 16;
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

template <int kBytes>
void copy_async(void* to, const void* from, int valid) {
  simt::copy_async(to, from, kBytes, valid);
}
inline void commit_copies() {
  simt::commit_copies();
}
inline void wait_copies(int newer) {
  simt::wait_copies(newer);
}

struct MatrixRow {
  const unsigned char* row;
  uint32_t* words;
};

// Lane i of a load of matrices names one row, and takes its words of those that the others name.
template <bool kTransposed>
void load_matrices_as(const char* name, uint32_t (&words)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fail("a row of a matrix is not aligned");
  MatrixRow mine{static_cast<const unsigned char*>(row), words};
  simt::collective(name, &mine, [](void* const* lanes) {
    const auto half = [&](int matrix, int at, int column) {
      uint16_t element;
      std::memcpy(&element, static_cast<MatrixRow*>(lanes[8 * matrix + at])->row + 2 * column, 2);
      return uint32_t{element};
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int long_side = lane / 4, short_side = 2 * (lane % 4);
      for (int matrix = 0; matrix < 4; ++matrix) {
        static_cast<MatrixRow*>(lanes[lane])->words[matrix] =
            kTransposed ? half(matrix, short_side, long_side) | half(matrix, short_side + 1, long_side) << 16
                        : half(matrix, long_side, short_side) | half(matrix, long_side, short_side + 1) << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  load_matrices_as<false>("load_matrices", words, row);
}
inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  load_matrices_as<true>("load_matrices_transposed", words, row);
}

struct Fragments {
  float* c;
  const uint32_t *a, *b;
};

template <typename Stored>
float element_of(const uint32_t word, int half) {
  if constexpr (sizeof(Stored) == 4) {
    return float_of(word & 0xffffe000u);  // tf32 has no more
  } else {
    return std::bit_cast<Stored>(static_cast<uint16_t>(word >> 16 * half));
  }
}

// The fragments of mma.sync: m16n8k8 with tf32, m16n8k16 with halves. Products are exact, and their sum is
// rounded towards zero, which is the worst that tensor cores are known to do.
template <typename Stored>
void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine{c, a, b};
  simt::collective("multiply_tiles", &mine, [](void* const* lanes) {
    constexpr int kHalves = sizeof(Stored) == 4 ? 1 : 2, kQuarter = 4 * kHalves;
    float left[16][2 * kQuarter], right[2 * kQuarter][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* from = static_cast<Fragments*>(lanes[lane]);
      const int group = lane / 4, word = lane % 4;
      for (int half = 0; half < kHalves; ++half) {
        for (int i = 0; i < 2; ++i) {
          const int depth = i * kQuarter + word * kHalves + half;
          left[group][depth] = element_of<Stored>(from->a[2 * i], half);
          left[group + 8][depth] = element_of<Stored>(from->a[2 * i + 1], half);
          right[depth][group] = element_of<Stored>(from->b[i], half);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
        float& to = static_cast<Fragments*>(lanes[lane])->c[i];
        double sum = to;
        for (int k = 0; k < 2 * kQuarter; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
        to = static_cast<float>(sum);
        if (std::abs(static_cast<double>(to)) > std::abs(sum)) to = std::nextafter(to, 0.0f);
      }
    }
  });
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
