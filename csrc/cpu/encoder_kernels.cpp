// The encoder's passes for one instruction set; see encoder.h, and vectors.h for what may be used here.
//
// A pass is written once, for numbers N that are vectors of lanes or dual numbers of them (value and
// tangent). Of dual numbers' gradients only the tangents are summed and stored.

#include "encoder.h"
#include "vectors.h"

namespace td3_fast::cpu {
namespace {

#define TD3_FAST_INLINE inline __attribute__((always_inline))

template <typename V>
struct Dual {
  V v, t;
};

template <typename V>
struct ElementOf;
template <>
struct ElementOf<Vector<float>> {
  using type = float;
};
template <>
struct ElementOf<Vector<double>> {
  using type = double;
};

// ---- numbers ----

template <typename V>
TD3_FAST_INLINE Dual<V> operator+(Dual<V> a, Dual<V> b) {
  return {a.v + b.v, a.t + b.t};
}
template <typename V>
TD3_FAST_INLINE Dual<V> operator-(Dual<V> a, Dual<V> b) {
  return {a.v - b.v, a.t - b.t};
}
template <typename V>
TD3_FAST_INLINE Dual<V> operator*(Dual<V> a, Dual<V> b) {
  return {a.v * b.v, a.v * b.t + a.t * b.v};
}
template <typename V>
TD3_FAST_INLINE Dual<V> operator*(Dual<V> a, V b) {
  return {a.v * b, a.t * b};
}

template <typename V, typename F>
TD3_FAST_INLINE V each(V x, F f) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = f(x[i]);
  return x;
}
TD3_FAST_INLINE float scalar_erf(float x) {
  return __builtin_erff(x);
}
TD3_FAST_INLINE double scalar_erf(double x) {
  return __builtin_erf(x);
}
TD3_FAST_INLINE float scalar_sqrt(float x) {
  return __builtin_sqrtf(x);
}
TD3_FAST_INLINE double scalar_sqrt(double x) {
  return __builtin_sqrt(x);
}

template <typename V>
TD3_FAST_INLINE V exp_of(V x) {
  return exponential(x);
}
template <typename V>
TD3_FAST_INLINE Dual<V> exp_of(Dual<V> x) {
  const V e = exponential(x.v);
  return {e, e * x.t};
}

template <typename V>
TD3_FAST_INLINE V inverse(V x) {
  return 1 / x;
}
template <typename V>
TD3_FAST_INLINE Dual<V> inverse(Dual<V> x) {
  const V i = 1 / x.v;
  return {i, -i * i * x.t};
}

template <typename V>
TD3_FAST_INLINE V inverse_sqrt(V x) {
  return 1 / each(x, [](auto e) { return scalar_sqrt(e); });
}
template <typename V>
TD3_FAST_INLINE Dual<V> inverse_sqrt(Dual<V> x) {
  const V i = inverse_sqrt(x.v);
  return {i, i * i * i * x.t / -2};
}

// gelu(x) = x Φ(x), its slope Φ + x φ, and the slope's slope φ (2 - x²).
template <typename V>
struct Normal {
  V cdf, density;
};
template <typename V>
TD3_FAST_INLINE Normal<V> normal(V x) {
  using T = typename ElementOf<V>::type;
  return {each(x, [](auto e) { return T(0.5) * (1 + scalar_erf(e * T(0.70710678118654752440))); }),
          exponential(x * x * T(-0.5)) * T(0.39894228040143267794)};
}
template <typename V>
TD3_FAST_INLINE void gelu(V x, V* value, V* slope) {
  const Normal<V> n = normal(x);
  *value = x * n.cdf;
  *slope = n.cdf + x * n.density;
}
template <typename V>
TD3_FAST_INLINE void gelu(Dual<V> x, Dual<V>* value, Dual<V>* slope) {
  const Normal<V> n = normal(x.v);
  const V first = n.cdf + x.v * n.density;
  *value = {x.v * n.cdf, first * x.t};
  *slope = {first, n.density * (2 - x.v * x.v) * x.t};
}

template <typename V>
TD3_FAST_INLINE V value_of(V x) {
  return x;
}
template <typename V>
TD3_FAST_INLINE V value_of(Dual<V> x) {
  return x.v;
}
template <typename V>
TD3_FAST_INLINE V minus(V x, V constant) {
  return x - constant;
}
template <typename V>
TD3_FAST_INLINE Dual<V> minus(Dual<V> x, V constant) {
  return {x.v - constant, x.t};
}
template <typename V, typename M>
TD3_FAST_INLINE V where(M mask, V x) {
  return mask ? x : V{};
}
template <typename V, typename M>
TD3_FAST_INLINE Dual<V> where(M mask, Dual<V> x) {
  return {mask ? x.v : V{}, mask ? x.t : V{}};
}

// sum += a b, of dual numbers the tangent alone.
template <typename V>
TD3_FAST_INLINE void add_gradient(V* sum, V a, V b) {
  *sum += a * b;
}
template <typename V>
TD3_FAST_INLINE void add_gradient(V* sum, Dual<V> a, Dual<V> b) {
  *sum += a.v * b.t + a.t * b.v;
}
template <typename V>
TD3_FAST_INLINE void add_gradient(V* sum, V a) {
  *sum += a;
}
template <typename V>
TD3_FAST_INLINE void add_gradient(V* sum, Dual<V> a) {
  *sum += a.t;
}

// Parameters, one for all lanes.
template <typename T, bool kTangents>
struct Weights;
template <typename T>
struct Weights<T, false> {
  using N = Vector<T>;
  const T* v;
  TD3_FAST_INLINE Weights at(int64_t i) const { return {v + i}; }
  TD3_FAST_INLINE N operator[](int64_t i) const { return v[i] - N{}; }
  // sum += w[i] x
  TD3_FAST_INLINE void add(N* sum, int64_t i, N x) const { *sum += v[i] * x; }
};
template <typename T>
struct Weights<T, true> {
  using N = Dual<Vector<T>>;
  const T *v, *t;
  TD3_FAST_INLINE Weights at(int64_t i) const { return {v + i, t + i}; }
  TD3_FAST_INLINE N operator[](int64_t i) const { return {v[i] - Vector<T>{}, t[i] - Vector<T>{}}; }
  TD3_FAST_INLINE void add(N* sum, int64_t i, N x) const {
    sum->v += v[i] * x.v;
    sum->t += v[i] * x.t + t[i] * x.v;
  }
};

// ---- the pass ----

template <typename T, bool kTangents>
class Pass {
  using V = Vector<T>;
  using W = Weights<T, kTangents>;
  using N = typename W::N;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kOwnSize = 4096;  // bytes of scratch for the pass itself

