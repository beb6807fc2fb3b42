// Tile arithmetic for one instruction set; see tile.h, and vectors.h for what may be used here.

#include "tile_products.h"

namespace td3_fast::cpu {
namespace {

// A panel of lanes in vectors, which no store to a tile can alias.
template <typename T>
struct Lanes {
  Vector<T> v[kVectorsPerPanel];

  Lanes() = default;
  explicit Lanes(const T* from) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectorsPerPanel; ++i) v[i] = reinterpret_cast<const Vector<T>*>(from)[i];
  }
  void store(T* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < kVectorsPerPanel; ++i) reinterpret_cast<Vector<T>*>(to)[i] = v[i];
  }
};

template <typename T>
void online_softmax(T* scores, int64_t items, T* maximum, T* sum, T* weighted, int64_t width) {
  constexpr int64_t P = kPanel<T>;
  constexpr int V = kVectorsPerPanel;
  const Lanes<T> before(maximum);
  Lanes<T> peak = before, factor, added{};
  for (int64_t item = 0; item < items; ++item) {
    const Lanes<T> s(scores + item * P);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) peak.v[i] = s.v[i] > peak.v[i] ? s.v[i] : peak.v[i];
  }
  for (int64_t item = 0; item < items; ++item) {
    Lanes<T> s(scores + item * P);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      s.v[i] = exponential(s.v[i] - peak.v[i]);
      added.v[i] += s.v[i];
    }
    s.store(scores + item * P);
  }
  bool moved = false;
  for (int64_t lane = 0; lane < P; ++lane)
    moved |= peak.v[lane / kLanes<T>][lane % kLanes<T>] != maximum[lane];
  Lanes<T> total(sum);
  for (int i = 0; i < V; ++i) {
    factor.v[i] = exponential(before.v[i] - peak.v[i]);
    total.v[i] = total.v[i] * factor.v[i] + added.v[i];
  }
  total.store(sum);
  peak.store(maximum);
  if (!moved) return;
  for (int64_t column = 0; column < width; ++column) {
    Lanes<T> w(weighted + column * P);
    for (int i = 0; i < V; ++i) w.v[i] *= factor.v[i];
    w.store(weighted + column * P);
  }
}

template <typename T>
void softmax(T* scores, int64_t count, T* out) {
  constexpr int64_t P = kPanel<T>;
  constexpr int V = kVectorsPerPanel;
  const int64_t end = (count + P - 1) / P * P;
  for (int64_t i = count; i < end; ++i) scores[i] = -__builtin_inf();
  Lanes<T> peak(scores), total{};
  for (int64_t i = P; i < end; i += P) {
    const Lanes<T> s(scores + i);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) peak.v[v] = s.v[v] > peak.v[v] ? s.v[v] : peak.v[v];
  }
  T largest = peak.v[0][0], sum = 0;
  for (int64_t lane = 1; lane < P; ++lane) {
    const T of_lane = peak.v[lane / kLanes<T>][lane % kLanes<T>];
    largest = of_lane > largest ? of_lane : largest;
  }
  for (int64_t i = 0; i < end; i += P) {
    Lanes<T> s(scores + i);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      s.v[v] = exponential(s.v[v] - largest);
      total.v[v] += s.v[v];
    }
    s.store(scores + i);
  }
  for (int64_t lane = 0; lane < P; ++lane) sum += total.v[lane / kLanes<T>][lane % kLanes<T>];
  const T factor = 1 / sum;
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    *reinterpret_cast<UnalignedVector<T>*>(out + i) =
        *reinterpret_cast<const Vector<T>*>(scores + i) * factor;
  }
  for (; i < count; ++i) out[i] = scores[i] * factor;
}

template <typename T>
void probabilities(T* scores, int64_t items, const T* logsumexp, const T* remainder) {
  constexpr int64_t P = kPanel<T>;
  const Lanes<T> high(logsumexp);
  const Lanes<T> low = remainder != nullptr ? Lanes<T>(remainder) : Lanes<T>{};
  for (int64_t item = 0; item < items; ++item) {
    Lanes<T> s(scores + item * P);
#pragma GCC unroll 4
    for (int i = 0; i < kVectorsPerPanel; ++i) s.v[i] = exponential(s.v[i] - high.v[i] - low.v[i]);
    s.store(scores + item * P);
  }
}

template <typename T>
void scale(const T* p, int64_t items, const T* factor, T* scaled) {
  constexpr int64_t P = kPanel<T>;
  const Lanes<T> by(factor);
  for (int64_t item = 0; item < items; ++item) {
    Lanes<T> s(p + item * P);
#pragma GCC unroll 4
    for (int i = 0; i < kVectorsPerPanel; ++i) s.v[i] = by.v[i] == 0 ? Vector<T>{} : s.v[i] * by.v[i];
    s.store(scaled + item * P);
  }
}

