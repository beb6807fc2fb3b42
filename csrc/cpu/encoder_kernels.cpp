// The encoder's passes for one instruction set; see encoder.h, and vectors.h for what may be used here.
//
// A pass is written once, for numbers N that are vectors of lanes or dual numbers of them (value and
// tangent). Of dual numbers' gradients only the tangents are summed and stored.

#include "encoder.h"
#include "lanes.h"
#include "numbers.h"

namespace td3_fast::cpu {
namespace {

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
    const int64_t k = most_upstream(s, rows);
    numbers += k * (6 * d + 2 * s.inner) + s.heads * d * 2 + rows * 2 + d;
    for (int64_t site = 0; site < 1 + 3 * s.layers; ++site) numbers += masks_size(s, site);
    numbers += norms(s) + 2 * widest(s);
    return kOwnSize + numbers * static_cast<int64_t>(sizeof(N));
  }

  // Rows of the gradients of a block's outputs, of the block that has most.
  static int64_t most_upstream(const EncoderSizes& s, int64_t rows) {
    return s.layers > 1 && rows > s.asked ? rows : s.asked;
  }
  // Numbers that have room for the masks of a dropout site.
  static int64_t masks_size(const EncoderSizes& s, int64_t site) {
    return site_size(s, site) * static_cast<int64_t>(sizeof(LaneMask)) / static_cast<int64_t>(sizeof(N)) + 1;
  }
  // Words of a sequence at a dropout site.
  static int64_t site_size(const EncoderSizes& s, int64_t site) {
    if (site == 0) return s.length * s.width;
    const int64_t k = (site - 1) / 3 + 1 < s.layers ? s.length : s.asked;
    return (site - 1) % 3 == 0 ? s.heads * k * s.length : k * s.width;
  }
  // Gradients that wait in lanes: those of gain and bias of every norm.
  static int64_t norms(const EncoderSizes& s) { return (1 + 2 * s.layers) * 2 * s.width; }
  static int64_t widest(const EncoderSizes& s) { return s.width > s.inner ? s.width : s.inner; }

  // The pass itself lies before its numbers.
  static void* operator new(decltype(sizeof(0)), void* scratch) { return scratch; }
  static Pass* in(void* scratch) { return static_cast<Pass*>(scratch); }

