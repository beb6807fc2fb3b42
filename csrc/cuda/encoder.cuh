// The encoder's passes: a block of threads for one sequence at a time. See kernels.h for what is computed.
//
// A pass is written once, for numbers N that are plain or dual. It is a row of phases with a barrier after
// each; in a phase every thread takes every `threads`-th task, or every warp every `warps`-th row. A number
// is always summed by one thread or warp in the same order, so results do not depend on the hardware.
#pragma once

#include <type_traits>

#include "../philox.h"
#include "numbers.cuh"

namespace td3_fast::cuda {

// Hands out arrays in shared memory while it lasts, then in global scratch.
struct Arena {
  uintptr_t shared, global;  // 0 where bytes are only counted
  int64_t shared_limit;
  int64_t shared_used = 0, global_used = 0;

  template <typename X>
  TD3_FAST_HOST_DEVICE X* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(X)) + 15) / 16 * 16;
    int64_t& used = shared_used + bytes <= shared_limit ? shared_used : global_used;
    const uintptr_t base = &used == &shared_used ? shared : global;
    X* const at = reinterpret_cast<X*>(base + static_cast<uintptr_t>(used));
    used += bytes;
    return at;
  }
};

// A matrix (out, in) of parameters: where it is in the learner's vector, and in the copy for threads, whose
// rows have an odd stride, so that neither rows nor columns are all in one bank of shared memory.
struct Matrix {
  int at, copy, out, in;
  TD3_FAST_HOST_DEVICE int stride() const { return in | 1; }
};

struct BlockParameters {
  Matrix query, query_bias, key, key_bias, value, value_bias, output, output_bias, norm, up, up_bias, down,
      down_bias, last_norm;
};

// The next matrices of the parameters, from front to back.
struct ParameterCursor {
  int at, copy;
  TD3_FAST_HOST_DEVICE Matrix next(int out, int in) {
    const Matrix m{at, copy, out, in};
    at += out * in;
    copy += out * m.stride();
    return m;
  }
};

TD3_FAST_HOST_DEVICE inline BlockParameters block_parameters(const EncoderSizes& s, int layer) {
  const int d = static_cast<int>(s.width), inner = static_cast<int>(s.inner);
  ParameterCursor cursor{static_cast<int>(s.positions) * d, 0};
  cursor.next(2, d);
  BlockParameters b;
  for (int i = 0; i <= layer; ++i) {
    b.query = cursor.next(d, d), b.query_bias = cursor.next(1, d);
    b.key = cursor.next(d, d), b.key_bias = cursor.next(1, d);
    b.value = cursor.next(d, d), b.value_bias = cursor.next(1, d);
    b.output = cursor.next(d, d), b.output_bias = cursor.next(1, d);
    b.norm = cursor.next(2, d);
    b.up = cursor.next(inner, d), b.up_bias = cursor.next(1, inner);
    b.down = cursor.next(d, inner), b.down_bias = cursor.next(1, d);
    b.last_norm = cursor.next(2, d);
  }
  return b;
}

template <typename T, bool kTangents, bool kBackward>
class SequencePass {
  using N = std::conditional_t<kTangents, Dual<T>, T>;

  // What the backward pass needs of a block.
  struct Saved {
    const N* inputs;  // (rows, d)
    N *query, *direction, *weights, *mixed, *total, *context, *normed, *deviation, *attended, *slope, *bent,
        *last_normed, *last_deviation, *outputs;
  };

