// Tile arithmetic for one instruction set, TD3_FAST_INSTRUCTION_SET; see tile.h.
//
// Only built-in functions and templates of this file's own namespace may be used: an inline function of a
// shared header, emitted here with wide instructions, could be the copy that the linker keeps for all.

#include "tile.h"

#define TD3_FAST_CONCAT_(a, b) a##b
#define TD3_FAST_CONCAT(a, b) TD3_FAST_CONCAT_(a, b)
#define TD3_FAST_STRING_(a) #a
#define TD3_FAST_STRING(a) TD3_FAST_STRING_(a)

namespace td3_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kMaxUnroll = 14;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kMaxUnroll = 6;
#else
constexpr int kVectorBytes = 16;
constexpr int kMaxUnroll = 3;
#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
constexpr int kVectorsPerPanel = 64 / kVectorBytes;

// One block of M rows of c by V vectors of lanes, held in registers while the depth runs.
// The sum starts at zero and is added to c once: partial sums keep long reductions accurate.
template <typename T, int M, int V, Walk kWalk>
inline __attribute__((always_inline)) void block(const T* a,
                                                 int64_t stride,
                                                 int64_t a_segment,
                                                 int64_t segment,
                                                 int64_t depth,
                                                 const T* b,
                                                 T* c,
                                                 bool accumulate) {
  using Vector = typename VectorOf<T>::type;
  Vector sum[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = Vector{};
  }
  for (int64_t start = 0; start < depth; start += segment, a += a_segment) {
    const int64_t length = depth - start < segment ? depth - start : segment;
    const T* a_k = a;
    for (int64_t k = 0; k < length; ++k) {
      Vector b_k[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) b_k[v] = *reinterpret_cast<const Vector*>(b + v * kLanes<T>);
      b += kPanel<T>;
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const T a_ik = kWalk == Walk::kRows ? a[i * stride + k] : a_k[i];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[i][v] += a_ik * b_k[v];
      }
      a_k += stride;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vector* out = reinterpret_cast<Vector*>(c + i * kPanel<T> + v * kLanes<T>);
      *out = accumulate ? *out + sum[i][v] : sum[i][v];
    }
  }
}

template <typename T>
using Block = void (*)(const T*, int64_t, int64_t, int64_t, int64_t, const T*, T*, bool);

template <typename T, int M, int V, Walk kWalk>
void block_of(const T* a,
              int64_t stride,
              int64_t a_segment,
              int64_t segment,
              int64_t depth,
              const T* b,
              T* c,
              bool accumulate) {
  block<T, M, V, kWalk>(a, stride, a_segment, segment, depth, b, c, accumulate);
}

template <typename T, int V, Walk kWalk, int M>
struct Blocks {
  static Block<T> of(int64_t m) {
    return m == M ? static_cast<Block<T>>(block_of<T, M, V, kWalk>) : Blocks<T, V, kWalk, M - 1>::of(m);
  }
};
template <typename T, int V, Walk kWalk>
struct Blocks<T, V, kWalk, 0> {
  static Block<T> of(int64_t) { return nullptr; }
};

// Rows of c in blocks of nearly equal size, so that none is left with too few sums to hide their latency.
template <typename T, int V, Walk kWalk>
void blocks(const T* a,
            int64_t stride,
            int64_t a_segment,
            int64_t segment,
            int64_t count,
            int64_t depth,
            const T* b,
            T* c,
            bool accumulate) {
  const int64_t num_blocks = (count + kMaxUnroll - 1) / kMaxUnroll;
  if (num_blocks == 0) return;
  const int64_t small = count / num_blocks;
  const int64_t num_large = count % num_blocks;
  const int64_t a_step = kWalk == Walk::kRows ? stride : 1;
  const Block<T> run_small = Blocks<T, V, kWalk, kMaxUnroll>::of(small);
  const Block<T> run_large = Blocks<T, V, kWalk, kMaxUnroll>::of(small + 1);
  for (int64_t index = 0; index < num_blocks; ++index) {
    const int64_t size = index < num_large ? small + 1 : small;
    (index < num_large ? run_large : run_small)(a, stride, a_segment, segment, depth, b, c, accumulate);
    a += size * a_step;
    c += size * kPanel<T>;
  }
}

template <typename T, Walk kWalk, int V>
void blocks_of_lanes(const T* a,
                     int64_t stride,
                     int64_t a_segment,
                     int64_t segment,
                     int64_t count,
                     int64_t depth,
                     const T* b,
                     T* c,
                     int64_t lanes,
                     bool accumulate) {
  if constexpr (V > 1) {
    if (lanes <= (V - 1) * kLanes<T>) {
      blocks_of_lanes<T, kWalk, V - 1>(a, stride, a_segment, segment, count, depth, b, c, lanes, accumulate);
      return;
    }
  }
  blocks<T, V, kWalk>(a, stride, a_segment, segment, count, depth, b, c, accumulate);
}

