// The encoder's pass forward: see encoder_pass.h.
#pragma once

#include "encoder_pass.h"

namespace td3_fast::cpu {
namespace {

template <typename T, bool kTangents>
void Pass<T, kTangents>::forward() {
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

template <typename T, bool kTangents>
void Pass<T, kTangents>::write_outputs() const {
  if (call_.outputs == nullptr) return;
  const int64_t d = s_.width, k = s_.asked;
  const N* outputs = saved_[s_.layers - 1].outputs;
  const auto row_of = [&](int lane) { return call_.outputs + sequence(lane) * k * d; };
  store_rows<T>(asked_ * d, count_, [&](int64_t at) { return P::stored(outputs[at]); }, row_of);
  for (int i = 0; i < count_; ++i) {
    for (int64_t r = 0; r < k; ++r) {
      if (own_positions(i)[r] >= 0) continue;
      for (int64_t f = 0; f < d; ++f) row_of(i)[r * d + f] = 0;
    }
  }
}

template <typename T, bool kTangents>
void Pass<T, kTangents>::block_forward(int64_t layer, const N* inputs) {
  const int64_t d = s_.width, inner = s_.inner, heads = s_.heads;
  const int64_t k = everywhere(layer) ? rows_ : asked_;
  const Block b = block_of(layer);
  Saved& saved = saved_[layer];
  saved.inputs = inputs, saved.k = k;
  const int64_t kept = keeps_ || k < kTile ? k : kTile;
  saved.query = take(kept * d), saved.context = take(kept * d), saved.weights = take(kept * heads * rows_);
  saved.normed = take(kept * d), saved.deviation = take(kept), saved.attended = take(kept * d);
  saved.slope = take(keeps_ ? k * inner : 0), saved.bent = take(kept * inner);
  saved.last_normed = take(kept * d), saved.last_deviation = take(kept), saved.outputs = take(k * d);
  if (makes_keys(k)) {
    saved.keys = take(rows_ * d), saved.values = take(rows_ * d);
    linear(b.key, -1, d, d, rows_, inputs_of(saved), {saved.keys, d});
    linear(b.value, b.value_bias, d, d, rows_, inputs_of(saved), {saved.values, d});
  } else {
    saved.keys = nullptr;
    saved.direction = take(kept * heads * d), saved.mixed = take(kept * heads * d);
    saved.total = take(kept * heads);
  }
  if (everywhere(layer)) {
    saved.asked = inputs_of(saved);
  } else {
    saved.asked = take(k * d);
    for (int64_t r = 0; r < k; ++r) gather(inputs, r, saved.asked + r * d);
  }
  N* const mark = next_;
  const Rows sums{take(kTile * d), d}, raised{take(kTile * inner), inner};
  for (int64_t first = 0; first < k; first += kTile) {
    const int64_t end = first + kTile < k ? first + kTile : k, rows = end - first;
    const auto of_tile = [&](N* at, int64_t width) { return Rows{at + place(first) * width, width}; };
    const Rows asked{saved.asked + first * d, d}, attended = of_tile(saved.attended, d);
    linear(b.query, b.query_bias, d, d, rows, asked, of_tile(saved.query, d));
    for (int64_t head = 0; head < heads; ++head) attend(layer, b, first, end, head);
    linear(b.output, b.output_bias, d, d, rows, of_tile(saved.context, d), sums);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = first + r;
      N* sum = sums.at + r * d;
      drop_hidden(2 + 3 * layer, at, sum);
      for (int64_t f = 0; f < d; ++f) sum[f] = sum[f] + asked.at[r * d + f];
      norm(sum, b.norm, saved.normed + place(at) * d, saved.deviation + place(at), attended.at + r * d);
    }
    linear(b.up, b.up_bias, inner, d, rows, attended, raised);
    const Rows bent = of_tile(saved.bent, inner);
    if (keeps_) {
      for (int64_t i = 0; i < rows * inner; ++i) {
        gelu(raised.at[i], bent.at + i, saved.slope + first * inner + i);
      }
    } else {
      for (int64_t i = 0; i < rows * inner; ++i) {
        N slope;
        gelu(raised.at[i], bent.at + i, &slope);
      }
    }
    linear(b.down, b.down_bias, d, inner, rows, bent, sums);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = first + r;
      N* sum = sums.at + r * d;
      drop_hidden(3 + 3 * layer, at, sum);
      for (int64_t f = 0; f < d; ++f) sum[f] = sum[f] + attended.at[r * d + f];
      norm(sum, b.last_norm, saved.last_normed + place(at) * d, saved.last_deviation + place(at),
           saved.outputs + at * d);
    }
  }
  next_ = mark;
}

template <typename T, bool kTangents>
void Pass<T, kTangents>::attend(int64_t layer, const Block& b, int64_t first, int64_t end, int64_t head) {
  const int64_t d = s_.width, w = d / s_.heads, rows = end - first, num_keys = keys(layer, end);
  const int64_t every = s_.heads * rows_, at = place(first);
  Saved& saved = saved_[layer];
  const Attended to = attended_by(saved, head);
  const bool direct = saved.keys == nullptr;
  const V scale = T(1) / scalar_sqrt(static_cast<T>(w)) - V{};
  const Rows query = Rows{saved.query, d}.from(at, head * w);
  const Rows context = Rows{saved.context, d}.from(at, head * w);
  const Rows direction = direct ? Rows{saved.direction, s_.heads * d}.from(at, head * d) : query;
  const Rows mixed = direct ? Rows{saved.mixed, s_.heads * d}.from(at, head * d) : context;
  const Rows weights = Rows{saved.weights, every}.from(at, head * rows_);
  if (direct) linear_transposed(b.key + head * w * d, w, d, rows, query, direction, Nothing{});
  P::product(rows, num_keys, to.width, direction, Own{to.keys.at, 1, to.keys.row}, Nothing{}, weights);
  N* const mark = next_;
  Rows surviving = weights;
  if (drops_attention(layer)) surviving = {take(rows * num_keys), num_keys};
  for (int64_t r = 0; r < rows; ++r) {
    N *weight = weights.at + r * every, *left = surviving.at + r * surviving.row;
    const V last = last_key(layer, first + r);
    V peak = -3.4e38f - V{};
    for (int64_t j = 0; j < num_keys; ++j) {
      weight[j] = weight[j] * scale;
      const V value = value_of(weight[j]);
      peak = (value > peak) & (static_cast<T>(j) <= last) ? value : peak;
    }
    N mass{};
    for (int64_t j = 0; j < num_keys; ++j) {
      weight[j] = where(static_cast<T>(j) <= last, exp_of(minus(weight[j], peak)));
      mass = mass + weight[j];
    }
    const N inverse_mass = inverse(mass);
    N total{};
    for (int64_t j = 0; j < num_keys; ++j) {
      weight[j] = weight[j] * inverse_mass;
      if (drops_attention(layer)) left[j] = weight[j] * attention_survivors(layer, head, first + r, j);
      total = total + left[j];
    }
    if (direct) saved.total[(at + r) * s_.heads + head] = total;
  }
  P::product(rows, to.width, num_keys, surviving, Own{to.values.at, to.values.row, 1}, Nothing{}, mixed);
  next_ = mark;
  if (!direct) return;
  linear(b.value + head * w * d, -1, w, d, rows, mixed, context);
  for (int64_t r = 0; r < rows; ++r) {
    const N total = saved.total[(at + r) * s_.heads + head];
    for (int64_t f = 0; f < w; ++f) {
      add_product(context.at + r * d + f, total, w_[b.value_bias + head * w + f]);
    }
  }
}

}  // namespace
}  // namespace td3_fast::cpu
