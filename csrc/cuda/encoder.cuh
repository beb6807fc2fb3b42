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

// Where a matrix (out, in) of parameters is in the learner's vector.
struct Matrix {
  int at, out, in;
};

struct BlockParameters {
  Matrix query, query_bias, key, key_bias, value, value_bias, output, output_bias, norm, up, up_bias, down,
      down_bias, last_norm;
};

TD3_FAST_HOST_DEVICE inline BlockParameters block_parameters(int first, int d, int inner, int layer) {
  int at = first + layer * (4 * (d + 1) * d + 4 * d + (d + 1) * inner + (inner + 1) * d);
  const auto next = [&](int out, int in) {
    const Matrix m{at, out, in};
    at += out * in;
    return m;
  };
  BlockParameters b;
  b.query = next(d, d), b.query_bias = next(1, d);
  b.key = next(d, d), b.key_bias = next(1, d);
  b.value = next(d, d), b.value_bias = next(1, d);
  b.output = next(d, d), b.output_bias = next(1, d);
  b.norm = next(2, d);
  b.up = next(inner, d), b.up_bias = next(1, inner);
  b.down = next(d, inner), b.down_bias = next(1, d);
  b.last_norm = next(2, d);
  return b;
}

// kWidth: d, where it is known beforehand, and then a multiple of 32 as `inner` is; else 0.
// kShared: everything that is handed on between threads lies in shared memory; else in global scratch.
template <typename T, bool kTangents, bool kBackward, int kWidth, bool kShared>
class SequencePass {
  using N = std::conditional_t<kTangents, Dual<T>, T>;
  static constexpr int kPad = 32;  // after so many parameters a number is left out

  // What the backward pass needs of a block.
  struct Saved {
    const N* inputs;  // (rows, d)
    N *query, *context, *normed, *attended, *last_normed, *outputs, *direction, *mixed, *slope, *bent,
        *deviation, *last_deviation, *weights, *dropped, *total;
  };

  // Tasks of a grid with so many columns, from this thread's first one on.
  struct Columns {
    int count, row, column, row_step, column_step;
  };

 public:
  TD3_FAST_HOST_DEVICE explicit SequencePass(const EncoderProblem& problem)
      : p_(problem),
        inner_(static_cast<int>(problem.sizes.inner)),
        heads_(static_cast<int>(problem.sizes.heads)),
        layers_(static_cast<int>(problem.sizes.layers)),
        length_(static_cast<int>(problem.sizes.length)),
        asked_(static_cast<int>(problem.sizes.asked)),
        any_width_(static_cast<int>(problem.sizes.width)),
        first_parameter_(static_cast<int>(problem.sizes.positions) * any_width_) {
    const BlockParameters last = block_parameters(first_block(), d(), inner_, layers_ - 1);
    size_ = last.last_norm.at + 2 * d();
  }

  TD3_FAST_HOST_DEVICE int64_t bytes() { return lay_out(0); }

  // All sequences of this block of threads.
  __device__ void run(unsigned char* memory, int thread, int threads, int64_t block) {
    thread_ = thread, threads_ = threads;
    lane_ = thread % kWarp, warp_ = thread / kWarp, warps_ = threads / kWarp;
    by_width_ = columns(d()), by_inner_ = columns(inner_);
    lay_out(reinterpret_cast<uintptr_t>(memory));
    logits_ = reinterpret_cast<N*>(static_cast<unsigned char*>(p_.logits) + block * p_.logits_bytes);
    copy_parameters();
    if (kBackward) tasks(size_, [&](int i) { sums_[i] = T(0); });
    for (sequence_ = block; sequence_ < p_.batch; sequence_ += p_.blocks) {
      block_barrier();
      forward();
      write_outputs();
      if (kBackward) backward();
    }
    if (!kBackward) return;
    block_barrier();
    T* const partial = static_cast<T*>(p_.partials) + block * (size_ + 1);
    tasks(size_, [&](int i) { partial[i] = sums_[i]; });
    if (thread_ == 0) partial[size_] = loss_;
  }

 private:
  // ---- memory ----

  TD3_FAST_HOST_DEVICE int d() const { return kWidth > 0 ? kWidth : any_width_; }
  // From row to row; odd, so that neither rows nor columns are all in one bank of shared memory.
  TD3_FAST_HOST_DEVICE int stride() const { return d() | 1; }
  TD3_FAST_HOST_DEVICE int head_width() const { return d() / heads_; }
  TD3_FAST_HOST_DEVICE int first_block() const { return first_parameter_ + 2 * d(); }
  TD3_FAST_HOST_DEVICE bool everywhere(int layer) const { return layer + 1 < layers_; }

