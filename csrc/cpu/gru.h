// A gated recurrent layer without biases on groups of sequences; built once per instruction set.
//
// Sequences are lanes, as in encoder.h: a product with a weight is one scalar times a vector, and gates are
// elementwise.
#pragma once

#include <cstdint>

namespace td3_fast::cpu {

struct GruSizes {
  int64_t length;  // of the input sequences
  int64_t inputs, states;
};

// Tensors of one call; the *_tangent ones are the direction of a derivative, null for zero.
template <typename T>
struct GruCall {
  GruSizes sizes;
  const T *input_weight, *state_weight;  // (3 states, inputs), (3 states, states): reset, update, new
  const T *input_weight_tangent, *state_weight_tangent;  // neither or both
  const T *inputs, *inputs_tangent;                      // (batch, length, inputs)
  const int64_t* lengths;                                // (batch,), at most `length`
  const int64_t* order;                                  // (batch,), the sequences, the longest first
  const T* grad_states;                                  // (batch, length, states)
  T* states;       // (batch, length, states), of dual numbers the tangent; zero beyond a sequence's length
  T* grad_inputs;  // (batch, length, inputs), likewise; null where not asked for
};

// Passes over sequences order[first], ..., order[first + count - 1], of no more than there are lanes.
template <typename T>
struct Gru {
  int64_t lanes;

  // Bytes of scratch of one pass.
  int64_t (*scratch_size)(const GruSizes& sizes, bool tangents);

  void (*forward)(const GruCall<T>& call, int64_t first, int64_t count, void* scratch);
  // The gradients of the weights, those of inputs before those of states, are added to `sums`.
  void (*backward)(const GruCall<T>& call, int64_t first, int64_t count, void* scratch, T* sums);
  // On dual numbers: the derivative of (states, grad_weights, grad_inputs) in the given direction.
  void (*double_backward)(const GruCall<T>& call, int64_t first, int64_t count, void* scratch, T* sums);
};

// The layer of the instruction set that tile.h has chosen.
template <typename T>
const Gru<T>& gru();

}  // namespace td3_fast::cpu
