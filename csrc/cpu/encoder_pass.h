// The encoder's passes for one instruction set; see encoder.h, and vectors.h for what may be used here.
//
// A pass is written once, for numbers N that are vectors of lanes or dual numbers of them (value and
// tangent). Of dual numbers' gradients only the tangents are summed and stored.
#pragma once

#include "encoder.h"
#include "products.h"

namespace td3_fast::cpu {
namespace {

template <typename T, bool kTangents>
class Pass {
  using P = Products<T, kTangents>;
  using V = Vector<T>;
  using W = typename P::W;
  using N = typename P::N;
  using Rows = typename P::Rows;
  using Left = typename P::Left;
  using Own = typename P::Own;
  using Nothing = typename P::Nothing;
  using Itself = typename P::Itself;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kOwnSize = 4096;  // bytes of scratch for the pass itself
  static constexpr int64_t kTile = 4;        // rows of a block from their queries to their outputs at once

  // Where a block's parameters begin in the vector.
  struct Block {
    int64_t query, query_bias, key, key_bias, value, value_bias, output, output_bias, norm, norm_bias, up,
        up_bias, down, down_bias, last_norm, last_norm_bias;
  };

  // What the backward pass needs of a block; k rows are asked of it.
  struct Saved {
    const N* inputs;   // (rows, d)
    N* asked;          // (k, d)
    N *keys, *values;  // (rows, d) of all heads; null where attention is to the inputs
    N *query, *direction, *weights, *mixed, *total, *context, *normed, *deviation, *attended, *slope, *bent,
        *last_normed, *last_deviation, *outputs;
    int64_t k;
  };

 public:
  TD3_FAST_INLINE Pass(const EncoderCall<T>& call, int64_t first, int64_t count, void* scratch, bool keeps)
      : call_(call),
        s_(call.sizes),
        first_(first),
        count_(count),
        keeps_(keeps),
        next_(reinterpret_cast<N*>(static_cast<unsigned char*>(scratch) + kOwnSize)) {
    static_assert(sizeof(Pass) <= kOwnSize);
    if constexpr (kTangents) {
      w_ = {call.parameters, call.parameters_tangent};
    } else {
      w_ = {call.parameters};
    }
    rows_ = asked_ = 0;
    for (int64_t r = 0; r < s_.asked; ++r) {
      for (int i = 0; i < L; ++i) {
        const int64_t position = own_positions(i)[r];
        rows_ = position >= rows_ ? position + 1 : rows_;
        asked_ = position >= 0 ? r + 1 : asked_;
      }
    }
    if (!s_.bidirectional) return;
    for (int i = 0; i < L; ++i) {
      const int64_t last = own_positions(i)[s_.asked];
      last_seen_[i] = static_cast<T>(last);
      rows_ = last >= rows_ ? last + 1 : rows_;
    }
  }

  static int64_t scratch_size(const EncoderSizes& s) {
    const int64_t d = s.width, rows = s.length;
    int64_t numbers = (2 * rows + 1) * d + rows, most_made = 0;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      const int64_t k = layer + 1 < s.layers ? rows : s.asked;
      // one head makes keys only where that is for fewer rows than are asked for
      const int64_t made = 2 * (s.heads > 1 || rows < k ? rows : k) * d, direct = k * s.heads * (2 * d + 1);
      numbers += k * (7 * d + s.heads * rows + 2 * s.inner + 2) + (direct > made ? direct : made);
      most_made = made > most_made ? made : most_made;
    }
    numbers += (most_upstream(s, rows) + rows) * d + most_made + kTile * (5 * d + s.inner + 2 * rows);
    for (int64_t site = 0; site < 1 + 3 * s.layers; ++site) numbers += masks_size(s, site);
    numbers += norms(s) + 2 * kTile * widest(s);
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

  void forward();  // encoder_forward.h
  void write_outputs() const;
  void backward(T* sums);  // encoder_backward.h

