// Vectors of one instruction set, TD3_FAST_INSTRUCTION_SET, and functions of them.
//
// For files that are built once per instruction set, which may use only built-in functions and what lies in
// an unnamed namespace: an inline function of a shared header, emitted there with wide instructions, could be
// the copy that the linker keeps for all.
#pragma once

#include <cstdint>

#define TD3_FAST_CONCAT_(a, b) a##b
#define TD3_FAST_CONCAT(a, b) TD3_FAST_CONCAT_(a, b)
#define TD3_FAST_INLINE inline __attribute__((always_inline))
#define TD3_FAST_STRING_(a) #a
#define TD3_FAST_STRING(a) TD3_FAST_STRING_(a)

namespace td3_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(float))));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(double))));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
using Bits = typename VectorOf<T>::bits;

// The same, wherever in memory.
template <typename T>
using UnalignedVector = typename VectorOf<T>::unaligned;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// exp as 2^k e^r with |r| <= ln(2) / 2 and a polynomial for e^r: float32 of the least degree whose error,
// 1e-7, is that of rounding (3 ulp in all), float64 within 2 ulp. Results below the smallest normal number
// are zero, those above the largest, which no softmax has, are not defined. k is read off the bits of a sum
// that rounds, and added to the exponent of e^r.
TD3_FAST_INLINE Vector<float> exponential(Vector<float> x) {
  constexpr float kLowest = -87.33654f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  const Vector<float> rounded = x * 1.44269504088896341f + kRound;
  const Vector<float> k = rounded - kRound;
#if defined(__FMA__)
  const Vector<float> r = x - k * 0.693147180559945f;  // a product that is not rounded: one constant does
#else
  Vector<float> r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
#endif
  Vector<float> p = r * 8.3125015684e-03f + 4.1890332000e-02f;
  p = p * r + 1.6667115387e-01f;
  p = p * r + 4.9999230305e-01f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits<float> power = (Bits<float>)p + ((Bits<float>)rounded << 23);
  return (Vector<float>)(x < kLowest ? Bits<float>{} : power);
}

TD3_FAST_INLINE Vector<double> exponential(Vector<double> x) {
  constexpr double kLowest = -708.39;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const Vector<double> rounded = x * 1.4426950408889634074 + kRound;
  const Vector<double> k = rounded - kRound;
  Vector<double> r = x - k * 6.93145751953125e-1;
  r = r - k * 1.42860682030941723212e-6;
  Vector<double> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const Bits<double> power = (Bits<double>)p + ((Bits<double>)rounded << 52);
  return (Vector<double>)(x < kLowest ? Bits<double>{} : power);
}

}  // namespace
}  // namespace td3_fast::cpu