  // Where a block's parameters begin in the vector.
  struct Block {
    int64_t query, query_bias, key, key_bias, value, value_bias, output, output_bias, norm, norm_bias, up,
        up_bias, down, down_bias, last_norm, last_norm_bias;
  };

  // What the backward pass needs of a block; k rows are asked of it.
  struct Saved {
    const N* inputs;  // (rows, d)
    N* asked;         // (k, d)
    N *query, *direction, *weights, *mixed, *total, *context, *normed, *deviation, *attended, *raised, *slope,
        *bent, *last_normed, *last_deviation, *outputs;
    int64_t k;
  };

 public:
  TD3_FAST_INLINE Pass(const EncoderCall<T>& call, int64_t first, int64_t count, void* scratch)
      : call_(call),
        s_(call.sizes),
        first_(first),
        count_(count),
        next_(reinterpret_cast<N*>(static_cast<unsigned char*>(scratch) + kOwnSize)) {
    static_assert(sizeof(Pass) <= kOwnSize);
    if constexpr (kTangents) {
      w_ = {call.parameters, call.parameters_tangent};
    } else {
      w_ = {call.parameters};
    }
    rows_ = 0;
    for (int64_t r = 0; r < s_.asked; ++r) {
      for (int i = 0; i < L; ++i) {
        const int64_t position = position_of(r, i);
        rows_ = position >= rows_ ? position + 1 : rows_;
      }
    }
  }

