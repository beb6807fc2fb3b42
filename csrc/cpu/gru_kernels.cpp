// The recurrent layer's passes for one instruction set; see gru.h, and vectors.h for what may be used here.
//
// A pass is written once, for numbers N that are vectors of lanes or dual numbers of them (value and
// tangent). Of dual numbers' gradients only the tangents are summed and stored.

#include "gru.h"
#include "products.h"

namespace td3_fast::cpu {
namespace {

template <typename T, bool kTangents>
class GruPass {
  using P = Products<T, kTangents>;
  using V = Vector<T>;
  using W = typename P::W;
  using N = typename P::N;
  using Rows = typename P::Rows;
  using Nothing = typename P::Nothing;
  using Itself = typename P::Itself;
  // Steps whose products with the inputs, which do not wait for one another, are made at once.
  static constexpr int64_t kTile = 4;

 public:
  // keeps: what the way back needs of every step.
  GruPass(const GruCall<T>& call, int64_t first, int64_t count, void* scratch, bool keeps)
      : call_(call),
        count_(count),
        inputs_(call.sizes.inputs),
        states_(call.sizes.states),
        order_(call.order + first),
        steps_(call.lengths[order_[0]]),
        keeps_(keeps),
        next_(static_cast<N*>(scratch)) {
    if constexpr (kTangents) {
      of_inputs_ = {call.input_weight, call.input_weight_tangent};
      of_states_ = {call.state_weight, call.state_weight_tangent};
    } else {
      of_inputs_ = {call.input_weight};
      of_states_ = {call.state_weight};
    }
    const int64_t steps = keeps ? steps_ : kTile;
    input_ = take(steps * inputs_);
    gates_ = take(steps * 4 * states_);
    state_ = take((steps + 1) * states_);
  }

  static int64_t scratch_size(const GruSizes& s) {
    const int64_t steps = s.length < kTile ? kTile : s.length,
                  widest = s.states > s.inputs ? s.states : s.inputs;
    const int64_t numbers = steps * (s.inputs + 5 * s.states) + s.states  // of the steps
                            + 2 * s.states + kTile * s.inputs             // of the way back
                            + kTile * (3 * s.states + widest);            // gradients and inputs as rows
    return numbers * static_cast<int64_t>(sizeof(N));
  }

  void forward() {
    for (int64_t f = 0; f < states_; ++f) state_[f] = N{};
    for (int64_t t = 0; t < steps_; ++t) {
      if (t % kTile == 0) meet_inputs(t);
      step(t);
      if (call_.states == nullptr) continue;
      const N* state = state_of(t + 1);
      store_rows<T>(
          states_, active(t), [&](int64_t f) { return P::stored(state[f]); }, rows(call_.states, states_, t));
    }
    zero_beyond(call_.states, states_);
  }

  void backward(T* sums) {
    N *carry = take(states_), *kept = take(states_), *grad_input = take(kTile * inputs_);
    T* const rows_of_grad = reinterpret_cast<T*>(take(kTile * 3 * states_));
    T* const rows_of_input = reinterpret_cast<T*>(take(kTile * (states_ > inputs_ ? states_ : inputs_)));
    const int64_t h = states_;
    for (int64_t f = 0; f < h; ++f) carry[f] = N{};
    for (int64_t t = steps_ - 1; t >= 0; --t) {
      load_rows<T>(h, active(t), rows(call_.grad_states, h, t),
                   [&](int64_t f, V x) { carry[f] = plus(carry[f], x); });
      gates_backward(t, carry, kept);
      for (int64_t f = 0; f < h; ++f) carry[f] = kept[f];
      N* const gate = gates_of(t);
      const Rows to{carry, h};
      P::linear_transposed(of_states_, 2 * h, h, 1, Rows{gate, 4 * h}, to, Itself{});
      P::linear_transposed(of_states_.at(2 * h * h), h, h, 1, Rows{gate + 3 * h, 4 * h}, to, Itself{});
      if (t % kTile != 0) continue;
      // Reset, update and new gate met the input; the last of them met the state before it was reset.
      const int64_t count = steps_ - t < kTile ? steps_ - t : kTile;
      const Rows gates{gate, 4 * h}, inputs{input_of(t), inputs_}, states{state_of(t), h};
      if (call_.grad_inputs != nullptr) {
        P::linear_transposed(of_inputs_, 3 * h, inputs_, count, gates, {grad_input, inputs_}, Nothing{});
        for (int64_t i = 0; i < count; ++i) {
          const N* own = grad_input + i * inputs_;
          store_rows<T>(
              inputs_, active(t + i), [&](int64_t f) { return P::stored(own[f]); },
              rows(call_.grad_inputs, inputs_, t + i));
        }
      }
      P::weight_gradients(3 * h, inputs_, count, gates, inputs, rows_of_grad, rows_of_input, sums);
      T* const of_states = sums + 3 * h * inputs_;
      P::weight_gradients(2 * h, h, count, gates, states, rows_of_grad, rows_of_input, of_states);
      P::weight_gradients(h, h, count, gates.from(0, 3 * h), states, rows_of_grad, rows_of_input,
                          of_states + 2 * h * h);
    }
    zero_beyond(call_.grad_inputs, inputs_);
  }

 private:
  N* take(int64_t count) {
    N* taken = next_;
    next_ += count;
    return taken;
  }
  N* input_of(int64_t t) const { return input_ + (keeps_ ? t : t % kTile) * inputs_; }
  // Reset, update, new, and the product of the new one with the state.
  N* gates_of(int64_t t) const { return gates_ + (keeps_ ? t : t % kTile) * 4 * states_; }
  // After t steps.
  N* state_of(int64_t t) const { return state_ + (keeps_ ? t : t % 2) * states_; }