 public:
  TD3_FAST_HOST_DEVICE SequencePass(const EncoderProblem& problem, Arena* arena)
      : p_(problem),
        s_(problem.sizes),
        d_(static_cast<int>(s_.width)),
        stride_(d_ | 1),
        inner_(static_cast<int>(s_.inner)),
        heads_(static_cast<int>(s_.heads)),
        head_width_(d_ / heads_),
        layers_(static_cast<int>(s_.layers)),
        length_(static_cast<int>(s_.length)),
        asked_(static_cast<int>(s_.asked)) {
    const int most = layers_ > 1 && length_ > asked_ ? length_ : asked_;  // rows of a block
    hidden_ = arena->take<N>(length_ * stride_);
    normed_ = arena->take<N>(length_ * stride_);
    deviation_ = arena->take<N>(length_);
    for (int layer = 0; layer < layers_; ++layer) {
      Saved& saved = saved_[layer];
      const int k = everywhere(layer) ? length_ : asked_;
      for (N** rows : {&saved.query, &saved.context, &saved.normed, &saved.attended, &saved.last_normed,
                       &saved.outputs}) {
        *rows = arena->take<N>(k * stride_);
      }
      for (N** rows : {&saved.direction, &saved.mixed}) *rows = arena->take<N>(k * heads_ * stride_);
      for (N** rows : {&saved.slope, &saved.bent}) *rows = arena->take<N>(k * inner_);
      for (N** row : {&saved.deviation, &saved.last_deviation}) *row = arena->take<N>(k);
      saved.weights = arena->take<N>(k * heads_ * length_);
      saved.total = arena->take<N>(k * heads_);
    }
    sum_ = arena->take<N>(most * stride_);
    if (kBackward) {
      grad_ = arena->take<N>(most * stride_);
      grad_more_ = arena->take<N>(most * stride_);
      grad_context_ = arena->take<N>(most * stride_);
      grad_query_ = arena->take<N>(most * stride_);
      grad_mixed_ = arena->take<N>(most * heads_ * stride_);
      grad_direction_ = arena->take<N>(most * heads_ * stride_);
      grad_scores_ = arena->take<N>(most * heads_ * length_);
      grad_raised_ = arena->take<N>(most * inner_);
      grad_hidden_ = arena->take<N>(length_ * stride_);
    }
    if (p_.num_items > 0) {
      reduced_ = arena->take<N>(kMostWarps * asked_ * (d_ + 1));
      peaks_ = arena->take<T>(kMostWarps * asked_);
    }
    const BlockParameters last = block_parameters(s_, layers_ - 1);
    size_ = last.last_norm.at + 2 * d_;
    weights_size_ = last.last_norm.copy + 2 * stride_;
    weights_ = arena->take<N>(weights_size_);
    if (p_.num_items > 0) logits_ = arena->take<N>(asked_ * p_.num_items);
    if (kBackward) sums_ = arena->take<T>(size_);
  }

  // All sequences of this block of threads.
  __device__ void run(int thread, int threads, int64_t block) {
    thread_ = thread, threads_ = threads;
    lane_ = thread % kWarp, warp_ = thread / kWarp, warps_ = threads / kWarp;
    copy_parameters();
    if (kBackward) {
      for (int i = thread_; i < size_; i += threads_) sums_[i] = T(0);
    }
    for (sequence_ = block; sequence_ < p_.batch; sequence_ += p_.blocks) {
      block_barrier();
      forward();
      write_outputs();
      if (kBackward) backward();
    }
    if (!kBackward) return;
    block_barrier();
    T* const partial = static_cast<T*>(p_.partials) + block * size_;
    for (int i = thread_; i < size_; i += threads_) partial[i] = sums_[i];
  }

  static constexpr int kMostWarps = 16;

 private:
  // ---- tasks ----

  // run(i) for each i below count.
  template <typename Run>
  __device__ void tasks(int count, const Run& run) const {
    for (int i = thread_; i < count; i += threads_) run(i);
  }
  // run(row, column) for each of (rows, columns).
  template <typename Run>
  __device__ void grid(int rows, int columns, const Run& run) const {
    int row = thread_ / columns, column = thread_ % columns;
    const int row_step = threads_ / columns, column_step = threads_ % columns;
    while (row < rows) {
      run(row, column);
      row += row_step, column += column_step;
      if (column >= columns) row += 1, column -= columns;
    }
  }

  TD3_FAST_HOST_DEVICE bool everywhere(int layer) const { return layer + 1 < layers_; }
  __device__ int rows_of(int layer) const { return everywhere(layer) ? rows_ : asked_; }
  // The position of row r of a block.
  __device__ int position(int layer, int r) const { return everywhere(layer) ? r : asked_position(r); }
  __device__ int asked_position(int r) const {
    return static_cast<int>(p_.positions[sequence_ * asked_ + r] + p_.offset);
  }

  // ---- parameters ----

  __device__ N parameter(int at) const {
    const T v = static_cast<const T*>(p_.parameters)[at];
    if constexpr (kTangents) {
      return {v, p_.parameters_tangent != nullptr ? static_cast<const T*>(p_.parameters_tangent)[at] : T(0)};
    } else {
      return v;
    }
  }
  __device__ void copy_matrix(Matrix m) const {
    grid(m.out, m.in,
         [&](int i, int j) { weights_[m.copy + i * m.stride() + j] = parameter(m.at + i * m.in + j); });
  }
  __device__ void copy_parameters() const {
    copy_matrix(first_norm());
    for (int layer = 0; layer < layers_; ++layer) {
      const BlockParameters b = block_parameters(s_, layer);
      for (const Matrix& m : {b.query, b.query_bias, b.key, b.value, b.value_bias, b.output, b.output_bias,
                              b.norm, b.up, b.up_bias, b.down, b.down_bias, b.last_norm}) {
        copy_matrix(m);
      }
    }
  }
  __device__ Matrix first_norm() const { return {static_cast<int>(s_.positions) * d_, 0, 2, d_}; }
  __device__ const N* row_of(Matrix m, int i) const { return weights_ + m.copy + i * m.stride(); }

