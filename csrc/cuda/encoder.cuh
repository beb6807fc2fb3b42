// The encoder's passes: a block of threads for one sequence at a time. See kernels.h for what is computed.
//
// A pass is written once, for numbers N that are plain or dual. It is a row of phases with a barrier after
// each; in a phase threads, groups of eight lanes or warps take every so many-th number or row. A number is
// always summed by one of them in the same order, so results do not depend on the hardware.
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

// kWidth: d, where it is known beforehand, a multiple of 32, and then `inner` is twice as much and there are
// one layer and one head; else 0.
template <typename T, bool kTangents, bool kBackward, int kWidth>
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
    const BlockParameters last = block_parameters(first_block(), d(), inner(), layers() - 1);
    size_ = last.last_norm.at + 2 * d();
  }

  TD3_FAST_HOST_DEVICE int64_t bytes() { return lay_out(nullptr); }

  // All sequences of this block of threads.
  __device__ void run(unsigned char* memory, int thread, int threads, int64_t block) {
    thread_ = thread, threads_ = threads;
    lane_ = thread % kWarp, warp_ = thread / kWarp, warps_ = threads / kWarp;
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

  // run(i) for each i below count.
  template <typename Run>
  __device__ void tasks(int count, const Run& run) const {
#pragma unroll 1
    for (int i = thread_; i < count; i += threads_) run(i);
  }
  // store(i, load(i)) for each i below count, with loads that do not wait for one another.
  template <typename Load, typename Store>
  __device__ void in_batches(int count, const Load& load, const Store& store) const {
    constexpr int kAtOnce = 8;
#pragma unroll 1
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
#pragma unroll 1
    while (row < rows) {
      run(row, column);
      row += columns.row_step, column += columns.column_step;
      if (column >= columns.count) row += 1, column -= columns.count;
    }
  }
  __device__ Columns columns(int count) const {
    return {count, thread_ / count, thread_ % count, threads_ / count, threads_ % count};
  }

  // Groups of lanes work on one number or row each, so that few of them keep all threads busy.
  static constexpr int kGroup = 8, kGroups = kWarp / kGroup;  // lanes of a group, groups of a warp
  __device__ int part() const { return lane_ % kGroup; }
  template <typename X>
  __device__ static X group_sum(X x) {
    for (int mask = kGroup / 2; mask > 0; mask /= 2) x = x + shuffle_of(x, mask);
    return x;
  }
  __device__ static T shuffle_of(T x, int mask) { return shuffle_xor(x, mask); }
  __device__ static Dual<T> shuffle_of(Dual<T> x, int mask) {
    return {shuffle_xor(x.v, mask), shuffle_xor(x.t, mask)};
  }
  // run(i, active) by a group for each i below count; a group that has nothing to do repeats the last,
  // inactive.
  template <typename Run>
  __device__ void by_group(int count, const Run& run) const {
#pragma unroll 1
    for (int first = warp_ * kGroups; first < count; first += warps_ * kGroups) {
      const int own = first + lane_ / kGroup;
      run(own < count ? own : count - 1, own < count);
    }
  }
  // A lane's share of `count` numbers: from, ..., to - 1.
  struct Share {
    int from, to;
  };
  __device__ Share share_of(int count) const {
    const int each = (count + kGroup - 1) / kGroup, from = part() * each;
    if (count % kGroup == 0) return {from, from + each};
    return {from, from + each < count ? from + each : count};
  }
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

  // ---- norms ----

  // Of each of so many rows: x lies in `normed`, and is normed in place; use(row, f, output).
  template <typename Use>
  __device__ void norm_rows(int rows, Matrix norm, N* normed_rows, N* deviations, const Use& use) const {
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
  // The gradient of a norm's inputs from that of its outputs: use(row, f, gradient).
  template <typename Use>
  __device__ void norm_rows_backward(int rows,
                                     Matrix norm,
                                     const N* grads,
                                     const N* normed_rows,
                                     const N* deviations,
                                     const Use& use) const {
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
  __device__ void add_norm_gradients(Matrix norm, int rows, const N* grad, const N* normed) const {
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
  // Both norms of a block, backwards: grad (k, d) to `to`, and what of it goes into the branch before,
  // dropped, to sum_.
  __device__ void norm_backward(
      int layer, Matrix norm, int site, const N* grad, const N* normed, const N* deviation, N* to) const {
    const int k = rows_of(layer);
    add_norm_gradients(norm, k, grad, normed);
    norm_rows_backward(k, norm, grad, normed, deviation, [&](int r, int f, N g) {
      to[r * stride() + f] = g;
      sum_[r * stride() + f] = dropped(site, mask_rows(layer), r, f, g);
    });
    block_barrier();
  }

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

  // ---- forward ----

  __device__ void forward() {
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

  __device__ void block_forward(int layer) const {
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
        k, b.value, d(), d(),
        [&](int r, int i) { return saved.mixed + (r * heads() + head_of(i)) * stride(); },
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

  // The weights of a block's attention before and after dropout, and the sums of the latter.
  __device__ void attend(int layer) const {
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

  // ---- the loss against all items ----

  // grad_ = the gradient of the mean of logsumexp(h E^T) - h x towards the outputs h.
  __device__ void compare_with_items() {
    const N* const outputs = outputs_of(layers() - 1);
    const T share = T(1) / static_cast<T>(p_.batch * asked_);
    const int n = static_cast<int>(p_.num_items);
#pragma unroll 1
    for (int r = 0; r < asked_; r += kRowsAtOnce) score_items(r, outputs);
    block_barrier();
#pragma unroll 1
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
#pragma unroll 1
    for (int r = 0; r < asked_; r += kRowsAtOnce) average_items(r);
    block_barrier();
    grid(asked_, by_width_, [&](int r, int f) {
      const N mean = grad_[r * stride() + f] * inverse(mass_of(r));
      grad_[r * stride() + f] = (mean - input(at_[r] + 1, f)) * share;
    });
    if (!kTangents && warp_ == 0) {
#pragma unroll 1
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
#pragma unroll 1
    for (int item = thread_; item < n; item += kItems * threads_) {
      N sums[kItems][kRowsAtOnce]{};
      int at[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) at[i] = item + i * threads_ < n ? item + i * threads_ : item;
#pragma unroll 8
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
#pragma unroll 1
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
#pragma unroll 1
    for (int layer = layers() - 1; layer >= 0; --layer) {
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

  // grad_ (k, d) is of the block's outputs; grad_hidden_ (rows, d) is added to.
  __device__ void block_backward(int layer) const {
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

  // From grad_context_ to grad_mixed_ and grad_total_.
  __device__ void values_backward(int layer, const BlockParameters& b) const {
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

  // From grad_mixed_ and grad_total_ to grad_scores_.
  __device__ void scores_backward(int layer) const {
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

  // What the block's attention adds to the gradient of its inputs, as keys and as values.
  __device__ void inputs_backward(int layer) const {
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

  // From grad_query_, with what goes past the attention, to the gradient of the block's inputs.
  __device__ void queries_backward(int layer, const BlockParameters& b) const {
    const int k = rows_of(layer);
    const Saved saved = this->saved(layer);
    grid(d(), by_width_, [&](int i, int j) {
      T sum = sums_[b.query.at + i * d() + j];
#pragma unroll 1
      for (int r = 0; r < k; ++r) {
        sum =
            add_gradient(grad_query_[r * stride() + i], saved.inputs[position(layer, r) * stride() + j], sum);
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

  static constexpr int kMostWarps = 16;
  static constexpr int kRowsAtOnce = 2;  // that are compared with items as these are read

  const EncoderProblem& p_;
  int inner_, heads_, layers_, length_, asked_, any_width_, first_parameter_, size_;
  int thread_ = 0, threads_ = 0, lane_ = 0, warp_ = 0, warps_ = 0;
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