 private:
  N* take(int64_t count) {
    N* taken = next_;
    next_ += count;
    return taken;
  }
  static void zero(N* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = N{};
  }
  // The gradients of the outputs, zero in lanes beyond the last sequence and where nothing is asked.
  void load_upstream(N* to) const;
  // Lanes beyond the last sequence repeat it; their upstream gradient is zero.
  TD3_FAST_INLINE int64_t sequence(int lane) const {
    return call_.order[first_ + (lane < count_ ? lane : count_ - 1)];
  }
  TD3_FAST_INLINE const int64_t* own_positions(int lane) const {
    return call_.positions + sequence(lane) * (s_.asked + (s_.bidirectional ? 1 : 0));
  }
  // Of what is computed for row r: of the first input where nothing is asked.
  TD3_FAST_INLINE int64_t position_of(int64_t r, int lane) const {
    const int64_t position = own_positions(lane)[r];
    return position >= 0 ? position : 0;
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

  // y = W x + b of each row, W (out, in); without a bias where that is negative.
  void linear(int64_t weight, int64_t bias, int64_t out, int64_t in, int64_t rows, Rows x, Rows y) const {
    if (bias < 0) {
      P::linear(w_.at(weight), out, in, rows, x, y, Nothing{});
    } else {
      P::linear(w_.at(weight), out, in, rows, x, y, typename P::Bias{w_.at(bias)});
    }
  }
  // y = Wᵀ x of each row, W (out, in), x (rows, out); added to y where it starts from itself.
  template <typename Start>
  void linear_transposed(
      int64_t weight, int64_t out, int64_t in, int64_t rows, Rows x, Rows y, Start start) const {
    P::linear_transposed(w_.at(weight), out, in, rows, x, y, start);
  }
  // The gradients of y = W x + b, at most kTile of rows at once.
  void linear_gradients(
      int64_t weight, int64_t bias, int64_t out, int64_t in, int64_t rows, Rows grad_y, Rows x) const {
    for (int64_t first = 0; first < rows; first += kTile) {
      const int64_t count = rows - first < kTile ? rows - first : kTile;
      P::weight_gradients(out, in, count, grad_y.from(first, 0), x.from(first, 0), rows_of_grad_,
                          rows_of_input_, sums_ + weight);
      if (bias < 0) continue;
      for (int64_t r = first; r < first + count; ++r) {
        const N* g = grad_y.at + r * grad_y.row;
        add_lanes<T>(out, [&](int64_t i) { return P::stored(g[i]); }, sums_ + bias);
      }
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
  // The last key that row r of a block sees.
  TD3_FAST_INLINE V last_key(int64_t layer, int64_t r) const {
    if (s_.bidirectional) return last_seen_;
    V last{};
    for (int i = 0; i < L; ++i) last[i] = static_cast<T>(everywhere(layer) ? r : position_of(r, i));
    return last;
  }
  // As many keys as the rows before row `end` of a block see.
  int64_t keys(int64_t layer, int64_t end) const {
    return everywhere(layer) && !s_.bidirectional ? end : rows_;
  }

  // The factor of attention dropout for output r, head, key j, of (batch, heads, k, length).
  TD3_FAST_INLINE V attention_survivors(int64_t layer, int64_t head, int64_t r, int64_t j) const {
    const int64_t k = everywhere(layer) ? s_.length : s_.asked;
    return survivors(1 + 3 * layer, (head * k + r) * s_.length + j);
  }
  bool drops_attention(int64_t layer) const { return call_.dropout[1 + 3 * layer].words != nullptr; }

  // Whether keys and values of all inputs cost less than attention to the inputs themselves, head by head:
  // q · (W h + b) = (Wᵀ q) · h plus the same for every key.
  bool makes_keys(int64_t k) const {
    const int64_t d = s_.width;
    return rows_ * d + k * rows_ < k * d + s_.heads * k * rows_;
  }
  // What a head compares its queries with and mixes, (rows, width) each.
  struct Attended {
    Rows keys, values;
    int64_t width;
  };
  Attended attended_by(const Saved& saved, int64_t head) const {
    const int64_t d = s_.width, w = d / s_.heads;
    if (saved.keys == nullptr) return {inputs_of(saved), inputs_of(saved), d};
    return {{saved.keys + head * w, d}, {saved.values + head * w, d}, w};
  }
  Rows inputs_of(const Saved& saved) const { return {const_cast<N*>(saved.inputs), s_.width}; }

  // Where row r of what the backward pass needs is: a forward pass alone keeps a tile of it.
  int64_t place(int64_t r) const { return keeps_ ? r : r % kTile; }

  // From the queries of rows first, ..., end - 1 to their contexts, one head of them.
  void attend(int64_t layer, const Block& b, int64_t first, int64_t end, int64_t head);

  // From the gradients of those contexts to those of the queries, which are written, and of keys and values,
  // which are added to: those are the gradients of the inputs where attention is to these.
  void attend_backward(int64_t layer,
                       const Block& b,
                       int64_t first,
                       int64_t end,
                       int64_t head,
                       Rows grad_context,
                       Rows grad_query,
                       Attended grads);

  void block_forward(int64_t layer, const N* inputs);

  // grad (k, d) of the block's outputs is overwritten; grad_inputs (rows, d) is added to.
  void block_backward(int64_t layer, N* grad, N* grad_inputs);

  const EncoderCall<T>& call_;
  const EncoderSizes& s_;
  W w_;
  int64_t first_, count_;
  bool keeps_;            // what the backward pass needs
  int64_t rows_, asked_;  // of inputs and of outputs, as many as some lane has
  V last_seen_{};         // where attention goes both ways
  N* next_;
  N *normed_ = nullptr, *deviation_ = nullptr, *hidden_ = nullptr;
  T* sums_ = nullptr;
  V* norm_sums_ = nullptr;
  T *rows_of_grad_ = nullptr, *rows_of_input_ = nullptr;
  LaneMask* masks_[kMaxSites] = {};
  Saved saved_[kMaxLayers];
};

}  // namespace
}  // namespace td3_fast::cpu