  // bias + w[i] x, w[i] the i-th row.
  __device__ N times_row(Matrix w, int i, const N* x, N sum) const {
    const N* row = row_of(w, i);
#pragma unroll 4
    for (int j = 0; j < w.in; ++j) sum = multiply_add(row[j], x[j], sum);
    return sum;
  }
  // sum + column j of `count` rows of w, from `first`, times x.
  __device__ N times_column(Matrix w, int first, int count, int j, const N* x, N sum) const {
    const N* column = row_of(w, first) + j;
    const int stride = w.stride();
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum = multiply_add(column[i * stride], x[i], sum);
    return sum;
  }
  // Adds the gradients of y = w x + bias: grad (rows, out) and x (rows, in) with their strides.
  __device__ void add_gradients(Matrix w,
                                const Matrix* bias,
                                int rows,
                                const N* grad,
                                int grad_stride,
                                const N* x,
                                int x_stride) const {
    grid(w.out, w.in, [&](int i, int j) {
      T sum = sums_[w.at + i * w.in + j];
      for (int r = 0; r < rows; ++r) sum = add_gradient(grad[r * grad_stride + i], x[r * x_stride + j], sum);
      sums_[w.at + i * w.in + j] = sum;
    });
    if (bias == nullptr) return;
    tasks(w.out, [&](int i) {
      T sum = sums_[bias->at + i];
      for (int r = 0; r < rows; ++r) sum += stored(grad[r * grad_stride + i]);
      sums_[bias->at + i] = sum;
    });
  }

  // ---- dropout ----

  __device__ bool drops(int site) const { return p_.sites[site].words != nullptr; }
  // The factor of an element of a sequence, of which there are `stride`.
  __device__ T survivor(int site, int64_t stride, int64_t at) const {
    const EncoderSite& s = p_.sites[site];
    return s.words[sequence_ * stride + at] >= s.threshold ? static_cast<T>(s.scale) : T(0);
  }
  __device__ N dropped(int site, int rows, int r, int f, N x) const {
    return drops(site) ? x * survivor(site, int64_t{rows} * d_, r * d_ + f) : x;
  }
  __device__ int mask_rows(int layer) const { return everywhere(layer) ? length_ : asked_; }
  __device__ N attention_dropped(int layer, int head, int r, int j, N x) const {
    const int site = 1 + 3 * layer, k = mask_rows(layer);
    if (!drops(site)) return x;
    return x * survivor(site, int64_t{heads_} * k * length_, (int64_t{head} * k + r) * length_ + j);
  }

  // ---- norms ----

  // Of one row by a warp: x lies in `normed`, and is normed in place.
  __device__ void norm_row(Matrix norm, N* normed, N* deviation, N* y) const {
    const T share = T(1) / static_cast<T>(d_);
    N mean{};
    for (int f = lane_; f < d_; f += kWarp) mean = mean + normed[f];
    mean = warp_sum(mean) * share;
    N variance{};
    for (int f = lane_; f < d_; f += kWarp) {
      const N apart = normed[f] - mean;
      variance = multiply_add(apart, apart, variance);
    }
    const N scale = inverse_square_root(minus(warp_sum(variance) * share, static_cast<T>(-kNormEps)));
    const N *gain = row_of(norm, 0), *bias = row_of(norm, 1);
    for (int f = lane_; f < d_; f += kWarp) {
      normed[f] = (normed[f] - mean) * scale;
      y[f] = multiply_add(normed[f], gain[f], bias[f]);
    }
    if (lane_ == 0) *deviation = scale;
  }
  // The gradient of a norm's input from that of its output, one row by a warp: use(f, gradient).
  template <typename Use>
  __device__ void norm_row_backward(
      Matrix norm, const N* grad, const N* normed, N deviation, const Use& use) const {
    const T share = T(1) / static_cast<T>(d_);
    const N* gain = row_of(norm, 0);
    N mean{}, product{};
    for (int f = lane_; f < d_; f += kWarp) {
      const N scaled = grad[f] * gain[f];
      mean = mean + scaled;
      product = multiply_add(scaled, normed[f], product);
    }
    mean = warp_sum(mean) * share;
    product = warp_sum(product) * share;
    for (int f = lane_; f < d_; f += kWarp) {
      use(f, (grad[f] * gain[f] - mean - normed[f] * product) * deviation);
    }
  }
  __device__ void add_norm_gradients(Matrix norm, int rows, const N* grad, const N* normed) const {
    grid(2, d_, [&](int which, int f) {
      T sum = sums_[norm.at + which * d_ + f];
      for (int r = 0; r < rows; ++r) {
        const N g = grad[r * stride_ + f];
        sum = which == 0 ? add_gradient(g, normed[r * stride_ + f], sum) : sum + stored(g);
      }
      sums_[norm.at + which * d_ + f] = sum;
    });
  }
  // Both norms of a block, backwards: grad (k, d) to `to`, and what of it goes into the branch before,
  // dropped.
  __device__ void norm_backward(
      int layer, Matrix norm, int site, const N* grad, const N* normed, const N* deviation, N* to) const {
    const int k = rows_of(layer);
    add_norm_gradients(norm, k, grad, normed);
    for (int r = warp_; r < k; r += warps_) {
      norm_row_backward(norm, grad + r * stride_, normed + r * stride_, deviation[r], [&](int f, N g) {
        to[r * stride_ + f] = g;
        sum_[r * stride_ + f] = dropped(site, mask_rows(layer), r, f, g);
      });
    }
    block_barrier();
  }