  static int64_t scratch_size(const EncoderSizes& s) {
    const int64_t d = s.width, rows = s.length;
    int64_t numbers = 4 * rows * d + rows + 16;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      const int64_t k = layer + 1 < s.layers ? rows : s.asked;
      numbers += k * (8 * d + 2 * s.heads * d + s.heads * (rows + 1) + 3 * s.inner + 2);
    }
    const int64_t k = s.layers > 1 ? rows : s.asked;
    numbers += k * (6 * d + 2 * s.inner) + s.heads * d * 2 + rows * 2 + d;
    return kOwnSize + numbers * static_cast<int64_t>(sizeof(N));
  }

  // The pass itself lies before its numbers.
  static void* operator new(decltype(sizeof(0)), void* scratch) { return scratch; }
  static Pass* in(void* scratch) { return static_cast<Pass*>(scratch); }

  void forward() {
    const int64_t d = s_.width;
    normed_ = take(rows_ * d);
    deviation_ = take(rows_);
    hidden_ = take(rows_ * d);
    N* row = take(d);
    for (int64_t j = 0; j < rows_; ++j) {
      load_inputs(j, row);
      for (int64_t f = 0; f < d; ++f) row[f] = row[f] + w_[j * d + f];
      norm(row, s_.positions * d, normed_ + j * d, deviation_ + j, hidden_ + j * d);
      drop_hidden(0, s_.length, j, hidden_ + j * d);
    }
    const N* inputs = hidden_;
    for (int64_t layer = 0; layer < s_.layers; ++layer) {
      block_forward(layer, inputs);
      inputs = saved_[layer].outputs;
    }
  }

  void write_outputs() const {
    if (call_.outputs == nullptr) return;
    const int64_t d = s_.width, k = s_.asked;
    const N* outputs = saved_[s_.layers - 1].outputs;
    for (int i = 0; i < count_; ++i) {
      T* to = call_.outputs + (first_ + i) * k * d;
      for (int64_t at = 0; at < k * d; ++at) to[at] = stored(outputs[at], i);
    }
  }

  void backward(T* sums_of_lanes) {
    sums_ = reinterpret_cast<V*>(sums_of_lanes);
    const int64_t d = s_.width, k = s_.asked;
    N* grad = take((s_.layers > 1 ? rows_ : k) * d);
    for (int64_t at = 0; at < k * d; ++at) {
      grad[at] = upstream(at);
    }
    N* grad_hidden = take(rows_ * d);
    for (int64_t layer = s_.layers - 1; layer >= 0; --layer) {
      zero(grad_hidden, rows_ * d);
      block_backward(layer, grad, grad_hidden);
      if (layer > 0) {
        for (int64_t at = 0; at < rows_ * d; ++at) grad[at] = grad_hidden[at];
      }
    }
    const int64_t gain = s_.positions * d;
    for (int64_t j = 0; j < rows_; ++j) {
      N* row = grad_hidden + j * d;
      drop_hidden(0, s_.length, j, row);
      norm_backward(row, gain, normed_ + j * d, deviation_[j]);
      for (int64_t f = 0; f < d; ++f) add_gradient(sums_ + j * d + f, row[f]);
    }
    if (call_.grad_inputs == nullptr) return;
    for (int i = 0; i < count_; ++i) {
      T* to = call_.grad_inputs + (first_ + i) * call_.grad_input_stride;
      for (int64_t at = 0; at < rows_ * d; ++at) to[at] = stored(grad_hidden[at], i);
      for (int64_t at = rows_ * d; at < s_.length * d; ++at) to[at] = 0;
    }
  }

