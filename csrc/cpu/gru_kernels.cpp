// The recurrent layer's passes for one instruction set; see gru.h, and vectors.h for what may be used here.
//
// A pass is written once, for numbers N that are vectors of lanes or dual numbers of them (value and
// tangent). Of dual numbers' gradients only the tangents are summed and stored.

#include "gru.h"
#include "linear.h"

namespace td3_fast::cpu {
namespace {

template <typename T, bool kTangents>
class GruPass {
  using V = Vector<T>;
  using W = Weights<T, kTangents>;
  using N = typename W::N;
  static constexpr int L = kLanes<T>;

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
    const int64_t steps = keeps ? steps_ : 1;
    input_ = take(steps * inputs_);
    gates_ = take(steps * 4 * states_);
    state_ = take((steps + 1) * states_);
  }

  static int64_t scratch_size(const GruSizes& s) {
    const int64_t widest = s.states > s.inputs ? s.states : s.inputs;
    const int64_t numbers = s.length * (s.inputs + 5 * s.states) + s.states  // of the steps
                            + 2 * s.states + s.inputs                        // of the way back
                            + 3 * s.states + widest;                         // gradients and inputs as rows
    return numbers * static_cast<int64_t>(sizeof(N));
  }

  void forward() {
    for (int64_t f = 0; f < states_; ++f) state_[f] = N{};
    for (int64_t t = 0; t < steps_; ++t) {
      step(t);
      if (call_.states == nullptr) continue;
      const N* state = state_of(t + 1);
      store_rows<T>(
          states_, active(t), [&](int64_t f) { return stored(state[f]); }, rows(call_.states, states_, t));
    }
    zero_beyond(call_.states, states_);
  }

  void backward(T* sums) {
    N *carry = take(states_), *kept = take(states_), *grad_input = take(inputs_);
    T* const rows_of_grad = reinterpret_cast<T*>(take(3 * states_));
    T* const rows_of_input = reinterpret_cast<T*>(take(states_ > inputs_ ? states_ : inputs_));
    for (int64_t f = 0; f < states_; ++f) carry[f] = N{};
    const auto carried = [&](int64_t f) { return carry[f]; };
    for (int64_t t = steps_ - 1; t >= 0; --t) {
      load_rows<T>(states_, active(t), rows(call_.grad_states, states_, t),
                   [&](int64_t f, V x) { carry[f] = plus(carry[f], x); });
      gates_backward(t, carry, kept);
      N* const gate = gates_of(t);
      for (int64_t f = 0; f < states_; ++f) carry[f] = kept[f];
      linear_transposed<T, kTangents>(of_states_, 2 * states_, states_, gate, carry, carried);
      linear_transposed<T, kTangents>(of_states_.at(2 * states_ * states_), states_, states_,
                                      gate + 3 * states_, carry, carried);
      if (call_.grad_inputs != nullptr) {
        linear_transposed<T, kTangents>(of_inputs_, 3 * states_, inputs_, gate, grad_input,
                                        [](int64_t) { return N{}; });
        store_rows<T>(
            inputs_, active(t), [&](int64_t f) { return stored(grad_input[f]); },
            rows(call_.grad_inputs, inputs_, t));
      }
      // Reset, update and new gate met the input; the last of them met the state before it was reset.
      grads_as_rows(gate, 0, 3 * states_, rows_of_grad);
      inputs_as_rows(input_of(t), inputs_, rows_of_input);
      add_gradients(inputs_, rows_of_grad, rows_of_input, sums);
      grads_as_rows(gate + 3 * states_, 2 * states_, states_, rows_of_grad);
      inputs_as_rows(state_of(t), states_, rows_of_input);
      add_gradients(states_, rows_of_grad, rows_of_input, sums + 3 * states_ * inputs_);
    }
    zero_beyond(call_.grad_inputs, inputs_);
  }

 private:
  N* take(int64_t count) {
    N* taken = next_;
    next_ += count;
    return taken;
  }
  N* input_of(int64_t t) const { return input_ + (keeps_ ? t * inputs_ : 0); }
  // Reset, update, new, and the product of the new one with the state.
  N* gates_of(int64_t t) const { return gates_ + (keeps_ ? t * 4 * states_ : 0); }
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
  static TD3_FAST_INLINE V stored(const N& x) {
    if constexpr (kTangents) {
      return x.t;
    } else {
      return x;
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

  void step(int64_t t) const {
    const int64_t h = states_;
    load_inputs(t);
    N *reset = gates_of(t), *update = reset + h, *fresh = update + h, *product = fresh + h;
    const N* before = state_of(t);
    N* after = state_of(t + 1);
    const auto zero = [](int64_t) { return N{}; };
    linear<T, kTangents>(of_inputs_, 3 * h, inputs_, input_of(t), reset, zero);
    linear<T, kTangents>(of_states_, 2 * h, h, before, reset, [&](int64_t f) { return reset[f]; });
    linear<T, kTangents>(of_states_.at(2 * h * h), h, h, before, product, zero);
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

  // The two sides of a weight's gradient, whose depth is the lanes; of dual numbers value times tangent and
  // tangent times value.
  static constexpr int64_t kDepth = kTangents ? 2 * L : L;
  // Into columns at, ..., at + count - 1 of rows of 3 states.
  void grads_as_rows(const N* grad, int64_t at, int64_t count, T* to) const {
    const int64_t width = 3 * states_;
    const auto row = [to, at, width](int lane) { return to + lane * width + at; };
    if constexpr (kTangents) {
      store_rows<T>(count, L, [&](int64_t i) { return grad[i].v; }, row);
      store_rows<T>(count, L, [&](int64_t i) { return grad[i].t; }, [&](int lane) { return row(L + lane); });
    } else {
      store_rows<T>(count, L, [&](int64_t i) { return grad[i]; }, row);
    }
  }
  void inputs_as_rows(const N* input, int64_t width, T* to) const {
    const auto row = [to, width](int lane) { return to + lane * width; };
    if constexpr (kTangents) {
      store_rows<T>(width, L, [&](int64_t i) { return input[i].t; }, row);
      store_rows<T>(width, L, [&](int64_t i) { return input[i].v; }, [&](int lane) { return row(L + lane); });
    } else {
      store_rows<T>(width, L, [&](int64_t i) { return input[i]; }, row);
    }
  }
  void add_gradients(int64_t width, const T* grads, const T* inputs, T* sums) const {
    add_products<T>(kDepth, 3 * states_, width, grads, inputs, sums);
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