  // ---- inputs and outputs ----

  __device__ N input(int j, int f) const {
    const T* const inputs = static_cast<const T*>(p_.inputs);
    const int64_t at = p_.ids != nullptr ? p_.ids[sequence_ * length_ + j] * d_ + f
                                         : sequence_ * p_.input_stride + j * d_ + f;
    if constexpr (kTangents) {
      const T* const tangent = static_cast<const T*>(p_.inputs_tangent);
      return {inputs[at],
              tangent != nullptr ? tangent[sequence_ * p_.input_tangent_stride + j * d_ + f] : T(0)};
    } else {
      return inputs[at];
    }
  }
  __device__ void write_outputs() const {
    if (p_.outputs == nullptr) return;
    T* const to = static_cast<T*>(p_.outputs) + sequence_ * asked_ * d_;
    const N* const outputs = saved_[layers_ - 1].outputs;
    grid(asked_, d_, [&](int r, int f) { to[r * d_ + f] = stored(outputs[r * stride_ + f]); });
  }

  // ---- forward ----

  __device__ void forward() {
    rows_ = 0;
    for (int r = 0; r < asked_; ++r) {
      const int position = asked_position(r);
      if (position < 0 || position >= length_) trap();
      rows_ = position >= rows_ ? position + 1 : rows_;
    }
    for (int j = warp_; j < rows_; j += warps_) {
      N *normed = normed_ + j * stride_, *hidden = hidden_ + j * stride_;
      for (int f = lane_; f < d_; f += kWarp) normed[f] = input(j, f) + parameter(j * d_ + f);
      norm_row(first_norm(), normed, deviation_ + j, hidden);
      for (int f = lane_; f < d_; f += kWarp) hidden[f] = dropped(0, length_, j, f, hidden[f]);
    }
    block_barrier();
    const N* inputs = hidden_;
    for (int layer = 0; layer < layers_; ++layer) {
      saved_[layer].inputs = inputs;
      block_forward(layer);
      inputs = saved_[layer].outputs;
    }
  }