 private:
  N* take(int64_t count) {
    N* taken = next_;
    next_ += count;
    return taken;
  }
  static void zero(N* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = N{};
  }
  // The gradient of an output, zero in lanes beyond the last sequence.
  TD3_FAST_INLINE N upstream(int64_t at) const {
    const int64_t size = s_.asked * s_.width;
    const auto read = [&](const T* from) {
      V g{};
      for (int i = 0; i < count_; ++i) g[i] = from[(first_ + i) * size + at];
      return g;
    };
    if constexpr (kTangents) {
      const T* tangent = call_.grad_outputs_tangent;
      return {read(call_.grad_outputs), tangent != nullptr ? read(tangent) : V{}};
    } else {
      return read(call_.grad_outputs);
    }
  }
  static TD3_FAST_INLINE T stored(const N& x, int lane) {
    if constexpr (kTangents) {
      return x.t[lane];
    } else {
      return x[lane];
    }
  }
  // Lanes beyond the last sequence repeat it; their upstream gradient is zero.
  TD3_FAST_INLINE int64_t sequence(int lane) const { return first_ + (lane < count_ ? lane : count_ - 1); }
  TD3_FAST_INLINE int64_t position_of(int64_t r, int lane) const {
    return call_.positions[sequence(lane) * s_.asked + r];
  }

  void load_inputs(int64_t j, N* row) const {
    const int64_t d = s_.width;
    for (int i = 0; i < L; ++i) {
      const int64_t at = sequence(i) * call_.input_stride + j * d;
      const int64_t tangent_at = sequence(i) * call_.input_tangent_stride + j * d;
      for (int64_t f = 0; f < d; ++f) {
        if constexpr (kTangents) {
          row[f].v[i] = call_.inputs[at + f];
          row[f].t[i] = call_.inputs_tangent != nullptr ? call_.inputs_tangent[tangent_at + f] : T(0);
        } else {
          row[f][i] = call_.inputs[at + f];
        }
      }
    }
  }

  TD3_FAST_INLINE V survivors(const EncoderDropout<T>& site, int64_t stride, int64_t at) const {
    V factor{};
    for (int i = 0; i < L; ++i) {
      factor[i] = site.words[sequence(i) * stride + at] >= site.threshold ? site.scale : T(0);
    }
    return factor;
  }
  // Dropout of row j of a (batch, rows, d) tensor.
  void drop_hidden(int64_t index, int64_t rows, int64_t j, N* row) const {
    const EncoderDropout<T>& site = call_.dropout[index];
    if (site.words == nullptr) return;
    const int64_t d = s_.width;
    for (int64_t f = 0; f < d; ++f) row[f] = row[f] * survivors(site, rows * d, j * d + f);
  }

  // y = W x + b, W (out, in).
  void linear(int64_t weight, int64_t bias, int64_t out, int64_t in, const N* x, N* y) const {
    constexpr int kBlock = 4;
    const W w = w_.at(weight);
    int64_t i = 0;
    for (; i + kBlock <= out; i += kBlock) {
      N sum[kBlock];
      for (int b = 0; b < kBlock; ++b) sum[b] = bias >= 0 ? w_[bias + i + b] : N{};
      for (int64_t j = 0; j < in; ++j) {
        for (int b = 0; b < kBlock; ++b) w.add(sum + b, (i + b) * in + j, x[j]);
      }
      for (int b = 0; b < kBlock; ++b) y[i + b] = sum[b];
    }
    for (; i < out; ++i) {
      N sum = bias >= 0 ? w_[bias + i] : N{};
      for (int64_t j = 0; j < in; ++j) w.add(&sum, i * in + j, x[j]);
      y[i] = sum;
    }
  }
  // y (+)= Wᵀ x, W (out, in), x (out,).
  void linear_transposed(int64_t weight, int64_t out, int64_t in, const N* x, N* y, bool accumulate) const {
    constexpr int kBlock = 4;
    const W w = w_.at(weight);
    int64_t j = 0;
    for (; j + kBlock <= in; j += kBlock) {
      N sum[kBlock];
      for (int b = 0; b < kBlock; ++b) sum[b] = accumulate ? y[j + b] : N{};
      for (int64_t i = 0; i < out; ++i) {
        for (int b = 0; b < kBlock; ++b) w.add(sum + b, i * in + j + b, x[i]);
      }
      for (int b = 0; b < kBlock; ++b) y[j + b] = sum[b];
    }
    for (; j < in; ++j) {
      N sum = accumulate ? y[j] : N{};
      for (int64_t i = 0; i < out; ++i) w.add(&sum, i * in + j, x[i]);
      y[j] = sum;
    }
  }
  // The gradients of y = W x + b.
  void linear_gradients(
      int64_t weight, int64_t bias, int64_t out, int64_t in, const N* grad_y, const N* x) const {
    for (int64_t i = 0; i < out; ++i) {
      const N g = grad_y[i];
      V* sums = sums_ + weight + i * in;
      for (int64_t j = 0; j < in; ++j) add_gradient(sums + j, g, x[j]);
      if (bias >= 0) add_gradient(sums_ + bias + i, g);
    }
  }

