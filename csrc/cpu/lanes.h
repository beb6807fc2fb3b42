// Lanes turned into rows of memory and back, and what is summed over lanes.
//
// For files that are built once per instruction set; see vectors.h.
#pragma once

#include "vectors.h"

namespace td3_fast::cpu {
namespace {

#if defined(__GNUC__) && !defined(__clang__)
// Lanes of two vectors, those of the second counted on from those of the first: what the first, or the
// second, is to hold once the upper half of every 2 kHalf lanes of the first and the lower half of the second
// have changed places.
template <typename T, int kHalf, bool kOfFirst>
TD3_FAST_INLINE Bits<T> exchanged() {
  Bits<T> from{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    const bool upper = (i & kHalf) != 0;
    from[i] = kOfFirst ? (upper ? kLanes<T> + i - kHalf : i) : (upper ? kLanes<T> + i : i + kHalf);
  }
  return from;
}
#endif

template <typename T, int kHalf>
TD3_FAST_INLINE void exchange(Vector<T>* x) {
#if defined(__GNUC__) && !defined(__clang__)
  const Bits<T> of_first = exchanged<T, kHalf, true>(), of_second = exchanged<T, kHalf, false>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & kHalf) != 0) continue;
    const Vector<T> a = x[i], b = x[i + kHalf];
    x[i] = __builtin_shuffle(a, b, of_first);
    x[i + kHalf] = __builtin_shuffle(a, b, of_second);
  }
#else
  for (int i = 0; i < kLanes<T>; ++i) {
    for (int j = 0; j < kLanes<T>; ++j) {
      if ((i & kHalf) != 0 || (j & kHalf) == 0) continue;
      const T moved = x[i][j];
      x[i][j] = x[i + kHalf][j - kHalf];
      x[i + kHalf][j - kHalf] = moved;
    }
  }
#endif
}

// x[i][j] and x[j][i] change places.
template <typename T>
TD3_FAST_INLINE void transpose(Vector<T>* x) {
  if constexpr (kLanes<T> > 8) exchange<T, 8>(x);
  if constexpr (kLanes<T> > 4) exchange<T, 4>(x);
  if constexpr (kLanes<T> > 2) exchange<T, 2>(x);
  exchange<T, 1>(x);
}

template <typename T>
TD3_FAST_INLINE UnalignedVector<T>& lanes_at(T* at) {
  return *reinterpret_cast<UnalignedVector<T>*>(at);
}
template <typename T>
TD3_FAST_INLINE const UnalignedVector<T>& lanes_at(const T* at) {
  return *reinterpret_cast<const UnalignedVector<T>*>(at);
}

// The first `rows` lanes of `count` vectors as rows: to(lane)[i] = of(i)[lane].
template <typename T, typename Of, typename To>
TD3_FAST_INLINE void store_rows(int64_t count, int rows, const Of& of, const To& to) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    Vector<T> square[L];
    for (int j = 0; j < L; ++j) square[j] = of(i + j);
    transpose<T>(square);
    for (int lane = 0; lane < rows; ++lane) lanes_at(to(lane) + i) = square[lane];
  }
  for (; i < count; ++i) {
    const Vector<T> x = of(i);
    for (int lane = 0; lane < rows; ++lane) to(lane)[i] = x[lane];
  }
}

// Rows as the first `rows` lanes of vectors, with zeros beyond: set(i, x) with x[lane] = from(lane)[i].
template <typename T, typename From, typename Set>
TD3_FAST_INLINE void load_rows(int64_t count, int rows, const From& from, const Set& set) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    Vector<T> square[L];
    for (int lane = 0; lane < L; ++lane)
      square[lane] = lane < rows ? Vector<T>(lanes_at(from(lane) + i)) : Vector<T>{};
    transpose<T>(square);
    for (int j = 0; j < L; ++j) set(i + j, square[j]);
  }
  for (; i < count; ++i) {
    Vector<T> x{};
    for (int lane = 0; lane < rows; ++lane) x[lane] = from(lane)[i];
    set(i, x);
  }
}