  int64_t length_of(int64_t lane) const { return call_.lengths[order_[lane]]; }
  // Lanes that have an input at step t: the first ones, since the longest sequences come first.
  int active(int64_t t) const {
    int64_t lanes = count_;
    while (lanes > 0 && length_of(lanes - 1) <= t) --lanes;
    return static_cast<int>(lanes);
  }
  // Those of step t of a (batch, length, width) tensor.
  template <typename U>
  auto rows(U* tensor, int64_t width, int64_t t) const {
    return [this, tensor, width, t](int lane) {
      return tensor + (order_[lane] * call_.sizes.length + t) * width;
    };
  }
  void zero_beyond(T* tensor, int64_t width) const {
    if (tensor == nullptr) return;
    for (int lane = 0; lane < count_; ++lane) {
      T* row = rows(tensor, width, length_of(lane))(lane);
      for (int64_t i = 0; i < (call_.sizes.length - length_of(lane)) * width; ++i) row[i] = 0;
    }
  }
  static TD3_FAST_INLINE N plus(const N& x, V constant) { return minus(x, -constant); }

  void load_inputs(int64_t t) const {
    N* input = input_of(t);
    const auto values = rows(call_.inputs, inputs_, t);
    if constexpr (kTangents) {
      load_rows<T>(inputs_, active(t), values, [&](int64_t f, V x) { input[f] = {x, V{}}; });
      if (call_.inputs_tangent == nullptr) return;
      load_rows<T>(inputs_, active(t), rows(call_.inputs_tangent, inputs_, t),
                   [&](int64_t f, V x) { input[f].t = x; });
    } else {
      load_rows<T>(inputs_, active(t), values, [&](int64_t f, V x) { input[f] = x; });
    }
  }

  // Of step t and those of its tile that follow: the products of the gates with the inputs.
  void meet_inputs(int64_t t) const {
    const int64_t count = steps_ - t < kTile ? steps_ - t : kTile, h = states_;
    for (int64_t i = 0; i < count; ++i) load_inputs(t + i);
    P::linear(of_inputs_, 3 * h, inputs_, count, Rows{input_of(t), inputs_}, {gates_of(t), 4 * h}, Nothing{});
  }

  void step(int64_t t) const {
    const int64_t h = states_;
    N *reset = gates_of(t), *update = reset + h, *fresh = update + h, *product = fresh + h;
    N *before = state_of(t), *after = state_of(t + 1);
    const Rows state{before, h};
    P::linear(of_states_, 2 * h, h, 1, state, {reset, 4 * h}, Itself{});
    P::linear(of_states_.at(2 * h * h), h, h, 1, state, {product, 4 * h}, Nothing{});
    for (int64_t f = 0; f < h; ++f) {
      reset[f] = sigmoid_of(reset[f]);
      update[f] = sigmoid_of(update[f]);
      fresh[f] = tanh_of(fresh[f] + reset[f] * product[f]);
      after[f] = fresh[f] + update[f] * (before[f] - fresh[f]);
    }
  }

  // From the gradient of the state after step t to those of what went into its gates, in their place, and to
  // what of it reaches the state before without them.
  void gates_backward(int64_t t, const N* grad, N* kept) const {
    const int64_t h = states_;
    N *reset = gates_of(t), *update = reset + h, *fresh = update + h, *product = fresh + h;
    const N* before = state_of(t);
    for (int64_t f = 0; f < h; ++f) {
      kept[f] = grad[f] * update[f];
      const N to_update = grad[f] * (before[f] - fresh[f]) * update[f] * one_minus(update[f]);
      const N to_fresh = (grad[f] - kept[f]) * one_minus(fresh[f] * fresh[f]);
      const N to_reset = to_fresh * product[f] * reset[f] * one_minus(reset[f]);
      product[f] = to_fresh * reset[f];
      reset[f] = to_reset;
      update[f] = to_update;
      fresh[f] = to_fresh;
    }
  }

  const GruCall<T>& call_;
  int64_t count_, inputs_, states_;
  const int64_t* order_;
  int64_t steps_;
  bool keeps_;
  N* next_;
  W of_inputs_, of_states_;
  N *input_, *gates_, *state_;
};

template <typename T>
int64_t scratch_size(const GruSizes& sizes, bool tangents) {
  return tangents ? GruPass<T, true>::scratch_size(sizes) : GruPass<T, false>::scratch_size(sizes);
}
template <typename T>
void forward(const GruCall<T>& call, int64_t first, int64_t count, void* scratch) {
  GruPass<T, false>(call, first, count, scratch, false).forward();
}
template <typename T, bool kTangents>
void backward(const GruCall<T>& call, int64_t first, int64_t count, void* scratch, T* sums) {
  GruPass<T, kTangents> pass(call, first, count, scratch, true);
  pass.forward();
  pass.backward(sums);
}
template <typename T>
constexpr Gru<T> kGru = {kLanes<T>, scratch_size<T>, forward<T>, backward<T, false>, backward<T, true>};

}  // namespace

extern const Gru<float> TD3_FAST_CONCAT(float_gru_, TD3_FAST_INSTRUCTION_SET);
extern const Gru<double> TD3_FAST_CONCAT(double_gru_, TD3_FAST_INSTRUCTION_SET);
const Gru<float> TD3_FAST_CONCAT(float_gru_, TD3_FAST_INSTRUCTION_SET) = kGru<float>;
const Gru<double> TD3_FAST_CONCAT(double_gru_, TD3_FAST_INSTRUCTION_SET) = kGru<double>;

}  // namespace td3_fast::cpu