  void norm(const N* x, int64_t gain, N* normed, N* deviation, N* y) const {
    const int64_t d = s_.width;
    const V share = T(1) / static_cast<T>(d) - V{};
    N mean{};
    for (int64_t f = 0; f < d; ++f) mean = mean + x[f];
    mean = mean * share;
    N variance{};
    for (int64_t f = 0; f < d; ++f) {
      normed[f] = x[f] - mean;
      variance = variance + normed[f] * normed[f];
    }
    const N inverse_deviation = inverse_sqrt(minus(variance * share, -call_.norm_eps - V{}));
    for (int64_t f = 0; f < d; ++f) {
      normed[f] = normed[f] * inverse_deviation;
      y[f] = normed[f] * w_[gain + f] + w_[gain + d + f];
    }
    *deviation = inverse_deviation;
  }
  // The gradient of `norm`'s output in, of its input out.
  void norm_backward(N* grad, int64_t gain, const N* normed, N inverse_deviation) const {
    const int64_t d = s_.width;
    const V share = T(1) / static_cast<T>(d) - V{};
    N mean{}, product{};
    for (int64_t f = 0; f < d; ++f) {
      add_gradient(sums_ + gain + f, grad[f], normed[f]);
      add_gradient(sums_ + gain + d + f, grad[f]);
      grad[f] = grad[f] * w_[gain + f];
      mean = mean + grad[f];
      product = product + grad[f] * normed[f];
    }
    mean = mean * share;
    product = product * share;
    for (int64_t f = 0; f < d; ++f) grad[f] = (grad[f] - mean - normed[f] * product) * inverse_deviation;
  }

  Block block_of(int64_t layer) const {
    const int64_t d = s_.width, inner = s_.inner;
    int64_t next =
        (s_.positions + 2) * d + layer * (4 * (d + 1) * d + 4 * d + (d + 1) * inner + (inner + 1) * d);
    const auto skip = [&](int64_t count) {
      const int64_t at = next;
      next += count;
      return at;
    };
    Block b;
    b.query = skip(d * d), b.query_bias = skip(d);
    b.key = skip(d * d), b.key_bias = skip(d);
    b.value = skip(d * d), b.value_bias = skip(d);
    b.output = skip(d * d), b.output_bias = skip(d);
    b.norm = skip(d), b.norm_bias = skip(d);
    b.up = skip(inner * d), b.up_bias = skip(inner);
    b.down = skip(d * inner), b.down_bias = skip(d);
    b.last_norm = skip(d), b.last_norm_bias = skip(d);
    return b;
  }
  bool everywhere(int64_t layer) const { return layer + 1 < s_.layers; }

  // Rows r of a block: all of them, or those at the asked positions.
  void gather(const N* inputs, int64_t r, N* to) const {
    const int64_t d = s_.width;
    for (int i = 0; i < L; ++i) {
      const N* from = inputs + position_of(r, i) * d;
      for (int64_t f = 0; f < d; ++f) {
        if constexpr (kTangents) {
          to[f].v[i] = from[f].v[i];
          to[f].t[i] = from[f].t[i];
        } else {
          to[f][i] = from[f][i];
        }
      }
    }
  }
  void scatter_add(const N* from, int64_t r, N* grad_inputs) const {
    const int64_t d = s_.width;
    for (int i = 0; i < L; ++i) {
      N* to = grad_inputs + position_of(r, i) * d;
      for (int64_t f = 0; f < d; ++f) {
        if constexpr (kTangents) {
          to[f].v[i] += from[f].v[i];
          to[f].t[i] += from[f].t[i];
        } else {
          to[f][i] += from[f][i];
        }
      }
    }
  }
  TD3_FAST_INLINE V last_key(int64_t layer, int64_t r) const {
    V last{};
    for (int i = 0; i < L; ++i) last[i] = static_cast<T>(everywhere(layer) ? r : position_of(r, i));
    return last;
  }
  int64_t keys(int64_t layer, int64_t r) const { return everywhere(layer) ? r + 1 : rows_; }

