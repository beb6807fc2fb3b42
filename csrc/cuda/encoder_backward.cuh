// The encoder's pass backward: see encoder.cuh.
#pragma once

#include "encoder.cuh"

namespace td3_fast::cuda {

template <typename T, bool kTangents, bool kBackward, int kWidth>
template <typename Use>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::norm_rows_backward(
    int rows, Matrix norm, const N* grads, const N* normed_rows, const N* deviations, const Use& use) const {
  const T of_width = T(1) / static_cast<T>(d());
  by_group(rows, [&](int r, bool active) {
    const N *grad = grads + r * stride(), *normed = normed_rows + r * stride();
    const Share share = share_of(d());
    N mean{}, product{};
    for (int f = share.from; f < share.to; ++f) {
      const N scaled = grad[f] * weight(norm, 0, f);
      mean = mean + scaled;
      product = multiply_add(scaled, normed[f], product);
    }
    mean = group_sum(mean) * of_width;
    product = group_sum(product) * of_width;
    if (!active) return;
    for (int f = share.from; f < share.to; ++f) {
      use(r, f, (grad[f] * weight(norm, 0, f) - mean - normed[f] * product) * deviations[r]);
    }
  });
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::add_norm_gradients(Matrix norm,
                                                                                  int rows,
                                                                                  const N* grad,
                                                                                  const N* normed) const {
  by_group(2 * d(), [&](int index, bool active) {
    const bool gain = index < d();
    const int f = gain ? index : index - d();
    const Share share = share_of(rows);
    T sum = 0;
    for (int r = share.from; r < share.to; ++r) {
      const N g = grad[r * stride() + f];
      sum = gain ? add_gradient(g, normed[r * stride() + f], sum) : sum + stored(g);
    }
    sum = group_sum(sum);
    if (active && part() == 0) sums_[norm.at + index] += sum;
  });
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::norm_backward(
    int layer, Matrix norm, int site, const N* grad, const N* normed, const N* deviation, N* to) const {
  const int k = rows_of(layer);
  add_norm_gradients(norm, k, grad, normed);
  norm_rows_backward(k, norm, grad, normed, deviation, [&](int r, int f, N g) {
    to[r * stride() + f] = g;
    sum_[r * stride() + f] = dropped(site, mask_rows(layer), r, f, g);
  });
  block_barrier();
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::read_upstream() const {
  const int64_t first = sequence_ * asked_ * d();
  grid(asked_, by_width_, [&](int r, int f) {
    const int64_t at = first + r * d() + f;
    const T v = static_cast<const T*>(p_.grad_outputs)[at];
    if constexpr (kTangents) {
      const T* const tangent = static_cast<const T*>(p_.grad_outputs_tangent);
      grad_[r * stride() + f] = {v, tangent != nullptr ? tangent[at] : T(0)};
    } else {
      grad_[r * stride() + f] = v;
    }
  });
  block_barrier();
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::backward() {
  if (p_.num_items > 0) {
    compare_with_items();
  } else {
    read_upstream();
  }
#pragma unroll 1
  for (int layer = layers() - 1; layer >= 0; --layer) {
    grid(rows_, by_width_, [&](int j, int f) { grad_hidden_[j * stride() + f] = N{}; });
    block_backward(layer);
    if (layer > 0) {
      grid(rows_, by_width_, [&](int j, int f) { grad_[j * stride() + f] = grad_hidden_[j * stride() + f]; });
    }
    block_barrier();
  }
  if (drops(0)) {
    grid(rows_, by_width_, [&](int j, int f) {
      N& g = grad_hidden_[j * stride() + f];
      g = dropped(0, length_, j, f, g);
    });
    block_barrier();
  }
  T* const grad_inputs = static_cast<T*>(p_.grad_inputs) + sequence_ * p_.grad_input_stride;
  add_norm_gradients(first_norm(), rows_, grad_hidden_, normed_);
  norm_rows_backward(rows_, first_norm(), grad_hidden_, normed_, deviation_, [&](int j, int f, N g) {
    sums_[j * d() + f] += stored(g);
    if (p_.grad_inputs != nullptr) grad_inputs[j * d() + f] = stored(g);
  });
  if (p_.grad_inputs == nullptr) return;
  const int rest = static_cast<int>(p_.grad_input_rows) - rows_;
  tasks(rest * d(), [&](int i) { grad_inputs[rows_ * d() + i] = T(0); });
  if (p_.to_targets == 0) return;
  block_barrier();
  const N* const outputs = outputs_of(layers() - 1);
  tasks(d(), [&](int f) {
#pragma unroll 1
    for (int r = 0; r < asked_; ++r) {
      T& to = grad_inputs[(at_[r] + 1) * d() + f];
      to += static_cast<T>(p_.to_targets) * stored(outputs[r * stride() + f]);
    }
  });
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::block_backward(int layer) const {
  const int k = rows_of(layer);
  const BlockParameters b = block_parameters(first_block(), d(), inner(), layer);
  const Saved saved = this->saved(layer);
  norm_backward(layer, b.last_norm, 3 + 3 * layer, grad_, saved.last_normed, saved.last_deviation,
                grad_more_);
  add_gradients(b.down, b.down_bias, k, sum_, stride(), by_inner_, saved.bent, inner());
  times_transposed(
      k, b.down, d(), inner(), [](int) { return 0; }, [&](int r) { return sum_ + r * stride(); },
      [&](int r, int j, N sum) { grad_raised_[r * inner() + j] = sum * saved.slope[r * inner() + j]; });
  block_barrier();
  add_gradients(b.up, b.up_bias, k, grad_raised_, inner(), by_width_, saved.attended, stride());
  times_transposed(
      k, b.up, inner(), d(), [](int) { return 0; }, [&](int r) { return grad_raised_ + r * inner(); },
      [&](int r, int f, N sum) { grad_[r * stride() + f] = grad_more_[r * stride() + f] + sum; });
  block_barrier();
  norm_backward(layer, b.norm, 2 + 3 * layer, grad_, saved.normed, saved.deviation, grad_more_);
  add_gradients(b.output, b.output_bias, k, sum_, stride(), by_width_, saved.context, stride());
  times_transposed(
      k, b.output, d(), d(), [](int) { return 0; }, [&](int r) { return sum_ + r * stride(); },
      [&](int r, int f, N sum) { grad_context_[r * stride() + f] = sum; });
  block_barrier();
  values_backward(layer, b);
  scores_backward(layer);
  products(
      k * heads(), d(), [&](int row) { return position(layer, row_of_both(row)) + 1; },
      [&](int row, int f, int j, N sum) {
        return multiply_add(grad_scores_[row * length_ + j], saved.inputs[j * stride() + f], sum);
      },
      [&](int row, int f, N sum) { grad_direction_[row * stride() + f] = sum; });
  inputs_backward(layer);
  block_barrier();
  times(
      k, b.key, d(), d(),
      [&](int r, int i) { return grad_direction_ + (r * heads() + head_of(i)) * stride(); },
      [&](int r, int i, N sum) { grad_query_[r * stride() + i] = sum; });
  grid(d(), by_width_, [&](int i, int f) {
    T sum = sums_[b.key.at + i * d() + f];
#pragma unroll 1
    for (int r = 0; r < k; ++r) {
      const N grad = grad_direction_[(r * heads() + head_of(i)) * stride() + f];
      sum = add_gradient(saved.query[r * stride() + i], grad, sum);
    }
    sums_[b.key.at + i * d() + f] = sum;
  });
  block_barrier();
  queries_backward(layer, b);
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::values_backward(
    int layer, const BlockParameters& b) const {
  const int k = rows_of(layer), w = head_width();
  const Saved saved = this->saved(layer);
  grid(d(), by_width_, [&](int i, int f) {
    T sum = sums_[b.value.at + i * d() + f];
#pragma unroll 1
    for (int r = 0; r < k; ++r) {
      const N mixed = saved.mixed[(r * heads() + head_of(i)) * stride() + f];
      sum = add_gradient(grad_context_[r * stride() + i], mixed, sum);
    }
    sums_[b.value.at + i * d() + f] = sum;
  });
  tasks(d(), [&](int i) {
    T sum = sums_[b.value_bias.at + i];
#pragma unroll 1
    for (int r = 0; r < k; ++r) {
      sum = add_gradient(grad_context_[r * stride() + i], saved.total[r * heads() + head_of(i)], sum);
    }
    sums_[b.value_bias.at + i] = sum;
  });
  times_transposed(
      k * heads(), b.value, w, d(), [&](int row) { return (row - row_of_both(row) * heads()) * w; },
      [&](int row) {
        const int r = row_of_both(row);
        return grad_context_ + r * stride() + (row - r * heads()) * w;
      },
      [&](int row, int f, N sum) { grad_mixed_[row * stride() + f] = sum; });
  products(
      k * heads(), 1, [&](int) { return w; },
      [&](int row, int, int i, N sum) {
        const int r = row_of_both(row), at = (row - r * heads()) * w + i;
        return multiply_add(grad_context_[r * stride() + at], weight(b.value_bias, 0, at), sum);
      },
      [&](int row, int, N sum) { grad_total_[row] = sum; });
  block_barrier();
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::scores_backward(int layer) const {
  const Saved saved = this->saved(layer);
  const int rows = rows_of(layer) * heads();
  const T scale = T(1) / square_root(static_cast<T>(head_width()));
  products(
      rows, rows_, [&](int) { return d(); },
      [&](int row, int j, int f, N sum) {
        return multiply_add(grad_mixed_[row * stride() + f], saved.inputs[j * stride() + f], sum);
      },
      [&](int row, int j, N sum) {
        const int r = row_of_both(row), head = row - r * heads();
        if (j > position(layer, r)) return;
        grad_scores_[row * length_ + j] = attention_dropped(layer, head, r, j, sum + grad_total_[row]);
      });
  block_barrier();
  // a warp for each row and head
#pragma unroll 1
  for (int row = warp_; row < rows; row += warps_) {
    const int keys = position(layer, row_of_both(row)) + 1;
    const N* weights = saved.weights + row * length_;
    N* grad_scores = grad_scores_ + row * length_;
    N product{};
#pragma unroll 1
    for (int j = lane_; j < keys; j += kWarp) product = multiply_add(weights[j], grad_scores[j], product);
    product = warp_sum(product);
#pragma unroll 1
    for (int j = lane_; j < keys; j += kWarp) {
      grad_scores[j] = weights[j] * (grad_scores[j] - product) * scale;
    }
  }
  block_barrier();
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::inputs_backward(int layer) const {
  const Saved saved = this->saved(layer);
  const int k = rows_of(layer);
  grid(rows_, by_width_, [&](int j, int f) {
    N sum = grad_hidden_[j * stride() + f];
#pragma unroll 1
    for (int r = 0; r < k; ++r) {
      if (position(layer, r) < j) continue;
#pragma unroll 1
      for (int head = 0; head < heads(); ++head) {
        const int row = r * heads() + head;
        sum = multiply_add(saved.dropped[row * length_ + j], grad_mixed_[row * stride() + f], sum);
        sum = multiply_add(grad_scores_[row * length_ + j], saved.direction[row * stride() + f], sum);
      }
    }
    grad_hidden_[j * stride() + f] = sum;
  });
}

template <typename T, bool kTangents, bool kBackward, int kWidth>
__device__ void SequencePass<T, kTangents, kBackward, kWidth>::queries_backward(
    int layer, const BlockParameters& b) const {
  const int k = rows_of(layer);
  const Saved saved = this->saved(layer);
  grid(d(), by_width_, [&](int i, int j) {
    T sum = sums_[b.query.at + i * d() + j];
#pragma unroll 1
    for (int r = 0; r < k; ++r) {
      sum = add_gradient(grad_query_[r * stride() + i], saved.inputs[position(layer, r) * stride() + j], sum);
    }
    sums_[b.query.at + i * d() + j] = sum;
  });
  tasks(d(), [&](int i) {
    T sum = sums_[b.query_bias.at + i];
#pragma unroll 1
    for (int r = 0; r < k; ++r) sum += stored(grad_query_[r * stride() + i]);
    sums_[b.query_bias.at + i] = sum;
  });
  times_transposed(
      k, b.query, d(), d(), [](int) { return 0; }, [&](int r) { return grad_query_ + r * stride(); },
      [&](int r, int f, N sum) { grad_[r * stride() + f] = grad_more_[r * stride() + f] + sum; });
  block_barrier();
  if (everywhere(layer)) {
    grid(k, by_width_, [&](int r, int f) {
      N& to = grad_hidden_[r * stride() + f];
      to = to + grad_[r * stride() + f];
    });
  } else {
    // asked positions may be equal
    tasks(d(), [&](int f) {
#pragma unroll 1
      for (int r = 0; r < k; ++r) {
        N& to = grad_hidden_[position(layer, r) * stride() + f];
        to = to + grad_[r * stride() + f];
      }
    });
  }
  block_barrier();
}

}  // namespace td3_fast::cuda