  // Arrays one after the other from `first` on; returns the bytes they take.
  TD3_FAST_HOST_DEVICE int64_t lay_out(uintptr_t first) {
    uintptr_t next = first;
    const auto take = [&](auto** to, int64_t count) {
      using X = std::remove_pointer_t<std::remove_pointer_t<decltype(to)>>;
      *to = reinterpret_cast<X*>(next);
      next += static_cast<uintptr_t>((count * static_cast<int64_t>(sizeof(X)) + 15) / 16 * 16);
    };
    const int most = layers_ > 1 && length_ > asked_ ? length_ : asked_;  // rows of a block
    const int tail = size_ - first_parameter_;
    take(&weights_, tail + tail / kPad + 1);
    take(&hidden_, length_ * stride());
    take(&normed_, length_ * stride());
    take(&deviation_, length_);
    take(&sum_, most * stride());
    take(&blocks_, (layers_ - 1) * numbers_of(length_) + numbers_of(asked_));
    take(&at_, asked_);
    if (kBackward) {
      take(&grad_, most * stride());
      take(&grad_more_, most * stride());
      take(&grad_context_, most * stride());
      take(&grad_query_, most * stride());
      take(&grad_mixed_, most * heads_ * stride());
      take(&grad_direction_, most * heads_ * stride());
      take(&grad_scores_, most * heads_ * length_);
      take(&grad_raised_, most * inner_);
      take(&grad_hidden_, length_ * stride());
      take(&sums_, size_);
      take(&masses_, asked_ * kMostWarps);
      take(&peaks_, asked_ * kMostWarps);
    }
    return static_cast<int64_t>(next - first);
  }

  // Numbers that are saved of a block of k rows.
  TD3_FAST_HOST_DEVICE int numbers_of(int k) const {
    return k * ((6 + 2 * heads_) * stride() + 2 * inner_ + 2 + heads_ * (2 * length_ + 1));
  }
  __device__ Saved saved(int layer) const {
    const int k = everywhere(layer) ? length_ : asked_;
    N* next = blocks_ + layer * numbers_of(length_);
    const auto take = [&](int count) {
      N* const taken = next;
      next += k * count;
      return taken;
    };
    Saved s;
    s.query = take(stride()), s.context = take(stride()), s.normed = take(stride());
    s.attended = take(stride()), s.last_normed = take(stride()), s.outputs = take(stride());
    s.direction = take(heads_ * stride()), s.mixed = take(heads_ * stride());
    s.slope = take(inner_), s.bent = take(inner_);
    s.deviation = take(1), s.last_deviation = take(1);
    s.weights = take(heads_ * length_), s.dropped = take(heads_ * length_), s.total = take(heads_);
    s.inputs = layer == 0 ? hidden_ : outputs_of(layer - 1);
    return s;
  }
  __device__ N* outputs_of(int layer) const {
    const int k = everywhere(layer) ? length_ : asked_;
    return blocks_ + layer * numbers_of(length_) + 5 * k * stride();
  }

  // ---- tasks ----

  // run(i) for each i below count.
  template <typename Run>
  __device__ void tasks(int count, const Run& run) const {
    for (int i = thread_; i < count; i += threads_) run(i);
  }
  // store(i, load(i)) for each i below count, with loads that do not wait for one another.
  template <typename Load, typename Store>
  __device__ void in_batches(int count, const Load& load, const Store& store) const {
    constexpr int kAtOnce = 8;
    for (int first = thread_; first < count; first += kAtOnce * threads_) {
      decltype(load(0)) loaded[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * threads_;
        if (at < count) loaded[i] = load(at);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * threads_;
        if (at < count) store(at, loaded[i]);
      }
    }
  }
  // run(row, column) for each of (rows, columns).
  template <typename Run>
  __device__ void grid(int rows, const Columns& columns, const Run& run) const {
    int row = columns.row, column = columns.column;
    while (row < rows) {
      run(row, column);
      row += columns.row_step, column += columns.column_step;
      if (column >= columns.count) row += 1, column -= columns.count;
    }
  }
  __device__ Columns columns(int count) const {
    return {count, thread_ / count, thread_ % count, threads_ / count, threads_ % count};
  }

  __device__ int rows_of(int layer) const { return everywhere(layer) ? rows_ : asked_; }
  // The position of row r of a block.
  __device__ int position(int layer, int r) const { return everywhere(layer) ? r : at_[r]; }
  // The head that column i belongs to; of which row r of a block and a head are, of rows and heads together.
  __device__ int head_of(int i) const { return heads_ == 1 ? 0 : i / head_width(); }
  __device__ int row_of_both(int both) const { return heads_ == 1 ? both : both / heads_; }