  // The factor of attention dropout for output r, head, key j, of (batch, heads, k, length).
  TD3_FAST_INLINE V attention_survivors(int64_t layer, int64_t head, int64_t r, int64_t j) const {
    const int64_t k = everywhere(layer) ? s_.length : s_.asked;
    return survivors(call_.dropout[1 + 3 * layer], s_.heads * k * s_.length, (head * k + r) * s_.length + j);
  }
  bool drops_attention(int64_t layer) const { return call_.dropout[1 + 3 * layer].words != nullptr; }

  void block_forward(int64_t layer, const N* inputs) {
    const int64_t d = s_.width, inner = s_.inner, heads = s_.heads, w = d / heads;
    const int64_t k = everywhere(layer) ? rows_ : s_.asked,
                  mask_rows = everywhere(layer) ? s_.length : s_.asked;
    const Block b = block_of(layer);
    const V scale = T(1) / scalar_sqrt(static_cast<T>(w)) - V{};
    Saved& saved = saved_[layer];
    saved.inputs = inputs, saved.k = k;
    saved.asked = take(k * d), saved.query = take(k * d), saved.context = take(k * d);
    saved.direction = take(k * heads * d), saved.mixed = take(k * heads * d);
    saved.weights = take(k * heads * rows_), saved.total = take(k * heads);
    saved.normed = take(k * d), saved.deviation = take(k), saved.attended = take(k * d);
    saved.raised = take(k * inner), saved.slope = take(k * inner), saved.bent = take(k * inner);
    saved.last_normed = take(k * d), saved.last_deviation = take(k), saved.outputs = take(k * d);
    N* sum = take(d);
    for (int64_t r = 0; r < k; ++r) {
      N* asked = saved.asked + r * d;
      if (everywhere(layer)) {
        for (int64_t f = 0; f < d; ++f) asked[f] = inputs[r * d + f];
      } else {
        gather(inputs, r, asked);
      }
      N *query = saved.query + r * d, *context = saved.context + r * d;
      linear(b.query, b.query_bias, d, d, asked, query);
      const V last = last_key(layer, r);
      for (int64_t head = 0; head < heads; ++head) {
        // q · (W h + b) = (Wᵀ q) · h plus the same for every key
        N* direction = saved.direction + (r * heads + head) * d;
        linear_transposed(b.key + head * w * d, w, d, query + head * w, direction, false);
        N* weights = saved.weights + (r * heads + head) * rows_;
        const int64_t num_keys = keys(layer, r);
        V peak = -3.4e38f - V{};
        for (int64_t j = 0; j < num_keys; ++j) {
          N score{};
          for (int64_t f = 0; f < d; ++f) score = score + direction[f] * inputs[j * d + f];
          weights[j] = score * scale;
          const V value = value_of(weights[j]);
          peak = (value > peak) & (static_cast<T>(j) <= last) ? value : peak;
        }
        N mass{};
        for (int64_t j = 0; j < num_keys; ++j) {
          weights[j] = where(static_cast<T>(j) <= last, exp_of(minus(weights[j], peak)));
          mass = mass + weights[j];
        }
        const N inverse_mass = inverse(mass);
        N* mixed = saved.mixed + (r * heads + head) * d;
        zero(mixed, d);
        N total{};
        for (int64_t j = 0; j < num_keys; ++j) {
          weights[j] = weights[j] * inverse_mass;
          const N weight =
              drops_attention(layer) ? weights[j] * attention_survivors(layer, head, r, j) : weights[j];
          total = total + weight;
          for (int64_t f = 0; f < d; ++f) mixed[f] = mixed[f] + weight * inputs[j * d + f];
        }
        saved.total[r * heads + head] = total;
        linear(b.value + head * w * d, -1, w, d, mixed, context + head * w);
        for (int64_t f = 0; f < w; ++f) {
          context[head * w + f] = context[head * w + f] + total * w_[b.value_bias + head * w + f];
        }
      }
      linear(b.output, b.output_bias, d, d, context, sum);
      drop_hidden(2 + 3 * layer, mask_rows, r, sum);
      for (int64_t f = 0; f < d; ++f) sum[f] = sum[f] + asked[f];
      N* attended = saved.attended + r * d;
      norm(sum, b.norm, saved.normed + r * d, saved.deviation + r, attended);
      N *raised = saved.raised + r * inner, *bent = saved.bent + r * inner;
      linear(b.up, b.up_bias, inner, d, attended, raised);
      for (int64_t f = 0; f < inner; ++f) gelu(raised[f], bent + f, saved.slope + r * inner + f);
      linear(b.down, b.down_bias, d, inner, bent, sum);
      drop_hidden(3 + 3 * layer, mask_rows, r, sum);
      for (int64_t f = 0; f < d; ++f) sum[f] = sum[f] + attended[f];
      norm(sum, b.last_norm, saved.last_normed + r * d, saved.last_deviation + r, saved.outputs + r * d);
    }
  }

