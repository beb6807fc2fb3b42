// The encoder's pass forward: see encoder.cuh.
#pragma once

#include "encoder.cuh"

namespace td3_fast::cuda {

template <typename T, bool kTangents, bool kBackward, int kWidth>
template <typename Use>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::norm_rows(
    int rows, Matrix norm, N* normed_rows, N* deviations, const Use& use) const {
  const T of_width = T(1) / static_cast<T>(d());
  by_group(rows, [&](int r, bool active) {
    N* const normed = normed_rows + r * stride();
    const Share share = share_of(d());
    N mean{};
    for (int f = share.from; f < share.to; ++f) mean = mean + normed[f];
    mean = group_sum(mean) * of_width;
    N variance{};
    for (int f = share.from; f < share.to; ++f) {
      const N apart = normed[f] - mean;
      variance = multiply_add(apart, apart, variance);
    }
    variance = group_sum(variance) * of_width;
    const N scale = inverse_square_root(minus(variance, static_cast<T>(-kNormEps)));
    if (!active) return;
    for (int f = share.from; f < share.to; ++f) {
      normed[f] = (normed[f] - mean) * scale;
      use(r, f, multiply_add(normed[f], weight(norm, 0, f), weight(norm, 1, f)));
    }
    if (part() == 0) deviations[r] = scale;
  });
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::forward() {
  row_ = p_.rows != nullptr ? within_table(p_.rows[sequence_]) : sequence_;
  tasks(asked_, [&](int r) {
    const int64_t position = p_.positions[sequence_ * asked_ + r] + p_.offset;
    if (position < 0 || position >= length_) trap();
    at_[r] = static_cast<int>(position);
  });
  block_barrier();
  rows_ = 0;
#pragma unroll 1
  for (int r = 0; r < asked_; ++r) rows_ = at_[r] >= rows_ ? at_[r] + 1 : rows_;
  struct Loaded {
    N x;
    T survivor;
  };
  in_batches(
      rows_ * d(),
      [&](int i) {
        const int j = i / d(), f = i % d();
        return Loaded{input(j, f) + parameter(i), drops(0) ? survivor(0, length_ * d(), i) : T(1)};
      },
      [&](int i, Loaded loaded) {
        const int at = i / d() * stride() + i % d();
        normed_[at] = loaded.x;
        hidden_[at] = constant(loaded.survivor);
      });
  block_barrier();
  norm_rows(rows_, first_norm(), normed_, deviation_, [&](int j, int f, N y) {
    N& hidden = hidden_[j * stride() + f];
    hidden = y * value_of(hidden);
  });
  block_barrier();
#pragma unroll 1
  for (int layer = 0; layer < layers(); ++layer) block_forward(layer);
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::block_forward(int layer) const {
  const int k = rows_of(layer), w = head_width();
  const BlockParameters b = block_parameters(first_block(), d(), inner(), layer);
  const Saved saved = this->saved(layer);
  times(
      k, b.query, d(), d(), [&](int r, int) { return saved.inputs + position(layer, r) * stride(); },
      [&](int r, int i, N sum) { saved.query[r * stride() + i] = sum + weight(b.query_bias, 0, i); });
  block_barrier();
  // q · (W h + b) = (Wᵀ q) · h plus the same for every key
  times_transposed(
      k * heads(), b.key, w, d(), [&](int row) { return (row - row_of_both(row) * heads()) * w; },
      [&](int row) {
        const int r = row_of_both(row);
        return saved.query + r * stride() + (row - r * heads()) * w;
      },
      [&](int row, int f, N sum) { saved.direction[row * stride() + f] = sum; });
  block_barrier();
  attend(layer);
  block_barrier();
  products(
      k * heads(), d(), [&](int row) { return position(layer, row_of_both(row)) + 1; },
      [&](int row, int f, int j, N sum) {
        return multiply_add(saved.dropped[row * length_ + j], saved.inputs[j * stride() + f], sum);
      },
      [&](int row, int f, N sum) { saved.mixed[row * stride() + f] = sum; });
  block_barrier();
  times(
      k, b.value, d(), d(), [&](int r, int i) { return saved.mixed + (r * heads() + head_of(i)) * stride(); },
      [&](int r, int i, N sum) {
        const N total = saved.total[r * heads() + head_of(i)];
        saved.context[r * stride() + i] = multiply_add(total, weight(b.value_bias, 0, i), sum);
      });
  block_barrier();
  times(
      k, b.output, d(), d(), [&](int r, int) { return saved.context + r * stride(); },
      [&](int r, int i, N sum) {
        sum = dropped(2 + 3 * layer, mask_rows(layer), r, i, sum + weight(b.output_bias, 0, i));
        saved.normed[r * stride() + i] = sum + saved.inputs[position(layer, r) * stride() + i];
      });
  block_barrier();
  norm_rows(k, b.norm, saved.normed, saved.deviation,
            [&](int r, int f, N y) { saved.attended[r * stride() + f] = y; });
  block_barrier();
  times(
      k, b.up, inner(), d(), [&](int r, int) { return saved.attended + r * stride(); },
      [&](int r, int i, N sum) {
        gelu(sum + weight(b.up_bias, 0, i), saved.bent + r * inner() + i, saved.slope + r * inner() + i);
      });
  block_barrier();
  times(
      k, b.down, d(), inner(), [&](int r, int) { return saved.bent + r * inner(); },
      [&](int r, int i, N sum) {
        sum = dropped(3 + 3 * layer, mask_rows(layer), r, i, sum + weight(b.down_bias, 0, i));
        saved.last_normed[r * stride() + i] = sum + saved.attended[r * stride() + i];
      });
  block_barrier();
  norm_rows(k, b.last_norm, saved.last_normed, saved.last_deviation,
            [&](int r, int f, N y) { saved.outputs[r * stride() + f] = y; });
  block_barrier();
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::attend(int layer) const {
  const Saved saved = this->saved(layer);
  const int rows = rows_of(layer) * heads();
  const T scale = T(1) / square_root(static_cast<T>(head_width()));
  products(
      rows, rows_, [&](int) { return d(); },
      [&](int row, int j, int f, N sum) {
        return multiply_add(saved.direction[row * stride() + f], saved.inputs[j * stride() + f], sum);
      },
      [&](int row, int j, N sum) { saved.weights[row * length_ + j] = sum * scale; });
  block_barrier();
  // a warp for each row and head
#pragma unroll 1
  for (int row = warp_; row < rows; row += warps_) {
    const int r = row_of_both(row), head = row - r * heads(), keys = position(layer, r) + 1;
    N* weights = saved.weights + row * length_;
    T peak = minus_infinity<T>();
#pragma unroll 1
    for (int j = lane_; j < keys; j += kWarp) {
      peak = value_of(weights[j]) > peak ? value_of(weights[j]) : peak;
    }
    peak = warp_max(peak);
    N mass{};
#pragma unroll 1
    for (int j = lane_; j < keys; j += kWarp) {
      weights[j] = exponential(minus(weights[j], peak));
      mass = mass + weights[j];
    }
    const N share = inverse(warp_sum(mass));
    N total{};
#pragma unroll 1
    for (int j = lane_; j < keys; j += kWarp) {
      weights[j] = weights[j] * share;
      const N dropped = attention_dropped(layer, head, r, j, weights[j]);
      saved.dropped[row * length_ + j] = dropped;
      total = total + dropped;
    }
    total = warp_sum(total);
    if (lane_ == 0) saved.total[row] = total;
  }
}

}  // namespace td3_fast::cuda
