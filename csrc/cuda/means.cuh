// The row sums of the second order, made in parts.
#pragma once

#include "elements.cuh"

namespace td3_fast::cuda {

// Over some items of a row: the largest p and u there, the centre; and sum p, sum p (u - centre), sum p (w -
// D), sum p (w - D)(u - centre) and sum p s. About the most probable item the differences of the second order
// are exact.
template <typename T>
struct Means {
  static constexpr int kCount = 7;
  T peak, centre, mass, u, w, wu, s;

  __device__ void add_item(T p, T item_u, T item_w, T item_s) {
    if (p > peak) {
      move(item_u);
      peak = p;
    }
    const T from_centre = item_u - centre;
    mass += p;
    u += p * from_centre;
    w += p * item_w;
    wu += p * item_w * from_centre;
    s += p * item_s;
  }

  // The larger peak's centre stays.
  __device__ void add(Means other) {
    if (other.peak > peak) {
      move(other.centre);
      peak = other.peak;
    } else {
      other.move(centre);
    }
    mass += other.mass;
    u += other.u;
    w += other.w;
    wu += other.wu;
    s += other.s;
  }

  // Those of the lane that differs in the bits of `mask`.
  __device__ Means of_lane(int mask) const {
    return {shuffle_xor(peak, mask), shuffle_xor(centre, mask), shuffle_xor(mass, mask), shuffle_xor(u, mask),
            shuffle_xor(w, mask),    shuffle_xor(wu, mask),     shuffle_xor(s, mask)};
  }

  __device__ static Means read(const T* from, int64_t row) {
    from += row * kCount;
    return {from[0], from[1], from[2], from[3], from[4], from[5], from[6]};
  }
  __device__ void write(T* to, int64_t row) const {
    to += row * kCount;
    const T parts[kCount] = {peak, centre, mass, u, w, wu, s};
    for (int i = 0; i < kCount; ++i) to[i] = parts[i];
  }

 private:
  __device__ void move(T to) {
    u += (centre - to) * mass;
    wu += (centre - to) * w;
    centre = to;
  }
};

}  // namespace td3_fast::cuda