  __device__ void block_forward(int layer) const {
    const int k = rows_of(layer), w = head_width_;
    const BlockParameters b = block_parameters(s_, layer);
    const Saved& saved = saved_[layer];
    grid(k, d_, [&](int r, int i) {
      const N* asked = saved.inputs + position(layer, r) * stride_;
      saved.query[r * stride_ + i] = times_row(b.query, i, asked, row_of(b.query_bias, 0)[i]);
    });
    block_barrier();
    // q · (W h + b) = (Wᵀ q) · h plus the same for every key
    grid(k * heads_, d_, [&](int row, int f) {
      const int r = row / heads_, first = row % heads_ * w;
      saved.direction[row * stride_ + f] =
          times_column(b.key, first, w, f, saved.query + r * stride_ + first, N{});
    });
    block_barrier();
    attend(layer);
    block_barrier();
    grid(k * heads_, d_, [&](int row, int f) {
      const int r = row / heads_, head = row % heads_, keys = position(layer, r) + 1;
      const N* weights = saved.weights + row * length_;
      N sum{};
      for (int j = 0; j < keys; ++j) {
        const N weight = attention_dropped(layer, head, r, j, weights[j]);
        sum = multiply_add(weight, saved.inputs[j * stride_ + f], sum);
      }
      saved.mixed[row * stride_ + f] = sum;
    });
    block_barrier();
    grid(k, d_, [&](int r, int i) {
      const int row = r * heads_ + i / w;
      const N bias = saved.total[row] * row_of(b.value_bias, 0)[i];
      saved.context[r * stride_ + i] = times_row(b.value, i, saved.mixed + row * stride_, bias);
    });
    block_barrier();
    grid(k, d_, [&](int r, int i) {
      const N sum = times_row(b.output, i, saved.context + r * stride_, row_of(b.output_bias, 0)[i]);
      saved.normed[r * stride_ + i] = dropped(2 + 3 * layer, mask_rows(layer), r, i, sum) +
                                      saved.inputs[position(layer, r) * stride_ + i];
    });
    block_barrier();
    for (int r = warp_; r < k; r += warps_) {
      norm_row(b.norm, saved.normed + r * stride_, saved.deviation + r, saved.attended + r * stride_);
    }
    block_barrier();
    grid(k, inner_, [&](int r, int i) {
      const N raised = times_row(b.up, i, saved.attended + r * stride_, row_of(b.up_bias, 0)[i]);
      gelu(raised, saved.bent + r * inner_ + i, saved.slope + r * inner_ + i);
    });
    block_barrier();
    grid(k, d_, [&](int r, int i) {
      const N sum = times_row(b.down, i, saved.bent + r * inner_, row_of(b.down_bias, 0)[i]);
      saved.last_normed[r * stride_ + i] =
          dropped(3 + 3 * layer, mask_rows(layer), r, i, sum) + saved.attended[r * stride_ + i];
    });
    block_barrier();
    for (int r = warp_; r < k; r += warps_) {
      norm_row(b.last_norm, saved.last_normed + r * stride_, saved.last_deviation + r,
               saved.outputs + r * stride_);
    }
    block_barrier();
  }

  // The weights of a block's attention before dropout, and their sum after it: a warp for each row and head.
  __device__ void attend(int layer) const {
    const Saved& saved = saved_[layer];
    const T scale = T(1) / square_root(static_cast<T>(head_width_));
    for (int row = warp_; row < rows_of(layer) * heads_; row += warps_) {
      const int r = row / heads_, head = row % heads_, keys = position(layer, r) + 1;
      const N* direction = saved.direction + row * stride_;
      N* weights = saved.weights + row * length_;
      T peak = minus_infinity<T>();
      for (int j = lane_; j < keys; j += kWarp) {
        const N* key = saved.inputs + j * stride_;
        N score{};
#pragma unroll 4
        for (int f = 0; f < d_; ++f) score = multiply_add(direction[f], key[f], score);
        weights[j] = score * scale;
        peak = value_of(weights[j]) > peak ? value_of(weights[j]) : peak;
      }
      peak = warp_max(peak);
      N mass{};
      for (int j = lane_; j < keys; j += kWarp) {
        weights[j] = exponential(minus(weights[j], peak));
        mass = mass + weights[j];
      }
      const N share = inverse(warp_sum(mass));
      N total{};
      for (int j = lane_; j < keys; j += kWarp) {
        weights[j] = weights[j] * share;
        total = total + attention_dropped(layer, head, r, j, weights[j]);
      }
      total = warp_sum(total);
      if (lane_ == 0) saved.total[row] = total;
    }
  }

  // ---- the loss against all items ----

