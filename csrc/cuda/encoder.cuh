// The encoder's passes: a block of threads for one sequence at a time. See kernels.h for what is computed.
// Here is what lies where and how work is shared out; encoder_forward.cuh, encoder_items.cuh and
// encoder_backward.cuh have the passes.
//
// A pass is written once, for numbers N that are plain or dual. It is a row of phases with a barrier after
// each; in a phase threads, groups of eight lanes or warps take every so many-th number or row. A number is
// always summed by one of them in the same order, so results do not depend on the hardware.
#pragma once

#include <type_traits>

#include "../philox.h"
#include "block_threads.cuh"

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

// kWidth: d, where it is known beforehand, a multiple of 32, and then `inner` is twice as much and there are
// one layer and one head; else 0.
template <typename T, bool kTangents, bool kBackward, int kWidth>
class SequencePass : BlockThreads {
  using N = std::conditional_t<kTangents, Dual<T>, T>;
  static constexpr int kPad = 32;  // after so many parameters a number is left out

  // What the backward pass needs of a block.
  struct Saved {
    const N* inputs;  // (rows, d)
    N *query, *context, *normed, *attended, *last_normed, *outputs, *direction, *mixed, *slope, *bent,
        *deviation, *last_deviation, *weights, *dropped, *total;
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
    const BlockParameters last = block_parameters(first_block(), d(), inner(), layers() - 1);
    size_ = last.last_norm.at + 2 * d();
  }

  TD3_FAST_HOST_DEVICE int64_t bytes() { return lay_out(nullptr); }