  // grad (k, d) of the block's outputs is overwritten; grad_inputs (rows, d) is added to.
  void block_backward(int64_t layer, N* grad, N* grad_inputs) {
    const int64_t d = s_.width, inner = s_.inner, heads = s_.heads, w = d / heads;
    const int64_t mask_rows = everywhere(layer) ? s_.length : s_.asked;
    const Block b = block_of(layer);
    const V scale = T(1) / scalar_sqrt(static_cast<T>(w)) - V{};
    const Saved& saved = saved_[layer];
    N* const mark = next_;
    N *branch = take(d), *grad_raised = take(inner), *grad_context = take(d), *grad_mixed = take(d),
      *grad_direction = take(d), *grad_query = take(d), *grad_weights = take(rows_);
    for (int64_t r = 0; r < saved.k; ++r) {
      N* g = grad + r * d;
      norm_backward(g, b.last_norm, saved.last_normed + r * d, saved.last_deviation[r]);
      for (int64_t f = 0; f < d; ++f) branch[f] = g[f];
      drop_hidden(3 + 3 * layer, mask_rows, r, branch);
      linear_gradients(b.down, b.down_bias, d, inner, branch, saved.bent + r * inner);
      linear_transposed(b.down, d, inner, branch, grad_raised, false);
      for (int64_t f = 0; f < inner; ++f) grad_raised[f] = grad_raised[f] * saved.slope[r * inner + f];
      linear_gradients(b.up, b.up_bias, inner, d, grad_raised, saved.attended + r * d);
      linear_transposed(b.up, inner, d, grad_raised, g, true);
      norm_backward(g, b.norm, saved.normed + r * d, saved.deviation[r]);
      for (int64_t f = 0; f < d; ++f) branch[f] = g[f];
      drop_hidden(2 + 3 * layer, mask_rows, r, branch);
      linear_gradients(b.output, b.output_bias, d, d, branch, saved.context + r * d);
      linear_transposed(b.output, d, d, branch, grad_context, false);
      const N* query = saved.query + r * d;
      for (int64_t head = 0; head < heads; ++head) {
        const N* grad_head = grad_context + head * w;
        const N *mixed = saved.mixed + (r * heads + head) * d,
                *direction = saved.direction + (r * heads + head) * d;
        const N* weights = saved.weights + (r * heads + head) * rows_;
        const int64_t num_keys = keys(layer, r);
        linear_gradients(b.value + head * w * d, -1, w, d, grad_head, mixed);
        linear_transposed(b.value + head * w * d, w, d, grad_head, grad_mixed, false);
        N grad_total{};
        for (int64_t f = 0; f < w; ++f) {
          grad_total = grad_total + grad_head[f] * w_[b.value_bias + head * w + f];
          add_gradient(sums_ + b.value_bias + head * w + f, grad_head[f], saved.total[r * heads + head]);
        }
        N inner_product{};
        for (int64_t j = 0; j < num_keys; ++j) {
          N grad_weight = grad_total;
          for (int64_t f = 0; f < d; ++f) grad_weight = grad_weight + grad_mixed[f] * saved.inputs[j * d + f];
          N weight = weights[j];
          if (drops_attention(layer)) {
            const V factor = attention_survivors(layer, head, r, j);
            grad_weight = grad_weight * factor;
            weight = weight * factor;
          }
          for (int64_t f = 0; f < d; ++f) {
            grad_inputs[j * d + f] = grad_inputs[j * d + f] + weight * grad_mixed[f];
          }
          grad_weights[j] = grad_weight;
          inner_product = inner_product + weights[j] * grad_weight;
        }
        zero(grad_direction, d);
        for (int64_t j = 0; j < num_keys; ++j) {
          const N grad_score = weights[j] * (grad_weights[j] - inner_product) * scale;
          for (int64_t f = 0; f < d; ++f) {
            grad_direction[f] = grad_direction[f] + grad_score * saved.inputs[j * d + f];
            grad_inputs[j * d + f] = grad_inputs[j * d + f] + grad_score * direction[f];
          }
        }
        linear(b.key + head * w * d, -1, w, d, grad_direction, grad_query + head * w);
        linear_gradients(b.key + head * w * d, -1, w, d, query + head * w, grad_direction);
      }
      linear_gradients(b.query, b.query_bias, d, d, grad_query, saved.asked + r * d);
      linear_transposed(b.query, d, d, grad_query, g, true);
      if (everywhere(layer)) {
        for (int64_t f = 0; f < d; ++f) grad_inputs[r * d + f] = grad_inputs[r * d + f] + g[f];
      } else {
        scatter_add(g, r, grad_inputs);
      }
    }
    next_ = mark;
  }