  // grad_ = the gradient of the mean of logsumexp(h E^T) - h x towards the outputs h.
  __device__ void compare_with_items() {
    const N* const outputs = saved_[layers_ - 1].outputs;
    const T* const items = static_cast<const T*>(p_.items);
    const T share = T(1) / static_cast<T>(p_.batch * asked_);
    const int n = static_cast<int>(p_.num_items);
    for (int r = 0; r < asked_; ++r) {
      const N* h = outputs + r * stride_;
      T peak = minus_infinity<T>();
      tasks(n, [&](int item) {
        const T* row = items + int64_t{item} * d_;
        N sum{};
#pragma unroll 8
        for (int f = 0; f < d_; ++f) sum = multiply_add(h[f], row[f], sum);
        logits_[int64_t{r} * n + item] = sum;
        peak = value_of(sum) > peak ? value_of(sum) : peak;
      });
      peak = warp_max(peak);
      if (lane_ == 0) peaks_[r * kMostWarps + warp_] = peak;
    }
    block_barrier();
    for (int r = 0; r < asked_; ++r) {
      const T peak = peak_of(r);
      N mass{};
      tasks(n, [&](int item) {
        N& logit = logits_[int64_t{r} * n + item];
        logit = exponential(minus(logit, peak));
        mass = mass + logit;
      });
      mass = warp_sum(mass);
      if (lane_ == 0) reduced_[(warp_ * asked_ + r) * (d_ + 1) + d_] = mass;
    }
    block_barrier();
    for (int r = 0; r < asked_; ++r) {
      const N* weights = logits_ + int64_t{r} * n;
      for (int f = lane_; f < d_; f += kWarp) {
        N sum{};
#pragma unroll 8
        for (int item = warp_; item < n; item += warps_) {
          sum = multiply_add(weights[item], items[int64_t{item} * d_ + f], sum);
        }
        reduced_[(warp_ * asked_ + r) * (d_ + 1) + f] = sum;
      }
    }
    block_barrier();
    grid(asked_, d_, [&](int r, int f) {
      const N mean = reduced(r, f) * inverse(reduced(r, d_));
      grad_[r * stride_ + f] = (mean - input(asked_position(r) + 1, f)) * share;
    });
    if (!kTangents && p_.losses != nullptr && thread_ == 0) {
      T loss = 0;
      for (int r = 0; r < asked_; ++r) {
        T score = 0;
        for (int f = 0; f < d_; ++f) {
          score += value_of(outputs[r * stride_ + f]) * value_of(input(asked_position(r) + 1, f));
        }
        loss += peak_of(r) + logarithm(value_of(reduced(r, d_))) - score;
      }
      static_cast<T*>(p_.losses)[sequence_] = loss * share;
    }
    block_barrier();
  }
  __device__ T peak_of(int r) const {
    T peak = peaks_[r * kMostWarps];
    for (int warp = 1; warp < warps_; ++warp) {
      const T other = peaks_[r * kMostWarps + warp];
      peak = other > peak ? other : peak;
    }
    return peak;
  }
  __device__ N reduced(int r, int f) const {
    N sum{};
    for (int warp = 0; warp < warps_; ++warp) sum = sum + reduced_[(warp * asked_ + r) * (d_ + 1) + f];
    return sum;
  }

  // ---- backward ----

  __device__ void read_upstream() const {
    const int64_t first = sequence_ * asked_ * d_;
    grid(asked_, d_, [&](int r, int f) {
      const int64_t at = first + r * d_ + f;
      const T v = static_cast<const T*>(p_.grad_outputs)[at];
      if constexpr (kTangents) {
        const T* const tangent = static_cast<const T*>(p_.grad_outputs_tangent);
        grad_[r * stride_ + f] = {v, tangent != nullptr ? tangent[at] : T(0)};
      } else {
        grad_[r * stride_ + f] = v;
      }
    });
    block_barrier();
  }

  __device__ void backward() {
    if (p_.num_items > 0) {
      compare_with_items();
    } else {
      read_upstream();
    }
    for (int layer = layers_ - 1; layer >= 0; --layer) {
      grid(rows_, d_, [&](int j, int f) { grad_hidden_[j * stride_ + f] = N{}; });
      block_backward(layer);
      if (layer > 0) {
        grid(rows_, d_, [&](int j, int f) { grad_[j * stride_ + f] = grad_hidden_[j * stride_ + f]; });
      }
      block_barrier();
    }
    if (drops(0)) {
      grid(rows_, d_, [&](int j, int f) {
        N& g = grad_hidden_[j * stride_ + f];
        g = dropped(0, length_, j, f, g);
      });
      block_barrier();
    }
    T* const grad_inputs = static_cast<T*>(p_.grad_inputs) + sequence_ * p_.grad_input_stride;
    add_norm_gradients(first_norm(), rows_, grad_hidden_, normed_);
    for (int j = warp_; j < rows_; j += warps_) {
      const N *grad = grad_hidden_ + j * stride_, *normed = normed_ + j * stride_;
      norm_row_backward(first_norm(), grad, normed, deviation_[j], [&](int f, N g) {
        sums_[j * d_ + f] += stored(g);
        if (p_.grad_inputs != nullptr) grad_inputs[j * d_ + f] = stored(g);
      });
    }
    if (p_.grad_inputs == nullptr) return;
    const int rest = static_cast<int>(p_.grad_input_rows) - rows_;
    tasks(rest * d_, [&](int i) { grad_inputs[rows_ * d_ + i] = T(0); });
    if (p_.to_targets == 0) return;
    block_barrier();
    const N* const outputs = saved_[layers_ - 1].outputs;
    tasks(d_, [&](int f) {
      for (int r = 0; r < asked_; ++r) {
        T& to = grad_inputs[(asked_position(r) + 1) * d_ + f];
        to += static_cast<T>(p_.to_targets) * stored(outputs[r * stride_ + f]);
      }
    });
  }