  // All sequences of this block of threads.
  __device__ void run(unsigned char* memory, int thread, int threads, int64_t block) {
    take_place(thread, threads);
    by_width_ = columns(d()), by_inner_ = columns(inner());
    lay_out(memory);
    logits_ = reinterpret_cast<N*>(static_cast<unsigned char*>(p_.logits) + block * p_.logits_bytes);
    copy_parameters();
    if (kBackward) tasks(size_, [&](int i) { sums_[i] = T(0); });
#pragma unroll 1
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

  static constexpr bool kKnown = kWidth > 0;
  TD3_FAST_HOST_DEVICE int d() const { return kKnown ? kWidth : any_width_; }
  TD3_FAST_HOST_DEVICE int inner() const { return kKnown ? 2 * kWidth : inner_; }
  TD3_FAST_HOST_DEVICE int heads() const { return kKnown ? 1 : heads_; }
  TD3_FAST_HOST_DEVICE int layers() const { return kKnown ? 1 : layers_; }
  // From row to row; odd, so that neither rows nor columns are all in one bank of shared memory.
  TD3_FAST_HOST_DEVICE int stride() const { return d() | 1; }
  TD3_FAST_HOST_DEVICE int head_width() const { return d() / heads(); }
  TD3_FAST_HOST_DEVICE int first_block() const { return first_parameter_ + 2 * d(); }
  TD3_FAST_HOST_DEVICE bool everywhere(int layer) const { return layer + 1 < layers(); }

  // Arrays one after the other in `memory`, which may be null; returns the bytes they take.
  TD3_FAST_HOST_DEVICE int64_t lay_out(unsigned char* memory) {
    int64_t next = 0;
    const auto take = [&](auto** to, int64_t count) {
      using X = std::remove_pointer_t<std::remove_pointer_t<decltype(to)>>;
      *to = reinterpret_cast<X*>(memory + next);
      next += (count * static_cast<int64_t>(sizeof(X)) + 15) / 16 * 16;
    };
    const int most = layers() > 1 && length_ > asked_ ? length_ : asked_;  // rows of a block
    const int tail = size_ - first_parameter_;
    take(&weights_, tail + tail / kPad + 1);
    take(&hidden_, length_ * stride());
    take(&normed_, length_ * stride());
    take(&deviation_, length_);
    take(&sum_, most * stride());
    take(&blocks_, (layers() - 1) * numbers_of(length_) + numbers_of(asked_));
    take(&at_, asked_);
    if (kBackward) {
      take(&grad_, most * stride());
      take(&grad_more_, most * stride());
      take(&grad_context_, most * stride());
      take(&grad_query_, most * stride());
      take(&grad_mixed_, most * heads() * stride());
      take(&grad_direction_, most * heads() * stride());
      take(&grad_scores_, most * heads() * length_);
      take(&grad_raised_, most * inner());
      take(&grad_total_, most * heads());
      take(&grad_hidden_, length_ * stride());
      take(&sums_, size_);
      take(&masses_, asked_ * kMostWarps);
      take(&peaks_, asked_ * kMostWarps);
    }
    return next;
  }

  // Numbers that are saved of a block of k rows.
  TD3_FAST_HOST_DEVICE int numbers_of(int k) const {
    return k * ((6 + 2 * heads()) * stride() + 2 * inner() + 2 + heads() * (2 * length_ + 1));
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
    s.direction = take(heads() * stride()), s.mixed = take(heads() * stride());
    s.slope = take(inner()), s.bent = take(inner());
    s.deviation = take(1), s.last_deviation = take(1);
    s.weights = take(heads() * length_), s.dropped = take(heads() * length_), s.total = take(heads());
    s.inputs = layer == 0 ? hidden_ : outputs_of(layer - 1);
    return s;
  }
  __device__ N* outputs_of(int layer) const {
    const int k = everywhere(layer) ? length_ : asked_;
    return blocks_ + layer * numbers_of(length_) + 5 * k * stride();
  }

  // ---- tasks ----

  // finish(row, column, sum over j below count(row) of the products of the pairs(row, column, j)) for each of
  // (rows, columns): pairs gives sum + product.
  template <typename Count, typename Add, typename Finish>
  __device__ void products(
      int rows, int columns, const Count& count, const Add& add, const Finish& finish) const {
    by_group(rows * columns, [&](int index, bool active) {
      const int row = index / columns, column = index - row * columns;
      const Share share = share_of(count(row));
      N sum{};
#pragma unroll 4
      for (int j = share.from; j < share.to; ++j) sum = add(row, column, j, sum);
      sum = group_sum(sum);
      if (active && part() == 0) finish(row, column, sum);
    });
  }

  __device__ int rows_of(int layer) const { return everywhere(layer) ? rows_ : asked_; }
  // The position of row r of a block.
  __device__ int position(int layer, int r) const { return everywhere(layer) ? r : at_[r]; }
  // The head that column i belongs to; of which row r of a block and a head are, of rows and heads together.
  __device__ int head_of(int i) const { return heads() == 1 ? 0 : i / head_width(); }
  __device__ int row_of_both(int both) const { return heads() == 1 ? both : both / heads(); }

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

  // finish(r, i, row i of w times x(r)) for each of `rows` rows.
  template <typename X, typename Finish>
  __device__ void times(int rows, Matrix w, int out, int in, const X& x, const Finish& finish) const {
    products(
        rows, out, [&](int) { return in; },
        [&](int r, int i, int j, N sum) { return multiply_add(weight(w, i, j), x(r, i)[j], sum); }, finish);
  }
  // finish(r, j, column j of w times x(r)): of `count` rows of w, from first(r) on.
  template <typename First, typename X, typename Finish>
  __device__ void times_transposed(
      int rows, Matrix w, int count, int in, const First& first, const X& x, const Finish& finish) const {
    products(
        rows, in, [&](int) { return count; },
        [&](int r, int j, int i, N sum) { return multiply_add(weight(w, first(r) + i, j), x(r)[i], sum); },
        finish);
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
#pragma unroll 1
      for (int r = 0; r < rows; ++r) sum = add_gradient(grad[r * grad_stride + i], x[r * x_stride + j], sum);
      sums_[w.at + i * w.in + j] = sum;
    });
    tasks(w.out, [&](int i) {
      T sum = sums_[bias.at + i];
#pragma unroll 1
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
    return x * survivor(site, int64_t{heads()} * k * length_, (int64_t{head} * k + r) * length_ + j);
  }

  // ---- norms: beside the passes that they belong to ----

  // Of each of so many rows: x lies in `normed`, and is normed in place; use(row, f, output).
  template <typename Use>
  __device__ void norm_rows(int rows, Matrix norm, N* normed_rows, N* deviations, const Use& use) const;
  // The gradient of a norm's inputs from that of its outputs: use(row, f, gradient).
  template <typename Use>
  __device__ void norm_rows_backward(
      int rows, Matrix norm, const N* grads, const N* normed_rows, const N* deviations, const Use& use) const;
  __device__ void add_norm_gradients(Matrix norm, int rows, const N* grad, const N* normed) const;
  // Both norms of a block, backwards: grad (k, d) to `to`, and what of it goes into the branch before,
  // dropped, to sum_.
  __device__ void norm_backward(
      int layer, Matrix norm, int site, const N* grad, const N* normed, const N* deviation, N* to) const;

  // ---- inputs and outputs ----

  __device__ int64_t within_table(int64_t row) const {
    if (row < 0 || row >= p_.table_rows) trap();
    return row;
  }
  __device__ N input(int j, int f) const {
    const T* const inputs = static_cast<const T*>(p_.inputs);
    const int64_t at = p_.ids != nullptr ? within_table(p_.ids[sequence_ * length_ + j]) * d() + f
                                         : row_ * p_.input_stride + j * d() + f;
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
    const N* const outputs = outputs_of(layers() - 1);
    grid(asked_, by_width_, [&](int r, int f) { to[r * d() + f] = stored(outputs[r * stride() + f]); });
  }

  // ---- forward: encoder_forward.cuh ----

  __device__ void forward();
  __device__ void block_forward(int layer) const;
  // The weights of a block's attention before and after dropout, and the sums of the latter.
  __device__ void attend(int layer) const;

  // ---- the loss against all items: encoder_items.cuh ----

  // grad_ = the gradient of the mean of logsumexp(h E^T) - h x towards the outputs h.
  __device__ void compare_with_items();
  // The logits of rows first, ..., and the largest that each warp has met. Items lie column by column.
  __device__ void score_items(int first, const N* outputs) const;
  // grad_ of rows first, ... = the sum of all items, weighted: a warp for two columns at a time.
  __device__ void average_items(int first) const;
  __device__ int row_within(int r) const { return r < asked_ ? r : asked_ - 1; }
  __device__ T peak_of(int r) const {
    T peak = peaks_[r * kMostWarps];
#pragma unroll 1
    for (int warp = 1; warp < warps_; ++warp) {
      const T other = peaks_[r * kMostWarps + warp];
      peak = other > peak ? other : peak;
    }
    return peak;
  }
  __device__ N mass_of(int r) const {
    N sum{};
#pragma unroll 1
    for (int warp = 0; warp < warps_; ++warp) sum = sum + masses_[r * kMostWarps + warp];
    return sum;
  }

  // ---- backward: encoder_backward.cuh ----

  __device__ void read_upstream() const;
  __device__ void backward();
  // grad_ (k, d) is of the block's outputs; grad_hidden_ (rows, d) is added to.
  __device__ void block_backward(int layer) const;
  // From grad_context_ to grad_mixed_ and grad_total_.
  __device__ void values_backward(int layer, const BlockParameters& b) const;
  // From grad_mixed_ and grad_total_ to grad_scores_.
  __device__ void scores_backward(int layer) const;
  // What the block's attention adds to the gradient of its inputs, as keys and as values.
  __device__ void inputs_backward(int layer) const;
  // From grad_query_, with what goes past the attention, to the gradient of the block's inputs.
  __device__ void queries_backward(int layer, const BlockParameters& b) const;

  static constexpr int kMostWarps = 16;
  static constexpr int kRowsAtOnce = 2;  // that are compared with items as these are read

  const EncoderProblem& p_;
  int inner_, heads_, layers_, length_, asked_, any_width_, first_parameter_, size_;
  Columns by_width_, by_inner_;
  int rows_ = 0;                    // up to the last asked position
  int64_t sequence_ = 0, row_ = 0;  // the latter among the inputs
  T loss_ = 0;                      // of the first thread
  int* at_;                         // the asked positions
  N *weights_, *hidden_, *normed_, *deviation_, *sum_, *blocks_, *logits_ = nullptr;
  N *grad_ = nullptr, *grad_more_ = nullptr, *grad_context_ = nullptr, *grad_query_ = nullptr,
    *grad_mixed_ = nullptr, *grad_direction_ = nullptr, *grad_scores_ = nullptr, *grad_raised_ = nullptr,
    *grad_hidden_ = nullptr, *grad_total_ = nullptr, *masses_ = nullptr;
  T *sums_ = nullptr, *peaks_ = nullptr;
};

}  // namespace td3_fast::cuda