  // ---- parameters ----

  __device__ N parameter(int at) const {
    const T v = static_cast<const T*>(p_.parameters)[at];
    if constexpr (kTangents) {
      return {v, p_.parameters_tangent != nullptr ? static_cast<const T*>(p_.parameters_tangent)[at] : T(0)};
    } else {
      return v;
    }
  }
  // Parameter `at` among those that are copied, of which every kPad-th place is left out.
  __device__ static int padded(int at) { return at + at / kPad; }
  __device__ void copy_parameters() const {
    const int tail = size_ - first_parameter_;
    in_batches(
        tail, [&](int i) { return parameter(first_parameter_ + i); },
        [&](int i, N x) { weights_[padded(i)] = x; });
  }
  __device__ Matrix first_norm() const { return {first_parameter_, 2, d()}; }
  __device__ const N& weight(Matrix m, int i, int j) const {
    const int first = m.at - first_parameter_;
    if constexpr (kWidth > 0) {
      // rows begin where nothing is left out before the next kPad
      return weights_[padded(first) + i * (m.in / kPad * (kPad + 1)) + padded(j)];
    } else {
      return weights_[padded(first + i * m.in + j)];
    }
  }

  // sum + the inner product of `count` pairs.
  template <typename A, typename B>
  __device__ static N inner_product(int count, const A& a, const B& b, N sum) {
    constexpr int kSums = 4;
    N more[kSums - 1]{};
    int j = 0;
#pragma unroll 8
    for (; j + kSums <= count; j += kSums) {
      sum = multiply_add(a(j), b(j), sum);
#pragma unroll
      for (int i = 1; i < kSums; ++i) more[i - 1] = multiply_add(a(j + i), b(j + i), more[i - 1]);
    }
    for (; j < count; ++j) sum = multiply_add(a(j), b(j), sum);
    return (sum + more[0]) + (more[1] + more[2]);
  }
  __device__ static N pair_product(int count, const N* a, const N* b, N sum) {
    return inner_product(count, [&](int j) { return a[j]; }, [&](int j) { return b[j]; }, sum);
  }
  // sum + row i of w, of `in` columns, times x.
  __device__ N times_row(Matrix w, int i, int in, const N* x, N sum) const {
    return inner_product(in, [&](int j) { return weight(w, i, j); }, [&](int j) { return x[j]; }, sum);
  }
  // sum + column j of `count` rows of w, from `first`, times x.
  __device__ N times_column(Matrix w, int first, int count, int j, const N* x, N sum) const {
    return inner_product(
        count, [&](int i) { return weight(w, first + i, j); }, [&](int i) { return x[i]; }, sum);
  }
  // Adds the gradients of y = w x + bias: grad (rows, out) and x (rows, in) with their strides.
  __device__ void add_gradients(Matrix w,
                                Matrix bias,
                                int rows,
                                const N* grad,
                                int grad_stride,
                                const Columns& x_columns,
                                const N* x,
                                int x_stride) const {
    grid(w.out, x_columns, [&](int i, int j) {
      T sum = sums_[w.at + i * w.in + j];
      for (int r = 0; r < rows; ++r) sum = add_gradient(grad[r * grad_stride + i], x[r * x_stride + j], sum);
      sums_[w.at + i * w.in + j] = sum;
    });
    tasks(w.out, [&](int i) {
      T sum = sums_[bias.at + i];
      for (int r = 0; r < rows; ++r) sum += stored(grad[r * grad_stride + i]);
      sums_[bias.at + i] = sum;
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
    return drops(site) ? x * survivor(site, int64_t{rows} * d(), r * d() + f) : x;
  }
  __device__ static N constant(T x) {
    if constexpr (kTangents) {
      return {x, T(0)};
    } else {
      return x;
    }
  }
  __device__ int mask_rows(int layer) const { return everywhere(layer) ? length_ : asked_; }
  __device__ N attention_dropped(int layer, int head, int r, int j, N x) const {
    const int site = 1 + 3 * layer, k = mask_rows(layer);
    if (!drops(site)) return x;
    return x * survivor(site, int64_t{heads_} * k * length_, (int64_t{head} * k + r) * length_ + j);
  }

  // ---- norms ----

  // Of one row by a warp: x lies in `normed`, and is normed in place; use(f, output).
  template <typename Use>
  __device__ void norm_row(Matrix norm, N* normed, N* deviation, const Use& use) const {
    const T share = T(1) / static_cast<T>(d());
    N mean{};
    for (int f = lane_; f < d(); f += kWarp) mean = mean + normed[f];
    mean = warp_sum(mean) * share;
    N variance{};
    for (int f = lane_; f < d(); f += kWarp) {
      const N apart = normed[f] - mean;
      variance = multiply_add(apart, apart, variance);
    }
    const N scale = inverse_square_root(minus(warp_sum(variance) * share, static_cast<T>(-kNormEps)));
    for (int f = lane_; f < d(); f += kWarp) {
      normed[f] = (normed[f] - mean) * scale;
      use(f, multiply_add(normed[f], weight(norm, 0, f), weight(norm, 1, f)));
    }
    if (lane_ == 0) *deviation = scale;
  }
  // The gradient of a norm's input from that of its output, one row by a warp: use(f, gradient).
  template <typename Use>
  __device__ void norm_row_backward(
      Matrix norm, const N* grad, const N* normed, N deviation, const Use& use) const {
    const T share = T(1) / static_cast<T>(d());
    N mean{}, product{};
    for (int f = lane_; f < d(); f += kWarp) {
      const N scaled = grad[f] * weight(norm, 0, f);
      mean = mean + scaled;
      product = multiply_add(scaled, normed[f], product);
    }
    mean = warp_sum(mean) * share;
    product = warp_sum(product) * share;
    for (int f = lane_; f < d(); f += kWarp) {
      use(f, (grad[f] * weight(norm, 0, f) - mean - normed[f] * product) * deviation);
    }
  }
  __device__ void add_norm_gradients(Matrix norm, int rows, const N* grad, const N* normed) const {
    grid(2, by_width_, [&](int which, int f) {
      T sum = sums_[norm.at + which * d() + f];
      for (int r = 0; r < rows; ++r) {
        const N g = grad[r * stride() + f];
        sum = which == 0 ? add_gradient(g, normed[r * stride() + f], sum) : sum + stored(g);
      }
      sums_[norm.at + which * d() + f] = sum;
    });
  }
  // Both norms of a block, backwards: grad (k, d) to `to`, and what of it goes into the branch before,
  // dropped.
  __device__ void norm_backward(
      int layer, Matrix norm, int site, const N* grad, const N* normed, const N* deviation, N* to) const {
    const int k = rows_of(layer);
    add_norm_gradients(norm, k, grad, normed);
    for (int r = warp_; r < k; r += warps_) {
      norm_row_backward(norm, grad + r * stride(), normed + r * stride(), deviation[r], [&](int f, N g) {
        to[r * stride() + f] = g;
        sum_[r * stride() + f] = dropped(site, mask_rows(layer), r, f, g);
      });
    }
    block_barrier();
  }

  // ---- inputs and outputs ----

  __device__ N input(int j, int f) const {
    const T* const inputs = static_cast<const T*>(p_.inputs);
    const int64_t at = p_.ids != nullptr ? p_.ids[sequence_ * length_ + j] * d() + f
                                         : sequence_ * p_.input_stride + j * d() + f;
    if constexpr (kTangents) {
      const T* const tangent = static_cast<const T*>(p_.inputs_tangent);
      return {inputs[at],
              tangent != nullptr ? tangent[sequence_ * p_.input_tangent_stride + j * d() + f] : T(0)};
    } else {
      return inputs[at];
    }
  }
  __device__ void write_outputs() const {
    if (p_.outputs == nullptr) return;
    T* const to = static_cast<T*>(p_.outputs) + sequence_ * asked_ * d();
    const N* const outputs = outputs_of(layers_ - 1);
    grid(asked_, by_width_, [&](int r, int f) { to[r * d() + f] = stored(outputs[r * stride() + f]); });
  }

  // ---- forward ----

  __device__ void forward() {
    tasks(asked_, [&](int r) {
      const int64_t position = p_.positions[sequence_ * asked_ + r] + p_.offset;
      if (position < 0 || position >= length_) trap();
      at_[r] = static_cast<int>(position);
    });
    block_barrier();
    rows_ = 0;
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
          hidden_[at] = N{} + constant(loaded.survivor);
        });
    block_barrier();
    for (int j = warp_; j < rows_; j += warps_) {
      N* const hidden = hidden_ + j * stride();
      norm_row(first_norm(), normed_ + j * stride(), deviation_ + j,
               [&](int f, N y) { hidden[f] = y * value_of(hidden[f]); });
    }
    block_barrier();
    for (int layer = 0; layer < layers_; ++layer) block_forward(layer);
  }