  const EncoderCall<T>& call_;
  const EncoderSizes& s_;
  W w_;
  int64_t first_, count_, rows_;
  N* next_;
  N *normed_ = nullptr, *deviation_ = nullptr, *hidden_ = nullptr;
  V* sums_ = nullptr;
  Saved saved_[kMaxLayers];
};

template <typename T>
int64_t scratch_size(const EncoderSizes& sizes, bool tangents) {
  return tangents ? Pass<T, true>::scratch_size(sizes) : Pass<T, false>::scratch_size(sizes);
}
template <typename T, bool kTangents>
void forward(const EncoderCall<T>& call, int64_t first, int64_t count, void* scratch) {
  auto* pass = new (scratch) Pass<T, kTangents>(call, first, count, scratch);
  pass->forward();
  pass->write_outputs();
}
template <typename T, bool kTangents>
void backward(void* scratch, T* sums) {
  Pass<T, kTangents>::in(scratch)->backward(sums);
}
template <typename T>
void add_lanes(const T* sums, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) {
    T total = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) total += sums[i * kLanes<T> + lane];
    out[i] += total;
  }
}

template <typename T>
constexpr Encoder<T> kEncoder = {kLanes<T>,
                                 scratch_size<T>,
                                 {forward<T, false>, backward<T, false>},
                                 {forward<T, true>, backward<T, true>},
                                 add_lanes<T>};

}  // namespace

extern const Encoder<float> TD3_FAST_CONCAT(float_encoder_, TD3_FAST_INSTRUCTION_SET);
extern const Encoder<double> TD3_FAST_CONCAT(double_encoder_, TD3_FAST_INSTRUCTION_SET);
const Encoder<float> TD3_FAST_CONCAT(float_encoder_, TD3_FAST_INSTRUCTION_SET) = kEncoder<float>;
const Encoder<double> TD3_FAST_CONCAT(double_encoder_, TD3_FAST_INSTRUCTION_SET) = kEncoder<double>;

}  // namespace td3_fast::cpu