  // grad_ (k, d) is of the block's outputs; grad_hidden_ (rows, d) is added to.
  __device__ void block_backward(int layer) const {
    const int k = rows_of(layer), w = head_width_;
    const BlockParameters b = block_parameters(s_, layer);
    const Saved& saved = saved_[layer];
    norm_backward(layer, b.last_norm, 3 + 3 * layer, grad_, saved.last_normed, saved.last_deviation,
                  grad_more_);
    add_gradients(b.down, &b.down_bias, k, sum_, stride_, saved.bent, inner_);
    grid(k, inner_, [&](int r, int j) {
      const N sum = times_column(b.down, 0, d_, j, sum_ + r * stride_, N{});
      grad_raised_[r * inner_ + j] = sum * saved.slope[r * inner_ + j];
    });
    block_barrier();
    add_gradients(b.up, &b.up_bias, k, grad_raised_, inner_, saved.attended, stride_);
    grid(k, d_, [&](int r, int f) {
      const N grad = grad_more_[r * stride_ + f];
      grad_[r * stride_ + f] = times_column(b.up, 0, inner_, f, grad_raised_ + r * inner_, grad);
    });
    block_barrier();
    norm_backward(layer, b.norm, 2 + 3 * layer, grad_, saved.normed, saved.deviation, grad_more_);
    add_gradients(b.output, &b.output_bias, k, sum_, stride_, saved.context, stride_);
    grid(k, d_, [&](int r, int f) {
      grad_context_[r * stride_ + f] = times_column(b.output, 0, d_, f, sum_ + r * stride_, N{});
    });
    block_barrier();
    values_backward(layer, b);
    scores_backward(layer, b);
    grid(k * heads_, d_, [&](int row, int f) {
      const int r = row / heads_, keys = position(layer, r) + 1;
      N sum{};
      for (int j = 0; j < keys; ++j) {
        sum = multiply_add(grad_scores_[row * length_ + j], saved.inputs[j * stride_ + f], sum);
      }
      grad_direction_[row * stride_ + f] = sum;
    });
    inputs_backward(layer);
    block_barrier();
    grid(k, d_, [&](int r, int i) {
      const N* grad = grad_direction_ + (r * heads_ + i / w) * stride_;
      grad_query_[r * stride_ + i] = times_row(b.key, i, grad, N{});
    });
    grid(d_, d_, [&](int i, int f) {
      T sum = sums_[b.key.at + i * d_ + f];
      for (int r = 0; r < k; ++r) {
        const N grad = grad_direction_[(r * heads_ + i / w) * stride_ + f];
        sum = add_gradient(saved.query[r * stride_ + i], grad, sum);
      }
      sums_[b.key.at + i * d_ + f] = sum;
    });
    block_barrier();
    queries_backward(layer, b);
  }

  // From grad_context_ to grad_mixed_.
  __device__ void values_backward(int layer, const BlockParameters& b) const {
    const int k = rows_of(layer), w = head_width_;
    const Saved& saved = saved_[layer];
    grid(d_, d_, [&](int i, int f) {
      T sum = sums_[b.value.at + i * d_ + f];
      for (int r = 0; r < k; ++r) {
        const N mixed = saved.mixed[(r * heads_ + i / w) * stride_ + f];
        sum = add_gradient(grad_context_[r * stride_ + i], mixed, sum);
      }
      sums_[b.value.at + i * d_ + f] = sum;
    });
    tasks(d_, [&](int i) {
      T sum = sums_[b.value_bias.at + i];
      for (int r = 0; r < k; ++r) {
        sum = add_gradient(grad_context_[r * stride_ + i], saved.total[r * heads_ + i / w], sum);
      }
      sums_[b.value_bias.at + i] = sum;
    });
    grid(k * heads_, d_, [&](int row, int f) {
      const int r = row / heads_, first = row % heads_ * w;
      grad_mixed_[row * stride_ + f] =
          times_column(b.value, first, w, f, grad_context_ + r * stride_ + first, N{});
    });
    block_barrier();
  }