  __device__ void block_forward(int layer) const {
    const int k = rows_of(layer), w = head_width();
    const BlockParameters b = block_parameters(first_block(), d(), inner_, layer);
    const Saved saved = this->saved(layer);
    grid(k, by_width_, [&](int r, int i) {
      const N* asked = saved.inputs + position(layer, r) * stride();
      saved.query[r * stride() + i] = times_row(b.query, i, d(), asked, weight(b.query_bias, 0, i));
    });
    block_barrier();
    // q · (W h + b) = (Wᵀ q) · h plus the same for every key
    grid(k * heads_, by_width_, [&](int row, int f) {
      const int r = row_of_both(row), first = (row - r * heads_) * w;
      saved.direction[row * stride() + f] =
          times_column(b.key, first, w, f, saved.query + r * stride() + first, N{});
    });
    block_barrier();
    attend(layer);
    block_barrier();
    grid(k * heads_, by_width_, [&](int row, int f) {
      const int keys = position(layer, row_of_both(row)) + 1;
      const N *weights = saved.dropped + row * length_, *values = saved.inputs + f;
      saved.mixed[row * stride() + f] = inner_product(
          keys, [&](int j) { return weights[j]; }, [&](int j) { return values[j * stride()]; }, N{});
    });
    block_barrier();
    grid(k, by_width_, [&](int r, int i) {
      const int row = r * heads_ + head_of(i);
      const N bias = saved.total[row] * weight(b.value_bias, 0, i);
      saved.context[r * stride() + i] = times_row(b.value, i, d(), saved.mixed + row * stride(), bias);
    });
    block_barrier();
    grid(k, by_width_, [&](int r, int i) {
      const N sum = times_row(b.output, i, d(), saved.context + r * stride(), weight(b.output_bias, 0, i));
      saved.normed[r * stride() + i] = dropped(2 + 3 * layer, mask_rows(layer), r, i, sum) +
                                       saved.inputs[position(layer, r) * stride() + i];
    });
    block_barrier();
    for (int r = warp_; r < k; r += warps_) {
      norm_row(b.norm, saved.normed + r * stride(), saved.deviation + r,
               [&](int f, N y) { saved.attended[r * stride() + f] = y; });
    }
    block_barrier();
    grid(k, by_inner_, [&](int r, int i) {
      const N raised = times_row(b.up, i, d(), saved.attended + r * stride(), weight(b.up_bias, 0, i));
      gelu(raised, saved.bent + r * inner_ + i, saved.slope + r * inner_ + i);
    });
    block_barrier();
    grid(k, by_width_, [&](int r, int i) {
      const N sum = times_row(b.down, i, inner_, saved.bent + r * inner_, weight(b.down_bias, 0, i));
      saved.last_normed[r * stride() + i] =
          dropped(3 + 3 * layer, mask_rows(layer), r, i, sum) + saved.attended[r * stride() + i];
    });
    block_barrier();
    for (int r = warp_; r < k; r += warps_) {
      norm_row(b.last_norm, saved.last_normed + r * stride(), saved.last_deviation + r,
               [&](int f, N y) { saved.outputs[r * stride() + f] = y; });
    }
    block_barrier();
  }

