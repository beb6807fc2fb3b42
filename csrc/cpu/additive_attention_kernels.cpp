// Passes of additive attention for one instruction set; see additive_attention.h, and vectors.h for what may
// be used here.
//
// A pass is written once, for numbers N that are vectors of lanes or dual numbers of them (value and
// tangent). Of dual numbers' gradients only the tangents are summed and stored. Nothing is kept of a state
// from one half to the other: its key and its weights are made again.

#include "additive_attention.h"
#include "products.h"

namespace td3_fast::cpu {
namespace {

template <typename T, bool kTangents>
class AttentionPass {
  using P = Products<T, kTangents>;
  using V = Vector<T>;
  using W = typename P::W;
  using N = typename P::N;

 public:
  AttentionPass(const AttentionCall<T>& call, int64_t first, int64_t count, void* scratch)
      : call_(call),
        count_(count),
        h_(call.sizes.width),
        k_(call.sizes.queries),
        order_(call.order + first),
        next_(static_cast<N*>(scratch)) {
    if constexpr (kTangents) {
      key_weight_ = {call.key_weight, call.key_weight_tangent};
      energy_ = {call.energy, call.energy_tangent};
    } else {
      key_weight_ = {call.key_weight};
      energy_ = {call.energy};
    }
    query_ = take(k_ * h_);
    local_ = take(k_ * h_);
    state_ = take(h_);
    key_ = take(h_);
    open_ = take(h_);
    load(call.query, call.query_tangent, k_ * h_, count_, of_sequence(k_ * h_), query_);
    for (int64_t i = 0; i < k_ * h_; ++i) local_[i] = N{};
    lengths_ = reinterpret_cast<V*>(take(k_));
    for (int64_t i = 0; i < k_; ++i) {
      lengths_[i] = V{};
      for (int lane = 0; lane < count_; ++lane)
        lengths_[i][lane] = static_cast<T>(call.lengths[order_[lane] * k_ + i]);
    }
  }

  static int64_t scratch_size(const AttentionSizes& s) {
    // of queries, outputs and the gradients of both; of a state; of the way back
    const int64_t numbers = (4 * s.width + 1) * s.queries + 3 * s.width + 5 * s.width;
    return numbers * static_cast<int64_t>(sizeof(N));
  }

  void forward() {
    for (int64_t j = 0; j < length_of(0); ++j) {
      load_state(j);
      for (int64_t i = 0; i < k_; ++i) add_to_local(i, weight_of(i, j));
    }
    write_local();
  }

  void backward(T* sums) {
    N *grad_local = take(k_ * h_), *grad_query = take(k_ * h_);
    N *grad_state = take(h_), *grad_key = take(h_);
    V* const grad_energy = reinterpret_cast<V*>(take(h_));
    T *const rows_of_grad = reinterpret_cast<T*>(take(h_)), *const rows_of_input =
                                                                reinterpret_cast<T*>(take(h_));
    load(call_.grad_local, static_cast<const T*>(nullptr), k_ * h_, count_, of_sequence(k_ * h_), grad_local);
    for (int64_t i = 0; i < k_ * h_; ++i) grad_query[i] = N{};
    for (int64_t f = 0; f < h_; ++f) grad_energy[f] = V{};
    for (int64_t j = 0; j < length_of(0); ++j) {
      load_state(j);
      for (int64_t f = 0; f < h_; ++f) grad_state[f] = grad_key[f] = N{};
      for (int64_t i = 0; i < k_; ++i) {
        const N weight = weight_of(i, j);
        if (call_.local != nullptr) add_to_local(i, weight);
        N grad_weight{};
        for (int64_t f = 0; f < h_; ++f) {
          grad_weight = grad_weight + grad_local[i * h_ + f] * state_[f];
          grad_state[f] = grad_state[f] + weight * grad_local[i * h_ + f];
        }
        grad_weight = where(seen(i, j), grad_weight);
        for (int64_t f = 0; f < h_; ++f) {
          add_gradient(grad_energy + f, grad_weight, open_[f]);
          const N to_sum = grad_weight * energy_[f] * open_[f] * one_minus(open_[f]);
          grad_query[i * h_ + f] = grad_query[i * h_ + f] + to_sum;
          grad_key[f] = grad_key[f] + to_sum;
        }
      }
      P::linear_transposed(key_weight_, h_, h_, 1, typename P::Rows{grad_key, h_}, {grad_state, h_},
                           typename P::Itself{});
      store(grad_state, h_, active(j), call_.grad_states, state_rows(j));
      P::weight_gradients(h_, h_, 1, {grad_key, h_}, {state_, h_}, rows_of_grad, rows_of_input, sums);
    }
    add_lanes<T>(h_, [&](int64_t f) { return grad_energy[f]; }, sums + h_ * h_);
    store(grad_query, k_ * h_, count_, call_.grad_query, of_sequence(k_ * h_));
    for (int lane = 0; lane < count_; ++lane) {
      T* beyond = call_.grad_states + (order_[lane] * call_.sizes.length + length_of(lane)) * h_;
      for (int64_t i = 0; i < (call_.sizes.length - length_of(lane)) * h_; ++i) beyond[i] = 0;
    }
    write_local();
  }