template <typename T>
void product(const T* a,
             int64_t stride,
             Walk walk,
             int64_t count,
             int64_t depth,
             const T* b,
             T* c,
             int64_t lanes,
             bool accumulate) {
  const auto run = walk == Walk::kRows ? blocks_of_lanes<T, Walk::kRows, kVectorsPerPanel>
                                       : blocks_of_lanes<T, Walk::kColumns, kVectorsPerPanel>;
  run(a, stride, 0, depth > 0 ? depth : 1, count, depth, b, c, lanes, accumulate);
}

template <typename T>
void sum_rows(const T* a, int64_t a_panel, int64_t items, int64_t rows, const T* b, T* c, int64_t lanes) {
  blocks_of_lanes<T, Walk::kRows, kVectorsPerPanel>(a, kPanel<T>, a_panel, kPanel<T>, items, rows, b, c,
                                                    lanes, true);
}

// exp as 2^k e^r with |r| <= ln(2) / 2 and a polynomial for e^r, within 2 ulp. Results below the smallest
// normal number are zero; arguments above 88.3 (709.4), which no softmax has, count as that. k is read off
// the bits of a sum that rounds.
inline __attribute__((always_inline)) float exponential(float x) {
  constexpr float kLowest = -87.33654f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  float clamped = x < kLowest ? kLowest : x;
  clamped = clamped > 88.3f ? 88.3f : clamped;
  const float rounded = clamped * 1.44269504088896341f + kRound;
  const float k = rounded - kRound;
  float r = clamped - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  const int32_t exponent = (bits << 23) + (127 << 23);
  float power;
  __builtin_memcpy(&power, &exponent, sizeof(power));
  const float result = p * power;
  return x < kLowest ? 0.0f : result;
}

inline __attribute__((always_inline)) double exponential(double x) {
  constexpr double kLowest = -708.39;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  double clamped = x < kLowest ? kLowest : x;
  clamped = clamped > 709.4 ? 709.4 : clamped;
  const double rounded = clamped * 1.4426950408889634074 + kRound;
  const double k = rounded - kRound;
  double r = clamped - k * 6.93145751953125e-1;
  r = r - k * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
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
  int64_t bits;
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  const int64_t exponent = static_cast<int64_t>((static_cast<uint64_t>(bits) << 52) + (1023ull << 52));
  double power;
  __builtin_memcpy(&power, &exponent, sizeof(power));
  const double result = p * power;
  return x < kLowest ? 0.0 : result;
}

template <typename T>
void online_softmax(T* scores, int64_t items, T* maximum, T* sum, T* weighted, int64_t width) {
  constexpr int64_t P = kPanel<T>;
  alignas(64) T peak[P], factor[P], added[P];
  for (int64_t lane = 0; lane < P; ++lane) peak[lane] = maximum[lane];
  for (int64_t item = 0; item < items; ++item) {
    const T* s = scores + item * P;
    for (int64_t lane = 0; lane < P; ++lane) peak[lane] = s[lane] > peak[lane] ? s[lane] : peak[lane];
  }
  bool moved = false;
  for (int64_t lane = 0; lane < P; ++lane) {
    moved |= peak[lane] != maximum[lane];
    factor[lane] = exponential(maximum[lane] - peak[lane]);
    maximum[lane] = peak[lane];
    added[lane] = 0;
  }
  for (int64_t item = 0; item < items; ++item) {
    T* s = scores + item * P;
    for (int64_t lane = 0; lane < P; ++lane) {
      s[lane] = exponential(s[lane] - peak[lane]);
      added[lane] += s[lane];
    }
  }
  for (int64_t lane = 0; lane < P; ++lane) sum[lane] = sum[lane] * factor[lane] + added[lane];
  if (!moved) return;
  for (int64_t column = 0; column < width; ++column) {
    for (int64_t lane = 0; lane < P; ++lane) weighted[column * P + lane] *= factor[lane];
  }
}

// A panel of lanes in a local array, which no store to a tile can alias.
template <typename T>
struct alignas(64) Lanes {
  T value[kPanel<T>];

  Lanes() = default;
  explicit Lanes(const T* from) {
    for (int64_t lane = 0; lane < kPanel<T>; ++lane) value[lane] = from[lane];
  }
  T operator[](int64_t lane) const { return value[lane]; }
  T& operator[](int64_t lane) { return value[lane]; }
};