  // The weights of a block's attention before dropout, and their sum after it: a warp for each row and head.
  __device__ void attend(int layer) const {
    const Saved saved = this->saved(layer);
    const T scale = T(1) / square_root(static_cast<T>(head_width()));
    for (int row = warp_; row < rows_of(layer) * heads_; row += warps_) {
      const int r = row_of_both(row), head = row - r * heads_, keys = position(layer, r) + 1;
      const N* direction = saved.direction + row * stride();
      N* weights = saved.weights + row * length_;
      T peak = minus_infinity<T>();
      for (int j = lane_; j < keys; j += kWarp) {
        const N* key = saved.inputs + j * stride();
        weights[j] = pair_product(d(), direction, key, N{}) * scale;
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
        const N dropped = attention_dropped(layer, head, r, j, weights[j]);
        saved.dropped[row * length_ + j] = dropped;
        total = total + dropped;
      }
      total = warp_sum(total);
      if (lane_ == 0) saved.total[row] = total;
    }
  }

  // ---- the loss against all items ----

  // grad_ = the gradient of the mean of logsumexp(h E^T) - h x towards the outputs h.
  __device__ void compare_with_items() {
    const N* const outputs = outputs_of(layers_ - 1);
    const T share = T(1) / static_cast<T>(p_.batch * asked_);
    const int n = static_cast<int>(p_.num_items);
    for (int r = 0; r < asked_; r += kRowsAtOnce) score_items(r, outputs);
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
      if (lane_ == 0) masses_[r * kMostWarps + warp_] = mass;
    }
    block_barrier();
    for (int r = 0; r < asked_; r += kRowsAtOnce) average_items(r);
    block_barrier();
    grid(asked_, by_width_, [&](int r, int f) {
      const N mean = grad_[r * stride() + f] * inverse(mass_of(r));
      grad_[r * stride() + f] = (mean - input(at_[r] + 1, f)) * share;
    });
    if (!kTangents && warp_ == 0) {
      for (int r = 0; r < asked_; ++r) {
        T score = 0;
        for (int f = lane_; f < d(); f += kWarp) {
          score += value_of(outputs[r * stride() + f]) * value_of(input(at_[r] + 1, f));
        }
        loss_ += (peak_of(r) + logarithm(value_of(mass_of(r))) - warp_sum(score)) * share;
      }
    }
    block_barrier();
  }

  // The logits of rows first, ..., and the largest that each warp has met. Items lie column by column.
  __device__ void score_items(int first, const N* outputs) const {
    constexpr int kItems = 4;
    const T* const items = static_cast<const T*>(p_.items);
    const int n = static_cast<int>(p_.num_items);
    T peaks[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) peaks[r] = minus_infinity<T>();
    for (int item = thread_; item < n; item += kItems * threads_) {
      N sums[kItems][kRowsAtOnce]{};
      int at[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) at[i] = item + i * threads_ < n ? item + i * threads_ : item;
#pragma unroll 4
      for (int f = 0; f < d(); ++f) {
        const T* const column = items + int64_t{f} * n;
        T e[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) e[i] = column[at[i]];
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const N h = outputs[row_within(first + r) * stride() + f];
#pragma unroll
          for (int i = 0; i < kItems; ++i) sums[i][r] = multiply_add(h, e[i], sums[i][r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (first + r >= asked_) continue;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          logits_[int64_t{first + r} * n + at[i]] = sums[i][r];
          peaks[r] = value_of(sums[i][r]) > peaks[r] ? value_of(sums[i][r]) : peaks[r];
        }
      }
    }
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const T peak = warp_max(peaks[r]);
      if (lane_ == 0 && first + r < asked_) peaks_[(first + r) * kMostWarps + warp_] = peak;
    }
  }

  // grad_ of rows first, ... = the sum of all items, weighted: a warp for two columns at a time.
  __device__ void average_items(int first) const {
    constexpr int kColumns = 2;
    const T* const items = static_cast<const T*>(p_.items);
    const int n = static_cast<int>(p_.num_items);
    for (int column = warp_; column < d(); column += kColumns * warps_) {
      N sums[kColumns][kRowsAtOnce]{};
      int at[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) at[i] = column + i * warps_ < d() ? column + i * warps_ : column;
#pragma unroll 8
      for (int item = lane_; item < n; item += kWarp) {
        N weights[kRowsAtOnce];
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) weights[r] = logits_[int64_t{row_within(first + r)} * n + item];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const T e = items[int64_t{at[i]} * n + item];
#pragma unroll
          for (int r = 0; r < kRowsAtOnce; ++r) sums[i][r] = multiply_add(weights[r], e, sums[i][r]);
        }
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const N sum = warp_sum(sums[i][r]);
          if (lane_ == 0 && first + r < asked_) grad_[(first + r) * stride() + at[i]] = sum;
        }
      }
    }
  }
  __device__ int row_within(int r) const { return r < asked_ ? r : asked_ - 1; }
  __device__ T peak_of(int r) const {
    T peak = peaks_[r * kMostWarps];
    for (int warp = 1; warp < warps_; ++warp) {
      const T other = peaks_[r * kMostWarps + warp];
      peak = other > peak ? other : peak;
    }
    return peak;
  }
  __device__ N mass_of(int r) const {
    N sum{};
    for (int warp = 0; warp < warps_; ++warp) sum = sum + masses_[r * kMostWarps + warp];
    return sum;
  }

  // ---- backward ----

  __device__ void read_upstream() const {
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

  __device__ void backward() {
    if (p_.num_items > 0) {
      compare_with_items();
    } else {
      read_upstream();
    }
    for (int layer = layers_ - 1; layer >= 0; --layer) {
      grid(rows_, by_width_, [&](int j, int f) { grad_hidden_[j * stride() + f] = N{}; });
      block_backward(layer);
      if (layer > 0) {
        grid(rows_, by_width_,
             [&](int j, int f) { grad_[j * stride() + f] = grad_hidden_[j * stride() + f]; });
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
    for (int j = warp_; j < rows_; j += warps_) {
      const N *grad = grad_hidden_ + j * stride(), *normed = normed_ + j * stride();
      norm_row_backward(first_norm(), grad, normed, deviation_[j], [&](int f, N g) {
        sums_[j * d() + f] += stored(g);
        if (p_.grad_inputs != nullptr) grad_inputs[j * d() + f] = stored(g);
      });
    }
    if (p_.grad_inputs == nullptr) return;
    const int rest = static_cast<int>(p_.grad_input_rows) - rows_;
    tasks(rest * d(), [&](int i) { grad_inputs[rows_ * d() + i] = T(0); });
    if (p_.to_targets == 0) return;
    block_barrier();
    const N* const outputs = outputs_of(layers_ - 1);
    tasks(d(), [&](int f) {
      for (int r = 0; r < asked_; ++r) {
        T& to = grad_inputs[(at_[r] + 1) * d() + f];
        to += static_cast<T>(p_.to_targets) * stored(outputs[r * stride() + f]);
      }
    });
  }

  // grad_ (k, d) is of the block's outputs; grad_hidden_ (rows, d) is added to.
  __device__ void block_backward(int layer) const {
    const int k = rows_of(layer);
    const BlockParameters b = block_parameters(first_block(), d(), inner_, layer);
    const Saved saved = this->saved(layer);
    norm_backward(layer, b.last_norm, 3 + 3 * layer, grad_, saved.last_normed, saved.last_deviation,
                  grad_more_);
    add_gradients(b.down, b.down_bias, k, sum_, stride(), by_inner_, saved.bent, inner_);
    grid(k, by_inner_, [&](int r, int j) {
      const N sum = times_column(b.down, 0, d(), j, sum_ + r * stride(), N{});
      grad_raised_[r * inner_ + j] = sum * saved.slope[r * inner_ + j];
    });
    block_barrier();
    add_gradients(b.up, b.up_bias, k, grad_raised_, inner_, by_width_, saved.attended, stride());
    grid(k, by_width_, [&](int r, int f) {
      const N grad = grad_more_[r * stride() + f];
      grad_[r * stride() + f] = times_column(b.up, 0, inner_, f, grad_raised_ + r * inner_, grad);
    });
    block_barrier();
    norm_backward(layer, b.norm, 2 + 3 * layer, grad_, saved.normed, saved.deviation, grad_more_);
    add_gradients(b.output, b.output_bias, k, sum_, stride(), by_width_, saved.context, stride());
    grid(k, by_width_, [&](int r, int f) {
      grad_context_[r * stride() + f] = times_column(b.output, 0, d(), f, sum_ + r * stride(), N{});
    });
    block_barrier();
    values_backward(layer, b);
    scores_backward(layer, b);
    grid(k * heads_, by_width_, [&](int row, int f) {
      const int r = row_of_both(row), keys = position(layer, r) + 1;
      const N *scores = grad_scores_ + row * length_, *keys_at = saved.inputs + f;
      grad_direction_[row * stride() + f] = inner_product(
          keys, [&](int j) { return scores[j]; }, [&](int j) { return keys_at[j * stride()]; }, N{});
    });
    inputs_backward(layer);
    block_barrier();
    grid(k, by_width_, [&](int r, int i) {
      const N* grad = grad_direction_ + (r * heads_ + head_of(i)) * stride();
      grad_query_[r * stride() + i] = times_row(b.key, i, d(), grad, N{});
    });
    grid(d(), by_width_, [&](int i, int f) {
      T sum = sums_[b.key.at + i * d() + f];
      for (int r = 0; r < k; ++r) {
        const N grad = grad_direction_[(r * heads_ + head_of(i)) * stride() + f];
        sum = add_gradient(saved.query[r * stride() + i], grad, sum);
      }
      sums_[b.key.at + i * d() + f] = sum;
    });
    block_barrier();
    queries_backward(layer, b);
  }

  // From grad_context_ to grad_mixed_.
  __device__ void values_backward(int layer, const BlockParameters& b) const {
    const int k = rows_of(layer), w = head_width();
    const Saved saved = this->saved(layer);
    grid(d(), by_width_, [&](int i, int f) {
      T sum = sums_[b.value.at + i * d() + f];
      for (int r = 0; r < k; ++r) {
        const N mixed = saved.mixed[(r * heads_ + head_of(i)) * stride() + f];
        sum = add_gradient(grad_context_[r * stride() + i], mixed, sum);
      }
      sums_[b.value.at + i * d() + f] = sum;
    });
    tasks(d(), [&](int i) {
      T sum = sums_[b.value_bias.at + i];
      for (int r = 0; r < k; ++r) {
        sum = add_gradient(grad_context_[r * stride() + i], saved.total[r * heads_ + head_of(i)], sum);
      }
      sums_[b.value_bias.at + i] = sum;
    });
    grid(k * heads_, by_width_, [&](int row, int f) {
      const int r = row_of_both(row), first = (row - r * heads_) * w;
      grad_mixed_[row * stride() + f] =
          times_column(b.value, first, w, f, grad_context_ + r * stride() + first, N{});
    });
    block_barrier();
  }

  // From grad_mixed_ to grad_scores_: a warp for each row and head.
  __device__ void scores_backward(int layer, const BlockParameters& b) const {
    const Saved saved = this->saved(layer);
    const T scale = T(1) / square_root(static_cast<T>(head_width()));
    for (int row = warp_; row < rows_of(layer) * heads_; row += warps_) {
      const int r = row_of_both(row), head = row - r * heads_, keys = position(layer, r) + 1;
      const N *grad_mixed = grad_mixed_ + row * stride(), *weights = saved.weights + row * length_;
      N* grad_scores = grad_scores_ + row * length_;
      N grad_total{};
      for (int i = lane_; i < head_width(); i += kWarp) {
        const int at = head * head_width() + i;
        grad_total = multiply_add(grad_context_[r * stride() + at], weight(b.value_bias, 0, at), grad_total);
      }
      grad_total = warp_sum(grad_total);
      N product{};
      for (int j = lane_; j < keys; j += kWarp) {
        const N* value = saved.inputs + j * stride();
        const N grad = pair_product(d(), grad_mixed, value, grad_total);
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
    const Saved saved = this->saved(layer);
    const int k = rows_of(layer);
    grid(rows_, by_width_, [&](int j, int f) {
      N sum = grad_hidden_[j * stride() + f];
      for (int r = 0; r < k; ++r) {
        if (position(layer, r) < j) continue;
        for (int head = 0; head < heads_; ++head) {
          const int row = r * heads_ + head;
          sum = multiply_add(saved.dropped[row * length_ + j], grad_mixed_[row * stride() + f], sum);
          sum = multiply_add(grad_scores_[row * length_ + j], saved.direction[row * stride() + f], sum);
        }
      }
      grad_hidden_[j * stride() + f] = sum;
    });
  }

  // From grad_query_, with what goes past the attention, to the gradient of the block's inputs.
  __device__ void queries_backward(int layer, const BlockParameters& b) const {
    const int k = rows_of(layer);
    const Saved saved = this->saved(layer);
    grid(d(), by_width_, [&](int i, int j) {
      T sum = sums_[b.query.at + i * d() + j];
      for (int r = 0; r < k; ++r) {
        sum =
            add_gradient(grad_query_[r * stride() + i], saved.inputs[position(layer, r) * stride() + j], sum);
      }
      sums_[b.query.at + i * d() + j] = sum;
    });
    tasks(d(), [&](int i) {
      T sum = sums_[b.query_bias.at + i];
      for (int r = 0; r < k; ++r) sum += stored(grad_query_[r * stride() + i]);
      sums_[b.query_bias.at + i] = sum;
    });
    const auto from_row = [&](int r, int f) {
      return times_column(b.query, 0, d(), f, grad_query_ + r * stride(), grad_more_[r * stride() + f]);
    };
    if (everywhere(layer)) {
      grid(k, by_width_, [&](int r, int f) {
        N& to = grad_hidden_[r * stride() + f];
        to = to + from_row(r, f);
      });
    } else {
      // asked positions may be equal
      tasks(d(), [&](int f) {
        for (int r = 0; r < k; ++r) {
          N& to = grad_hidden_[position(layer, r) * stride() + f];
          to = to + from_row(r, f);
        }
      });
    }
    block_barrier();
  }

  static constexpr int kMostWarps = 16;
  static constexpr int kRowsAtOnce = 2;  // that are compared with items as these are read

  const EncoderProblem& p_;
  int inner_, heads_, layers_, length_, asked_, any_width_, first_parameter_, size_;
  int thread_ = 0, threads_ = 0, lane_ = 0, warp_ = 0, warps_ = 0;
  Columns by_width_, by_inner_;
  int rows_ = 0;  // up to the last asked position
  int64_t sequence_ = 0;
  T loss_ = 0;  // of the first thread
  int* at_;     // the asked positions
  N *weights_, *hidden_, *normed_, *deviation_, *sum_, *blocks_, *logits_ = nullptr;
  N *grad_ = nullptr, *grad_more_ = nullptr, *grad_context_ = nullptr, *grad_query_ = nullptr,
    *grad_mixed_ = nullptr, *grad_direction_ = nullptr, *grad_scores_ = nullptr, *grad_raised_ = nullptr,
    *grad_hidden_ = nullptr, *masses_ = nullptr;
  T *sums_ = nullptr, *peaks_ = nullptr;
};

}  // namespace td3_fast::cuda