  // From grad_mixed_ to grad_scores_: a warp for each row and head.
  __device__ void scores_backward(int layer, const BlockParameters& b) const {
    const Saved& saved = saved_[layer];
    const T scale = T(1) / square_root(static_cast<T>(head_width_));
    for (int row = warp_; row < rows_of(layer) * heads_; row += warps_) {
      const int r = row / heads_, head = row % heads_, keys = position(layer, r) + 1;
      const N *grad_mixed = grad_mixed_ + row * stride_, *weights = saved.weights + row * length_;
      N* grad_scores = grad_scores_ + row * length_;
      N grad_total{};
      for (int i = lane_; i < head_width_; i += kWarp) {
        const int at = head * head_width_ + i;
        grad_total = multiply_add(grad_context_[r * stride_ + at], row_of(b.value_bias, 0)[at], grad_total);
      }
      grad_total = warp_sum(grad_total);
      N product{};
      for (int j = lane_; j < keys; j += kWarp) {
        const N* value = saved.inputs + j * stride_;
        N grad = grad_total;
#pragma unroll 4
        for (int f = 0; f < d_; ++f) grad = multiply_add(grad_mixed[f], value[f], grad);
        grad_scores[j] = attention_dropped(layer, head, r, j, grad);
        product = multiply_add(weights[j], grad_scores[j], product);
      }
      product = warp_sum(product);
      for (int j = lane_; j < keys; j += kWarp) {
        grad_scores[j] = weights[j] * (grad_scores[j] - product) * scale;
      }
    }
    block_barrier();
  }

  // What the block's attention adds to the gradient of its inputs, as keys and as values.
  __device__ void inputs_backward(int layer) const {
    const Saved& saved = saved_[layer];
    const int k = rows_of(layer);
    grid(rows_, d_, [&](int j, int f) {
      N sum = grad_hidden_[j * stride_ + f];
      for (int r = 0; r < k; ++r) {
        if (position(layer, r) < j) continue;
        for (int head = 0; head < heads_; ++head) {
          const int row = r * heads_ + head;
          const N weight = attention_dropped(layer, head, r, j, saved.weights[row * length_ + j]);
          sum = multiply_add(weight, grad_mixed_[row * stride_ + f], sum);
          sum = multiply_add(grad_scores_[row * length_ + j], saved.direction[row * stride_ + f], sum);
        }
      }
      grad_hidden_[j * stride_ + f] = sum;
    });
  }

  // From grad_query_, with what goes past the attention, to the gradient of the block's inputs.
  __device__ void queries_backward(int layer, const BlockParameters& b) const {
    const int k = rows_of(layer);
    const Saved& saved = saved_[layer];
    grid(d_, d_, [&](int i, int j) {
      T sum = sums_[b.query.at + i * d_ + j];
      for (int r = 0; r < k; ++r) {
        sum = add_gradient(grad_query_[r * stride_ + i], saved.inputs[position(layer, r) * stride_ + j], sum);
      }
      sums_[b.query.at + i * d_ + j] = sum;
    });
    tasks(d_, [&](int i) {
      T sum = sums_[b.query_bias.at + i];
      for (int r = 0; r < k; ++r) sum += stored(grad_query_[r * stride_ + i]);
      sums_[b.query_bias.at + i] = sum;
    });
    const auto from_row = [&](int r, int f) {
      return times_column(b.query, 0, d_, f, grad_query_ + r * stride_, grad_more_[r * stride_ + f]);
    };
    if (everywhere(layer)) {
      grid(k, d_, [&](int r, int f) {
        N& to = grad_hidden_[r * stride_ + f];
        to = to + from_row(r, f);
      });
    } else {
      // asked positions may be equal
      tasks(d_, [&](int f) {
        for (int r = 0; r < k; ++r) {
          N& to = grad_hidden_[position(layer, r) * stride_ + f];
          to = to + from_row(r, f);
        }
      });
    }
    block_barrier();
  }

  const EncoderProblem& p_;
  const EncoderSizes& s_;
  int d_, stride_, inner_, heads_, head_width_, layers_, length_, asked_;
  int thread_ = 0, threads_ = 0, lane_ = 0, warp_ = 0, warps_ = 0;
  int rows_ = 0;  // up to the last asked position
  int64_t sequence_ = 0;
  int size_, weights_size_;
  N *hidden_, *normed_, *deviation_;
  N* sum_;
  N *grad_ = nullptr, *grad_more_ = nullptr, *grad_context_ = nullptr, *grad_query_ = nullptr,
    *grad_mixed_ = nullptr, *grad_direction_ = nullptr, *grad_scores_ = nullptr, *grad_raised_ = nullptr,
    *grad_hidden_ = nullptr;
  N *reduced_ = nullptr, *logits_ = nullptr;
  T* peaks_ = nullptr;
  N* weights_;
  T* sums_ = nullptr;
  Saved saved_[kMaxLayers];
};

}  // namespace td3_fast::cuda
