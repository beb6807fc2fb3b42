// The encoder's pass backward: see encoder_pass.h.
#pragma once

#include "encoder_pass.h"

namespace td3_fast::cpu {
namespace {

template <typename T, bool kTangents>
void Pass<T, kTangents>::backward(T* sums) {
  sums_ = sums;
  const int64_t d = s_.width;
  norm_sums_ = reinterpret_cast<V*>(take(norms(s_)));
  for (int64_t i = 0; i < norms(s_); ++i) norm_sums_[i] = V{};
  rows_of_grad_ = reinterpret_cast<T*>(take(kTile * widest(s_)));
  rows_of_input_ = reinterpret_cast<T*>(take(kTile * widest(s_)));
  N* grad = take(most_upstream(s_, rows_) * d);
  load_upstream(grad);
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
    add_lanes<T>(d, [&](int64_t f) { return P::stored(row[f]); }, sums_ + j * d);
  }
  add_norm_sums(gain, 0);
  for (int64_t layer = 0; layer < s_.layers; ++layer) {
    const Block b = block_of(layer);
    add_norm_sums(b.norm, 1 + 2 * layer);
    add_norm_sums(b.last_norm, 2 + 2 * layer);
  }
  if (call_.grad_inputs == nullptr) return;
  const auto row_of = [&](int lane) { return call_.grad_inputs + sequence(lane) * call_.grad_input_stride; };
  store_rows<T>(rows_ * d, count_, [&](int64_t at) { return P::stored(grad_hidden[at]); }, row_of);
  for (int i = 0; i < count_; ++i) {
    for (int64_t at = rows_ * d; at < s_.length * d; ++at) row_of(i)[at] = 0;
  }
}

template <typename T, bool kTangents>
void Pass<T, kTangents>::load_upstream(N* to) const {
  const int64_t d = s_.width, count = asked_ * d;
  const auto row_of = [&](const T* from) {
    return [this, from](int lane) { return from + sequence(lane) * s_.asked * s_.width; };
  };
  if constexpr (kTangents) {
    load_rows<T>(count, count_, row_of(call_.grad_outputs), [&](int64_t at, V x) { to[at] = {x, V{}}; });
    if (call_.grad_outputs_tangent != nullptr) {
      load_rows<T>(count, count_, row_of(call_.grad_outputs_tangent), [&](int64_t at, V x) { to[at].t = x; });
    }
  } else {
    load_rows<T>(count, count_, row_of(call_.grad_outputs), [&](int64_t at, V x) { to[at] = x; });
  }
  if (!s_.bidirectional) return;
  for (int64_t r = 0; r < asked_; ++r) {
    V position{};
    for (int i = 0; i < L; ++i) position[i] = static_cast<T>(own_positions(i)[r]);
    for (int64_t f = 0; f < d; ++f) to[r * d + f] = where(position >= 0, to[r * d + f]);
  }
}

template <typename T, bool kTangents>
void Pass<T, kTangents>::block_backward(int64_t layer, N* grad, N* grad_inputs) {
  const int64_t d = s_.width, inner = s_.inner, w = d / s_.heads;
  const Block b = block_of(layer);
  const Saved& saved = saved_[layer];
  N* const mark = next_;
  const Rows branch{take(kTile * d), d}, grad_context{take(kTile * d), d}, grad_query{take(kTile * d), d};
  const Rows grad_raised{take(kTile * inner), inner}, to_inputs{grad_inputs, d};
  Rows grad_keys{nullptr, d}, grad_values{nullptr, d};
  if (saved.keys != nullptr) {
    grad_keys.at = take(rows_ * d), grad_values.at = take(rows_ * d);
    zero(grad_keys, rows_ * d), zero(grad_values, rows_ * d);
  }
  for (int64_t first = 0; first < saved.k; first += kTile) {
    const int64_t end = first + kTile < saved.k ? first + kTile : saved.k, rows = end - first;
    const auto of_tile = [&](N* at, int64_t width) { return Rows{at + first * width, width}; };
    const Rows g = of_tile(grad, d);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = first + r;
      norm_backward(g.at + r * d, b.last_norm, norm_sums(2 + 2 * layer), saved.last_normed + at * d,
                    saved.last_deviation[at]);
      for (int64_t f = 0; f < d; ++f) branch.at[r * d + f] = g.at[r * d + f];
      drop_hidden(3 + 3 * layer, at, branch.at + r * d);
    }
    linear_gradients(b.down, b.down_bias, d, inner, rows, branch, of_tile(saved.bent, inner));
    linear_transposed(b.down, d, inner, rows, branch, grad_raised, Nothing{});
    for (int64_t i = 0; i < rows * inner; ++i) {
      grad_raised.at[i] = grad_raised.at[i] * saved.slope[first * inner + i];
    }
    linear_gradients(b.up, b.up_bias, inner, d, rows, grad_raised, of_tile(saved.attended, d));
    linear_transposed(b.up, inner, d, rows, grad_raised, g, Itself{});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = first + r;
      norm_backward(g.at + r * d, b.norm, norm_sums(1 + 2 * layer), saved.normed + at * d,
                    saved.deviation[at]);
      for (int64_t f = 0; f < d; ++f) branch.at[r * d + f] = g.at[r * d + f];
      drop_hidden(2 + 3 * layer, at, branch.at + r * d);
    }
    linear_gradients(b.output, b.output_bias, d, d, rows, branch, of_tile(saved.context, d));
    linear_transposed(b.output, d, d, rows, branch, grad_context, Nothing{});
    for (int64_t head = 0; head < s_.heads; ++head) {
      const Attended grads = saved.keys == nullptr
                                 ? Attended{to_inputs, to_inputs, d}
                                 : Attended{grad_keys.from(0, head * w), grad_values.from(0, head * w), w};
      attend_backward(layer, b, first, end, head, grad_context.from(0, head * w),
                      grad_query.from(0, head * w), grads);
    }
    linear_gradients(b.query, b.query_bias, d, d, rows, grad_query, of_tile(saved.asked, d));
    linear_transposed(b.query, d, d, rows, grad_query, g, Itself{});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = first + r;
      if (everywhere(layer)) {
        for (int64_t f = 0; f < d; ++f) {
          grad_inputs[at * d + f] = grad_inputs[at * d + f] + g.at[r * d + f];
        }
      } else {
        scatter_add(g.at + r * d, at, grad_inputs);
      }
    }
  }
  if (saved.keys != nullptr) {
    // the softmax does not see the bias of keys
    linear_gradients(b.key, -1, d, d, rows_, grad_keys, inputs_of(saved));
    linear_gradients(b.value, b.value_bias, d, d, rows_, grad_values, inputs_of(saved));
    linear_transposed(b.key, d, d, rows_, grad_keys, to_inputs, Itself{});
    linear_transposed(b.value, d, d, rows_, grad_values, to_inputs, Itself{});
  }
  next_ = mark;
}