// to[i] += the sum of the lanes of of(i).
template <typename T, typename Of>
TD3_FAST_INLINE void add_lanes(int64_t count, const Of& of, T* to) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    Vector<T> square[L];
    for (int j = 0; j < L; ++j) square[j] = of(i + j);
    transpose<T>(square);
    Vector<T> sum = square[0];
    for (int lane = 1; lane < L; ++lane) sum += square[lane];
    lanes_at(to + i) += sum;
  }
  for (; i < count; ++i) {
    const Vector<T> x = of(i);
    T sum = 0;
    for (int lane = 0; lane < L; ++lane) sum += x[lane];
    to[i] += sum;
  }
}

// A block of kOut rows by kIn vectors of `sums`, held in registers while the depth runs.
template <typename T, int kOut, int kIn>
TD3_FAST_INLINE void add_block(int64_t depth, int64_t out, int64_t in, const T* g, const T* x, T* sums) {
  Vector<T> sum[kOut][kIn]{};
  for (int64_t k = 0; k < depth; ++k, g += out, x += in) {
    Vector<T> row[kIn];
    for (int j = 0; j < kIn; ++j) row[j] = lanes_at(x + j * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kOut; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kIn; ++j) sum[i][j] += g[i] * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOut; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kIn; ++j) lanes_at(sums + i * in + j * kLanes<T>) += sum[i][j];
  }
}

template <typename T, int kOut>
TD3_FAST_INLINE void add_rows_of_products(
    int64_t depth, int64_t out, int64_t in, const T* g, const T* x, T* sums) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; j + 2 * L <= in; j += 2 * L) add_block<T, kOut, 2>(depth, out, in, g, x + j, sums + j);
  for (; j + L <= in; j += L) add_block<T, kOut, 1>(depth, out, in, g, x + j, sums + j);
  for (; j < in; ++j) {
    T sum[kOut] = {};
    for (int64_t k = 0; k < depth; ++k) {
      for (int i = 0; i < kOut; ++i) sum[i] += g[k * out + i] * x[k * in + j];
    }
    for (int i = 0; i < kOut; ++i) sums[i * in + j] += sum[i];
  }
}

// sums[i][j] += sum_k g[k][i] x[k][j]: g (depth, out), x (depth, in), sums (out, in).
template <typename T>
void add_products(int64_t depth, int64_t out, int64_t in, const T* g, const T* x, T* sums) {
  constexpr int kOut = kVectorBytes == 64 ? 8 : 4;
  int64_t i = 0;
  for (; i + kOut <= out; i += kOut) add_rows_of_products<T, kOut>(depth, out, in, g + i, x, sums + i * in);
  for (; i < out; ++i) add_rows_of_products<T, 1>(depth, out, in, g + i, x, sums + i * in);
}

// Which lanes an element of dropout survives in, a bit each.
using LaneMask = uint16_t;
static_assert(kLanes<float> <= 16);

// masks[i] has the bit of a lane where words(lane)[i] is not below the threshold.
template <typename Words>
TD3_FAST_INLINE void lane_masks(
    int64_t count, int lanes, const Words& words, int16_t threshold, LaneMask* __restrict masks) {
  for (int64_t i = 0; i < count; ++i) masks[i] = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    const int16_t* from = words(lane);
    const LaneMask bit = static_cast<LaneMask>(1 << lane);
    for (int64_t i = 0; i < count; ++i)
      masks[i] = static_cast<LaneMask>(masks[i] | (from[i] >= threshold ? bit : 0));
  }
}

// x in the lanes of a mask, zero elsewhere.
template <typename T>
TD3_FAST_INLINE Vector<T> in_lanes(LaneMask mask, Vector<T> x) {
  Bits<T> bits{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<T>; ++lane) bits[lane] = 1 << lane;
  return ((bits & mask) != 0) ? x : Vector<T>{};
}

}  // namespace
}  // namespace td3_fast::cpu