template <typename T>
void probabilities(T* scores, int64_t items, const T* logsumexp, const T* remainder) {
  constexpr int64_t P = kPanel<T>;
  const Lanes<T> high(logsumexp);
  Lanes<T> low;
  for (int64_t lane = 0; lane < P; ++lane) low[lane] = remainder != nullptr ? remainder[lane] : T(0);
  for (int64_t item = 0; item < items; ++item) {
    T* s = scores + item * P;
    for (int64_t lane = 0; lane < P; ++lane) s[lane] = exponential(s[lane] - high[lane] - low[lane]);
  }
}

template <typename T>
void scale(T* p, int64_t items, const T* factor) {
  constexpr int64_t P = kPanel<T>;
  const Lanes<T> by(factor);
  for (int64_t item = 0; item < items; ++item) {
    T* s = p + item * P;
    for (int64_t lane = 0; lane < P; ++lane) s[lane] = by[lane] == 0 ? T(0) : s[lane] * by[lane];
  }
}

template <typename T>
void grad_scores(const T* p, const T* w, int64_t items, const T* shift_of_rows, T* out) {
  constexpr int64_t P = kPanel<T>;
  const Lanes<T> shift(shift_of_rows);
  for (int64_t item = 0; item < items; ++item) {
    const int64_t at = item * P;
    if (w != nullptr) {
      for (int64_t lane = 0; lane < P; ++lane) out[at + lane] = p[at + lane] * (w[at + lane] + shift[lane]);
    } else {
      for (int64_t lane = 0; lane < P; ++lane) out[at + lane] = p[at + lane] * shift[lane];
    }
  }
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
  const Lanes<T> inner(inner_of_rows);
  Lanes<T> peak(sums.peak), centre(sums.centre);
  for (int64_t item = 0; item < items; ++item) {
    const int64_t at = item * P;
    for (int64_t lane = 0; lane < P; ++lane) {
      const bool higher = p[at + lane] > peak[lane];
      centre[lane] = higher ? u[at + lane] : centre[lane];
      peak[lane] = higher ? p[at + lane] : peak[lane];
    }
  }
  alignas(64) T mass[P] = {}, sum_u[P] = {}, sum_w[P] = {}, covariance[P] = {}, sum_s[P] = {};
  for (int64_t item = 0; item < items; ++item) {
    const int64_t at = item * P;
    for (int64_t lane = 0; lane < P; ++lane) {
      const T weight = p[at + lane], from_centre = u[at + lane] - centre[lane];
      mass[lane] += weight;
      sum_u[lane] += weight * from_centre;
      if constexpr (kW) {
        const T pw = weight * (w[at + lane] - inner[lane]);
        sum_w[lane] += pw;
        covariance[lane] += pw * from_centre;
      }
      if constexpr (kS) sum_s[lane] += weight * s[at + lane];
    }
  }
  for (int64_t lane = 0; lane < P; ++lane) {
    const T moved = sums.centre[lane] - centre[lane];
    sums.u[lane] += moved * sums.mass[lane] + sum_u[lane];
    sums.covariance[lane] += moved * sums.w[lane] + covariance[lane];
    sums.mass[lane] += mass[lane];
    sums.w[lane] += sum_w[lane];
    sums.s[lane] += sum_s[lane];
    sums.peak[lane] = peak[lane];
    sums.centre[lane] = centre[lane];
  }
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
  alignas(64) T shift[P], u_mean[P], offset[P], b_item[P], grad_item[P], centred_item[P];
  for (int64_t lane = 0; lane < P; ++lane) {
    shift[lane] = rows.shift[lane];
    u_mean[lane] = rows.u_mean[lane];
    offset[lane] = rows.offset[lane];
  }
  for (int64_t item = 0; item < items; ++item) {
    const int64_t at = item * P;
    for (int64_t lane = 0; lane < P; ++lane) {
      const T weight = kW ? w[at + lane] + shift[lane] : shift[lane];
      const T u_centred = u[at + lane] - u_mean[lane];
      const T slope = kS ? s[at + lane] - offset[lane] : -offset[lane];
      b_item[lane] = p[at + lane] * (weight * u_centred + slope);
      grad_item[lane] = p[at + lane] * weight;
      centred_item[lane] = p[at + lane] * u_centred;
    }
    if (b != nullptr) {
      for (int64_t lane = 0; lane < P; ++lane) b[at + lane] = b_item[lane];
    }
    if (grad_scores != nullptr) {
      for (int64_t lane = 0; lane < P; ++lane) grad_scores[at + lane] = grad_item[lane];
    }
    if (centred != nullptr) {
      for (int64_t lane = 0; lane < P; ++lane) centred[at + lane] = centred_item[lane];
    }
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
                           sum_rows<T>,
                           online_softmax<T>,
                           probabilities<T>,
                           scale<T>,
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