template <typename T>
void add_scaled(const T* p, int64_t items, const T* factor, T* sum, bool first) {
  constexpr int64_t P = kPanel<T>;
  const Lanes<T> by(factor);
  for (int64_t at = 0; at < items * P; at += P) {
    Lanes<T> s(p + at);
    const Lanes<T> before = first ? Lanes<T>{} : Lanes<T>(sum + at);
#pragma GCC unroll 4
    for (int i = 0; i < kVectorsPerPanel; ++i) s.v[i] = s.v[i] * by.v[i] + before.v[i];
    s.store(sum + at);
  }
}

template <typename T>
void largest(const T* p, int64_t items, T* largest_of_lanes) {
  constexpr int64_t P = kPanel<T>;
  Lanes<T> peak(largest_of_lanes);
  for (int64_t item = 0; item < items; ++item) {
    const Lanes<T> s(p + item * P);
#pragma GCC unroll 4
    for (int i = 0; i < kVectorsPerPanel; ++i) peak.v[i] = s.v[i] > peak.v[i] ? s.v[i] : peak.v[i];
  }
  peak.store(largest_of_lanes);
}

template <typename T, bool kW>
void grad_scores_of(const T* p, const T* w, int64_t items, const T* shift_of_rows, T* out) {
  constexpr int64_t P = kPanel<T>;
  const Lanes<T> shift(shift_of_rows);
  for (int64_t item = 0; item < items; ++item) {
    Lanes<T> s(p + item * P);
    const Lanes<T> w_item(kW ? w + item * P : shift_of_rows);
#pragma GCC unroll 4
    for (int i = 0; i < kVectorsPerPanel; ++i) s.v[i] *= kW ? w_item.v[i] + shift.v[i] : shift.v[i];
    s.store(out + item * P);
  }
}

template <typename T>
void grad_scores(const T* p, const T* w, int64_t items, const T* shift, T* out) {
  (w != nullptr ? grad_scores_of<T, true> : grad_scores_of<T, false>)(p, w, items, shift, out);
}

template <typename T, bool kW, bool kS>
void row_means_of(const T* p,
                  const T* w,
                  const T* u,
                  const T* s,
                  int64_t items,
                  const T* inner_of_rows,
                  const RowSums<T>& sums) {
  constexpr int64_t P = kPanel<T>;
  const Lanes<T> inner(inner_of_rows), centre_before(sums.centre);
  Lanes<T> peak(sums.peak), centre = centre_before;
  for (int64_t item = 0; item < items; ++item) {
    const Lanes<T> p_item(p + item * P), u_item(u + item * P);
#pragma GCC unroll 4
    for (int i = 0; i < kVectorsPerPanel; ++i) {
      const Bits<T> higher = p_item.v[i] > peak.v[i];
      centre.v[i] = higher ? u_item.v[i] : centre.v[i];
      peak.v[i] = higher ? p_item.v[i] : peak.v[i];
    }
  }
  // One vector of lanes at a time: all of its sums stay in registers.
#pragma GCC unroll 4
  for (int i = 0; i < kVectorsPerPanel; ++i) {
    const int64_t lane = i * kLanes<T>;
    const Vector<T> centre_i = centre.v[i], inner_i = inner.v[i];
    Vector<T> mass{}, sum_u{}, sum_w{}, covariance{}, sum_s{};
    for (int64_t item = 0; item < items; ++item) {
      const int64_t at = item * P + lane;
      const Vector<T> weight = *reinterpret_cast<const Vector<T>*>(p + at);
      const Vector<T> from_centre = *reinterpret_cast<const Vector<T>*>(u + at) - centre_i;
      mass += weight;
      sum_u += weight * from_centre;
      if constexpr (kW) {
        const Vector<T> pw = weight * (*reinterpret_cast<const Vector<T>*>(w + at) - inner_i);
        sum_w += pw;
        covariance += pw * from_centre;
      }
      if constexpr (kS) sum_s += weight * *reinterpret_cast<const Vector<T>*>(s + at);
    }
    const auto total = [&](T* of) -> Vector<T>& { return *reinterpret_cast<Vector<T>*>(of + lane); };
    const Vector<T> moved = centre_before.v[i] - centre_i;
    total(sums.u) += moved * total(sums.mass) + sum_u;
    total(sums.covariance) += moved * total(sums.w) + covariance;
    total(sums.mass) += mass;
    total(sums.w) += sum_w;
    total(sums.s) += sum_s;
  }
  peak.store(sums.peak);
  centre.store(sums.centre);
}