 private:
  N* take(int64_t count) {
    N* taken = next_;
    next_ += count;
    return taken;
  }
  int64_t length_of(int64_t lane) const { return call_.longest[order_[lane]]; }
  // Lanes that have a state j: the first ones, since the longest sequences come first.
  int active(int64_t j) const {
    int64_t lanes = count_;
    while (lanes > 0 && length_of(lanes - 1) <= j) --lanes;
    return static_cast<int>(lanes);
  }
  // Where a lane's part of a tensor lies: its row of a (batch, stride) one, and state j.
  auto of_sequence(int64_t stride) const {
    return [this, stride](int lane) { return order_[lane] * stride; };
  }
  auto state_rows(int64_t j) const {
    return [this, j](int lane) { return (order_[lane] * call_.sizes.length + j) * h_; };
  }
  template <typename At>
  static void load(const T* values, const T* tangents, int64_t count, int lanes, const At& at, N* to) {
    const auto from = [&at](const T* tensor) {
      return [tensor, &at](int lane) { return tensor + at(lane); };
    };
    if constexpr (kTangents) {
      load_rows<T>(count, lanes, from(values), [&](int64_t i, V x) { to[i] = {x, V{}}; });
      if (tangents == nullptr) return;
      load_rows<T>(count, lanes, from(tangents), [&](int64_t i, V x) { to[i].t = x; });
    } else {
      load_rows<T>(count, lanes, from(values), [&](int64_t i, V x) { to[i] = x; });
    }
  }
  template <typename At>
  static void store(const N* x, int64_t count, int lanes, T* tensor, const At& at) {
    store_rows<T>(
        count, lanes, [x](int64_t i) { return P::stored(x[i]); },
        [&](int lane) { return tensor + at(lane); });
  }
  void write_local() const {
    if (call_.local != nullptr) store(local_, k_ * h_, count_, call_.local, of_sequence(k_ * h_));
  }

  void load_state(int64_t j) const {
    load(call_.states, call_.states_tangent, h_, active(j), state_rows(j), state_);
    P::linear(key_weight_, h_, h_, 1, typename P::Rows{state_, h_}, {key_, h_}, typename P::Nothing{});
  }
  // The lanes whose query i sees state j.
  TD3_FAST_INLINE auto seen(int64_t i, int64_t j) const { return static_cast<T>(j) < lengths_[i]; }
  // Of the state that is loaded; leaves sigmoid(query + key) behind.
  N weight_of(int64_t i, int64_t j) const {
    N weight{};
    for (int64_t f = 0; f < h_; ++f) {
      open_[f] = sigmoid_of(query_[i * h_ + f] + key_[f]);
      weight = weight + energy_[f] * open_[f];
    }
    return where(seen(i, j), weight);
  }
  void add_to_local(int64_t i, const N& weight) const {
    for (int64_t f = 0; f < h_; ++f) local_[i * h_ + f] = local_[i * h_ + f] + weight * state_[f];
  }

  const AttentionCall<T>& call_;
  int count_;
  int64_t h_, k_;
  const int64_t* order_;
  N* next_;
  W key_weight_, energy_;
  N *query_, *local_, *state_, *key_, *open_;
  V* lengths_;
};

template <typename T>
int64_t scratch_size(const AttentionSizes& sizes, bool tangents) {
  return tangents ? AttentionPass<T, true>::scratch_size(sizes)
                  : AttentionPass<T, false>::scratch_size(sizes);
}
template <typename T>
void forward(const AttentionCall<T>& call, int64_t first, int64_t count, void* scratch) {
  AttentionPass<T, false>(call, first, count, scratch).forward();
}
template <typename T, bool kTangents>
void backward(const AttentionCall<T>& call, int64_t first, int64_t count, void* scratch, T* sums) {
  AttentionPass<T, kTangents>(call, first, count, scratch).backward(sums);
}
template <typename T>
constexpr AdditiveAttention<T> kAttention = {kLanes<T>, scratch_size<T>, forward<T>, backward<T, false>,
                                             backward<T, true>};

}  // namespace

extern const AdditiveAttention<float> TD3_FAST_CONCAT(float_attention_, TD3_FAST_INSTRUCTION_SET);
extern const AdditiveAttention<double> TD3_FAST_CONCAT(double_attention_, TD3_FAST_INSTRUCTION_SET);
const AdditiveAttention<float> TD3_FAST_CONCAT(float_attention_,
                                               TD3_FAST_INSTRUCTION_SET) = kAttention<float>;
const AdditiveAttention<double> TD3_FAST_CONCAT(double_attention_,
                                                TD3_FAST_INSTRUCTION_SET) = kAttention<double>;

}  // namespace td3_fast::cpu