  void forward() {
    const int64_t d = s_.width;
    for (int64_t site = 0; site < 1 + 3 * s_.layers; ++site) make_masks(site);
    normed_ = take(rows_ * d);
    deviation_ = take(rows_);
    hidden_ = take(rows_ * d);
    N* row = take(d);
    for (int64_t j = 0; j < rows_; ++j) {
      load_inputs(j, row);
      for (int64_t f = 0; f < d; ++f) row[f] = row[f] + w_[j * d + f];
      norm(row, s_.positions * d, normed_ + j * d, deviation_ + j, hidden_ + j * d);
      drop_hidden(0, j, hidden_ + j * d);
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
    store_rows<T>(
        k * d, count_, [&](int64_t at) { return stored(outputs[at]); },
        [&](int lane) { return call_.outputs + (first_ + lane) * k * d; });
  }

  void backward(T* sums) {
    sums_ = sums;
    const int64_t d = s_.width, k = s_.asked;
    norm_sums_ = reinterpret_cast<V*>(take(norms(s_)));
    for (int64_t i = 0; i < norms(s_); ++i) norm_sums_[i] = V{};
    rows_of_grad_ = reinterpret_cast<T*>(take(widest(s_)));
    rows_of_input_ = reinterpret_cast<T*>(take(widest(s_)));
    N* grad = take(most_upstream(s_, rows_) * d);
    load_upstream(k * d, grad);
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
      drop_hidden(0, j, row);
      norm_backward(row, gain, norm_sums(0), normed_ + j * d, deviation_[j]);
      add_lanes<T>(d, [&](int64_t f) { return stored(row[f]); }, sums_ + j * d);
    }
    add_norm_sums(gain, 0);
    for (int64_t layer = 0; layer < s_.layers; ++layer) {
      const Block b = block_of(layer);
      add_norm_sums(b.norm, 1 + 2 * layer);
      add_norm_sums(b.last_norm, 2 + 2 * layer);
    }
    if (call_.grad_inputs == nullptr) return;
    const auto row_of = [&](int lane) {
      return call_.grad_inputs + (first_ + lane) * call_.grad_input_stride;
    };
    store_rows<T>(rows_ * d, count_, [&](int64_t at) { return stored(grad_hidden[at]); }, row_of);
    for (int i = 0; i < count_; ++i) {
      for (int64_t at = rows_ * d; at < s_.length * d; ++at) row_of(i)[at] = 0;
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
  // The gradients of the outputs, zero in lanes beyond the last sequence.
  void load_upstream(int64_t count, N* to) const {
    const auto row_of = [&](const T* from) {
      return [this, from, count](int lane) { return from + (first_ + lane) * count; };
    };
    if constexpr (kTangents) {
      load_rows<T>(count, count_, row_of(call_.grad_outputs), [&](int64_t at, V x) { to[at] = {x, V{}}; });
      if (call_.grad_outputs_tangent == nullptr) return;
      load_rows<T>(count, count_, row_of(call_.grad_outputs_tangent), [&](int64_t at, V x) { to[at].t = x; });
    } else {
      load_rows<T>(count, count_, row_of(call_.grad_outputs), [&](int64_t at, V x) { to[at] = x; });
    }
  }
  static TD3_FAST_INLINE V stored(const N& x) {
    if constexpr (kTangents) {
      return x.t;
    } else {
      return x;
    }
  }
  // Lanes beyond the last sequence repeat it; their upstream gradient is zero.
  TD3_FAST_INLINE int64_t sequence(int lane) const { return first_ + (lane < count_ ? lane : count_ - 1); }
  TD3_FAST_INLINE int64_t position_of(int64_t r, int lane) const {
    return call_.positions[sequence(lane) * s_.asked + r];
  }

  void load_inputs(int64_t j, N* row) const {
    const int64_t d = s_.width;
    const auto row_of = [&](const T* from, int64_t stride) {
      return [this, from, stride, at = j * d](int lane) { return from + sequence(lane) * stride + at; };
    };
    const auto values = row_of(call_.inputs, call_.input_stride);
    if constexpr (kTangents) {
      load_rows<T>(d, L, values, [&](int64_t f, V x) { row[f] = {x, V{}}; });
      if (call_.inputs_tangent == nullptr) return;
      load_rows<T>(d, L, row_of(call_.inputs_tangent, call_.input_tangent_stride),
                   [&](int64_t f, V x) { row[f].t = x; });
    } else {
      load_rows<T>(d, L, values, [&](int64_t f, V x) { row[f] = x; });
    }
  }

  void make_masks(int64_t site) {
    const EncoderDropout<T>& dropout = call_.dropout[site];
    if (dropout.words == nullptr) return;
    masks_[site] = reinterpret_cast<LaneMask*>(take(masks_size(s_, site)));
    const int64_t size = site_size(s_, site);
    lane_masks(
        size, L, [&](int lane) { return dropout.words + sequence(lane) * size; }, dropout.threshold,
        masks_[site]);
  }
  // The factors of an element that dropout acts on.
  TD3_FAST_INLINE V survivors(int64_t site, int64_t at) const {
    return in_lanes<T>(masks_[site][at], call_.dropout[site].scale - V{});
  }
  // Dropout of row j of a (batch, rows, d) tensor.
  void drop_hidden(int64_t site, int64_t j, N* row) const {
    if (call_.dropout[site].words == nullptr) return;
    const int64_t d = s_.width;
    for (int64_t f = 0; f < d; ++f) row[f] = row[f] * survivors(site, j * d + f);
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
  // The gradients of y = W x + b: a product whose depth is the lanes.
  void linear_gradients(
      int64_t weight, int64_t bias, int64_t out, int64_t in, const N* grad_y, const N* x) const {
    const auto rows_of = [](T* to, int64_t width) {
      return [to, width](int lane) { return to + lane * width; };
    };
    const auto grads = rows_of(rows_of_grad_, out), inputs = rows_of(rows_of_input_, in);
    if constexpr (kTangents) {
      const auto grads_below = rows_of(rows_of_grad_ + L * out, out);
      const auto inputs_below = rows_of(rows_of_input_ + L * in, in);
      store_rows<T>(out, L, [&](int64_t i) { return grad_y[i].v; }, grads);
      store_rows<T>(out, L, [&](int64_t i) { return grad_y[i].t; }, grads_below);
      store_rows<T>(in, L, [&](int64_t j) { return x[j].t; }, inputs);
      store_rows<T>(in, L, [&](int64_t j) { return x[j].v; }, inputs_below);
    } else {
      store_rows<T>(out, L, [&](int64_t i) { return grad_y[i]; }, grads);
      store_rows<T>(in, L, [&](int64_t j) { return x[j]; }, inputs);
    }
    add_products<T>(kTangents ? 2 * L : L, out, in, rows_of_grad_, rows_of_input_, sums_ + weight);
    if (bias < 0) return;
    const T* rows = rows_of_grad_ + (kTangents ? L * out : 0);
    for (int lane = 0; lane < L; ++lane, rows += out) {
      for (int64_t i = 0; i < out; ++i) sums_[bias + i] += rows[i];
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
  // The gradient of `norm`'s output in, of its input out; sums (2, d) of lanes, for gain and bias.
  void norm_backward(N* grad, int64_t gain, V* sums, const N* normed, N inverse_deviation) const {
    const int64_t d = s_.width;
    const V share = T(1) / static_cast<T>(d) - V{};
    N mean{}, product{};
    for (int64_t f = 0; f < d; ++f) {
      add_gradient(sums + f, grad[f], normed[f]);
      add_gradient(sums + d + f, grad[f]);
      grad[f] = grad[f] * w_[gain + f];
      mean = mean + grad[f];
      product = product + grad[f] * normed[f];
    }
    mean = mean * share;
    product = product * share;
    for (int64_t f = 0; f < d; ++f) grad[f] = (grad[f] - mean - normed[f] * product) * inverse_deviation;
  }

  V* norm_sums(int64_t norm) const { return norm_sums_ + norm * 2 * s_.width; }
  void add_norm_sums(int64_t gain, int64_t norm) const {
    const V* sums = norm_sums(norm);
    add_lanes<T>(2 * s_.width, [&](int64_t f) { return sums[f]; }, sums_ + gain);
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
    return survivors(1 + 3 * layer, (head * k + r) * s_.length + j);
  }
  bool drops_attention(int64_t layer) const { return call_.dropout[1 + 3 * layer].words != nullptr; }

  // From the query of row r to its context, one head of it.
  void attend(int64_t layer, const Block& b, int64_t r, int64_t head) {
    const int64_t d = s_.width, w = d / s_.heads, num_keys = keys(layer, r), at = r * s_.heads + head;
    Saved& saved = saved_[layer];
    const N* inputs = saved.inputs;
    const V scale = T(1) / scalar_sqrt(static_cast<T>(w)) - V{}, last = last_key(layer, r);
    N *direction = saved.direction + at * d, *weights = saved.weights + at * rows_,
      *mixed = saved.mixed + at * d, *context = saved.context + r * d + head * w;
    // q · (W h + b) = (Wᵀ q) · h plus the same for every key
    linear_transposed(b.key + head * w * d, w, d, saved.query + r * d + head * w, direction, false);
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
    zero(mixed, d);
    N total{};
    for (int64_t j = 0; j < num_keys; ++j) {
      weights[j] = weights[j] * inverse_mass;
      const N weight =
          drops_attention(layer) ? weights[j] * attention_survivors(layer, head, r, j) : weights[j];
      total = total + weight;
      for (int64_t f = 0; f < d; ++f) mixed[f] = mixed[f] + weight * inputs[j * d + f];
    }
    saved.total[at] = total;
    linear(b.value + head * w * d, -1, w, d, mixed, context);
    for (int64_t f = 0; f < w; ++f) context[f] = context[f] + total * w_[b.value_bias + head * w + f];
  }

  // From the gradient of that context (w,) to those of the query (w,), which is written, and of the inputs
  // (rows, d), which are added to.
  void attend_backward(int64_t layer,
                       const Block& b,
                       int64_t r,
                       int64_t head,
                       const N* grad_context,
                       N* grad_query,
                       N* grad_inputs) {
    const int64_t d = s_.width, w = d / s_.heads, num_keys = keys(layer, r), at = r * s_.heads + head;
    const Saved& saved = saved_[layer];
    const V scale = T(1) / scalar_sqrt(static_cast<T>(w)) - V{};
    const N *direction = saved.direction + at * d, *weights = saved.weights + at * rows_,
            total = saved.total[at];
    N* const mark = next_;
    N *grad_mixed = take(d), *grad_direction = take(d), *grad_weights = take(rows_);
    linear_gradients(b.value + head * w * d, -1, w, d, grad_context, saved.mixed + at * d);
    linear_transposed(b.value + head * w * d, w, d, grad_context, grad_mixed, false);
    N grad_total{};
    for (int64_t f = 0; f < w; ++f) {
      grad_total = grad_total + grad_context[f] * w_[b.value_bias + head * w + f];
    }
    const auto grad_bias = [&](int64_t f) {
      V sum{};
      add_gradient(&sum, grad_context[f], total);
      return sum;
    };
    add_lanes<T>(w, grad_bias, sums_ + b.value_bias + head * w);
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
    linear(b.key + head * w * d, -1, w, d, grad_direction, grad_query);
    linear_gradients(b.key + head * w * d, -1, w, d, saved.query + r * d + head * w, grad_direction);
    next_ = mark;
  }

  void block_forward(int64_t layer, const N* inputs) {
    const int64_t d = s_.width, inner = s_.inner, heads = s_.heads;
    const int64_t k = everywhere(layer) ? rows_ : s_.asked;
    const Block b = block_of(layer);
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
      const N* context = saved.context + r * d;
      linear(b.query, b.query_bias, d, d, asked, saved.query + r * d);
      for (int64_t head = 0; head < heads; ++head) attend(layer, b, r, head);
      linear(b.output, b.output_bias, d, d, context, sum);
      drop_hidden(2 + 3 * layer, r, sum);
      for (int64_t f = 0; f < d; ++f) sum[f] = sum[f] + asked[f];
      N* attended = saved.attended + r * d;
      norm(sum, b.norm, saved.normed + r * d, saved.deviation + r, attended);
      N *raised = saved.raised + r * inner, *bent = saved.bent + r * inner;
      linear(b.up, b.up_bias, inner, d, attended, raised);
      for (int64_t f = 0; f < inner; ++f) gelu(raised[f], bent + f, saved.slope + r * inner + f);
      linear(b.down, b.down_bias, d, inner, bent, sum);
      drop_hidden(3 + 3 * layer, r, sum);
      for (int64_t f = 0; f < d; ++f) sum[f] = sum[f] + attended[f];
      norm(sum, b.last_norm, saved.last_normed + r * d, saved.last_deviation + r, saved.outputs + r * d);
    }
  }

  // grad (k, d) of the block's outputs is overwritten; grad_inputs (rows, d) is added to.
  void block_backward(int64_t layer, N* grad, N* grad_inputs) {
    const int64_t d = s_.width, inner = s_.inner, w = d / s_.heads;
    const Block b = block_of(layer);
    const Saved& saved = saved_[layer];
    N* const mark = next_;
    N *branch = take(d), *grad_raised = take(inner), *grad_context = take(d), *grad_query = take(d);
    for (int64_t r = 0; r < saved.k; ++r) {
      N* g = grad + r * d;
      norm_backward(g, b.last_norm, norm_sums(2 + 2 * layer), saved.last_normed + r * d,
                    saved.last_deviation[r]);
      for (int64_t f = 0; f < d; ++f) branch[f] = g[f];
      drop_hidden(3 + 3 * layer, r, branch);
      linear_gradients(b.down, b.down_bias, d, inner, branch, saved.bent + r * inner);
      linear_transposed(b.down, d, inner, branch, grad_raised, false);
      for (int64_t f = 0; f < inner; ++f) grad_raised[f] = grad_raised[f] * saved.slope[r * inner + f];
      linear_gradients(b.up, b.up_bias, inner, d, grad_raised, saved.attended + r * d);
      linear_transposed(b.up, inner, d, grad_raised, g, true);
      norm_backward(g, b.norm, norm_sums(1 + 2 * layer), saved.normed + r * d, saved.deviation[r]);
      for (int64_t f = 0; f < d; ++f) branch[f] = g[f];
      drop_hidden(2 + 3 * layer, r, branch);
      linear_gradients(b.output, b.output_bias, d, d, branch, saved.context + r * d);
      linear_transposed(b.output, d, d, branch, grad_context, false);
      for (int64_t head = 0; head < s_.heads; ++head) {
        attend_backward(layer, b, r, head, grad_context + head * w, grad_query + head * w, grad_inputs);
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
  T* sums_ = nullptr;
  V* norm_sums_ = nullptr;
  T *rows_of_grad_ = nullptr, *rows_of_input_ = nullptr;
  LaneMask* masks_[kMaxSites] = {};
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
constexpr Encoder<T> kEncoder = {kLanes<T>,
                                 scratch_size<T>,
                                 {forward<T, false>, backward<T, false>},
                                 {forward<T, true>, backward<T, true>}};

}  // namespace

extern const Encoder<float> TD3_FAST_CONCAT(float_encoder_, TD3_FAST_INSTRUCTION_SET);
extern const Encoder<double> TD3_FAST_CONCAT(double_encoder_, TD3_FAST_INSTRUCTION_SET);
const Encoder<float> TD3_FAST_CONCAT(float_encoder_, TD3_FAST_INSTRUCTION_SET) = kEncoder<float>;
const Encoder<double> TD3_FAST_CONCAT(double_encoder_, TD3_FAST_INSTRUCTION_SET) = kEncoder<double>;

}  // namespace td3_fast::cpu