template <typename T>
void row_means(
    const T* p, const T* w, const T* u, const T* s, int64_t items, const T* inner, const RowSums<T>& sums) {
  const auto run = w == nullptr
                       ? (s == nullptr ? row_means_of<T, false, false> : row_means_of<T, false, true>)
                       : (s == nullptr ? row_means_of<T, true, false> : row_means_of<T, true, true>);
  run(p, w, u, s, items, inner, sums);
}

template <typename T, bool kW, bool kS>
void second_order_of(const T* p,
                     const T* w,
                     const T* u,
                     const T* s,
                     int64_t items,
                     const SecondOrderRows<T>& rows,
                     T* b,
                     T* grad_scores,
                     T* centred) {
  constexpr int64_t P = kPanel<T>;
  const Lanes<T> shift(rows.shift), u_mean(rows.u_mean), offset(rows.offset);
  for (int64_t item = 0; item < items; ++item) {
    const int64_t at = item * P;
    const Lanes<T> p_item(p + at), u_item(u + at), w_item(kW ? w + at : p + at), s_item(kS ? s + at : p + at);
    Lanes<T> b_item, grad_item, centred_item;
#pragma GCC unroll 4
    for (int i = 0; i < kVectorsPerPanel; ++i) {
      const Vector<T> weight = kW ? w_item.v[i] + shift.v[i] : shift.v[i];
      const Vector<T> u_centred = u_item.v[i] - u_mean.v[i];
      const Vector<T> slope = kS ? s_item.v[i] - offset.v[i] : -offset.v[i];
      b_item.v[i] = p_item.v[i] * (weight * u_centred + slope);
      grad_item.v[i] = p_item.v[i] * weight;
      centred_item.v[i] = p_item.v[i] * u_centred;
    }
    if (b != nullptr) b_item.store(b + at);
    if (grad_scores != nullptr) grad_item.store(grad_scores + at);
    if (centred != nullptr) centred_item.store(centred + at);
  }
}

template <typename T>
void second_order(const T* p,
                  const T* w,
                  const T* u,
                  const T* s,
                  int64_t items,
                  const SecondOrderRows<T>& rows,
                  T* b,
                  T* grad_scores,
                  T* centred) {
  const auto run = w == nullptr
                       ? (s == nullptr ? second_order_of<T, false, false> : second_order_of<T, false, true>)
                       : (s == nullptr ? second_order_of<T, true, false> : second_order_of<T, true, true>);
  run(p, w, u, s, items, rows, b, grad_scores, centred);
}

template <typename T>
void count_ahead(const T* scores, int64_t items, const T* target, int64_t* ahead) {
  constexpr int64_t P = kPanel<T>;
  alignas(64) int32_t count[P] = {};
  for (int64_t item = 0; item < items; ++item) {
    const T* s = scores + item * P;
    for (int64_t lane = 0; lane < P; ++lane) count[lane] += s[lane] < target[lane] ? 0 : 1;
  }
  for (int64_t lane = 0; lane < P; ++lane) ahead[lane] += count[lane];
}

template <typename T>
T inner_product(const T* row, const T* item, int64_t depth) {
  constexpr int64_t P = kPanel<T>;
  alignas(64) T sum[P] = {};
  int64_t k = 0;
  for (; k + P <= depth; k += P) {
    for (int64_t lane = 0; lane < P; ++lane) sum[lane] += row[k + lane] * item[k + lane];
  }
  for (int64_t lane = 0; k + lane < depth; ++lane) sum[lane] += row[k + lane] * item[k + lane];
  for (int64_t half = P / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  }
  return sum[0];
}

template <typename T>
constexpr Tile<T> kTile = {TD3_FAST_STRING(TD3_FAST_INSTRUCTION_SET),
                           product<T>,
                           wide_product<T>,
                           sum_rows<T>,
                           online_softmax<T>,
                           softmax<T>,
                           probabilities<T>,
                           scale<T>,
                           add_scaled<T>,
                           largest<T>,
                           grad_scores<T>,
                           row_means<T>,
                           second_order<T>,
                           count_ahead<T>,
                           inner_product<T>};

}  // namespace

extern const Tile<float> TD3_FAST_CONCAT(float_tile_, TD3_FAST_INSTRUCTION_SET);
extern const Tile<double> TD3_FAST_CONCAT(double_tile_, TD3_FAST_INSTRUCTION_SET);
const Tile<float> TD3_FAST_CONCAT(float_tile_, TD3_FAST_INSTRUCTION_SET) = kTile<float>;
const Tile<double> TD3_FAST_CONCAT(double_tile_, TD3_FAST_INSTRUCTION_SET) = kTile<double>;

}  // namespace td3_fast::cpu