template <typename T, bool kTangents>
void Pass<T, kTangents>::attend_backward(int64_t layer,
                                         const Block& b,
                                         int64_t first,
                                         int64_t end,
                                         int64_t head,
                                         Rows grad_context,
                                         Rows grad_query,
                                         Attended grads) {
  const int64_t d = s_.width, w = d / s_.heads, rows = end - first, num_keys = keys(layer, end);
  const int64_t every = s_.heads * rows_;
  const Saved& saved = saved_[layer];
  const Attended to = attended_by(saved, head);
  const bool direct = saved.keys == nullptr;
  const V scale = T(1) / scalar_sqrt(static_cast<T>(w)) - V{};
  const Rows query = Rows{saved.query, d}.from(first, head * w);
  const Rows direction = direct ? Rows{saved.direction, s_.heads * d}.from(first, head * d) : query;
  const N* weights = saved.weights + first * every + head * rows_;
  N* const mark = next_;
  Rows grad_mixed = grad_context, grad_direction = grad_query;
  if (direct) {
    grad_mixed = {take(rows * d), d}, grad_direction = {take(rows * d), d};
    const Rows mixed = Rows{saved.mixed, s_.heads * d}.from(first, head * d);
    linear_gradients(b.value + head * w * d, -1, w, d, rows, grad_context, mixed);
    linear_transposed(b.value + head * w * d, w, d, rows, grad_context, grad_mixed, Nothing{});
  }
  const Rows grad_scores{take(rows * num_keys), num_keys};
  P::product(rows, num_keys, to.width, grad_mixed, Own{to.values.at, 1, to.values.row}, Nothing{},
             grad_scores);
  const bool drops = drops_attention(layer);
  const N* surviving = weights;
  const int64_t surviving_row = drops ? num_keys : every;
  N* left = nullptr;
  if (drops) surviving = left = take(rows * num_keys);
  for (int64_t r = 0; r < rows; ++r) {
    const N* weight = weights + r * every;
    N* grad = grad_scores.at + r * num_keys;
    N grad_total{};
    if (direct) {
      const N* g = grad_context.at + r * grad_context.row;
      const N total = saved.total[(first + r) * s_.heads + head];
      for (int64_t f = 0; f < w; ++f) {
        add_product(&grad_total, g[f], w_[b.value_bias + head * w + f]);
      }
      const auto grad_bias = [&](int64_t f) {
        V sum{};
        add_gradient(&sum, g[f], total);
        return sum;
      };
      add_lanes<T>(w, grad_bias, sums_ + b.value_bias + head * w);
    }
    N inner_product{};
    for (int64_t j = 0; j < num_keys; ++j) {
      grad[j] = grad[j] + grad_total;
      if (drops) {
        const V factor = attention_survivors(layer, head, first + r, j);
        grad[j] = grad[j] * factor;
        left[r * num_keys + j] = weight[j] * factor;
      }
      add_product(&inner_product, weight[j], grad[j]);
    }
    for (int64_t j = 0; j < num_keys; ++j) grad[j] = weight[j] * (grad[j] - inner_product) * scale;
  }
  P::product(num_keys, to.width, rows, Left{surviving, 1, surviving_row},
             Own{grad_mixed.at, grad_mixed.row, 1}, Itself{}, grads.values);
  P::product(rows, to.width, num_keys, grad_scores, Own{to.keys.at, to.keys.row, 1}, Nothing{},
             grad_direction);
  P::product(num_keys, to.width, rows, Left{grad_scores.at, 1, num_keys}, Own{direction.at, direction.row, 1},
             Itself{}, grads.keys);
  if (direct) {
    linear(b.key + head * w * d, -1, w, d, rows, grad_direction, grad_query);
    linear_gradients(b.key + head * w * d, -1, w, d, rows, query, grad_direction);
  }
  next_ = mark;
}

}  // namespace
}  // namespace td3_fast::cpu
