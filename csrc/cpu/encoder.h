// A self-attention encoder on groups of sequences; built once per instruction set.
//
// Sequences are lanes: every number of the pass is a vector with one lane per sequence, so that norms,
// softmax and attention are elementwise and a product with a weight is one scalar times a vector. Lengths and
// asked positions may differ between lanes.
#pragma once

#include <cstdint>

#include "../encoder_sizes.h"

namespace td3_fast::cpu {

// One dropout site: an element survives, scaled, where its word is not below the threshold.
template <typename T>
struct EncoderDropout {
  const int16_t* words;  // null: nothing is dropped
  int16_t threshold;
  T scale;
};

// Tensors of one call; the *_tangent ones are the direction of a derivative, null for zero but of parameters.
template <typename T>
struct EncoderCall {
  EncoderSizes sizes;
  T norm_eps;
  const T* parameters;  // in the order of the learner's vector: position table, norm, blocks
  const T* parameters_tangent;
  const T* inputs;  // (batch, length, d)
  const T* inputs_tangent;
  int64_t input_stride, input_tangent_stride, grad_input_stride;  // elements from one sequence to the next
  const int64_t* positions;                                       // (batch, k), or one more both ways
  const int64_t* order;              // (batch,), the sequences as they are dealt out to lanes
  const EncoderDropout<T>* dropout;  // the input's, then three a layer: attention, its output, feed-forward
  const T* grad_outputs;             // (batch, k, d)
  const T* grad_outputs_tangent;
  T* outputs;      // (batch, k, d), of dual numbers the tangent; null where not asked for
  T* grad_inputs;  // (batch, length, d); likewise
};

// The two halves of a pass over sequences first, ..., first + count - 1 <= first + lanes - 1 of the order.
template <typename T>
struct EncoderPass {
  // Leaves in `scratch` what the other half needs.
  void (*forward)(const EncoderCall<T>& call, int64_t first, int64_t count, void* scratch);
  // By the same call, of which the upstream gradients are read only now. The gradients of the parameters are
  // added to `sums`.
  void (*backward)(void* scratch, T* sums);
};

template <typename T>
struct Encoder {
  int64_t lanes;

  // Bytes of scratch of one call on a group.
  int64_t (*scratch_size)(const EncoderSizes& sizes, bool tangents);

  // The outputs alone: the first half of a pass that has no other.
  void (*outputs)(const EncoderCall<T>& call, int64_t first, int64_t count, void* scratch);

  EncoderPass<T> values;
  // The same on dual numbers: the derivative of (outputs, grad_parameters, grad_inputs) in the given
  // direction.
  EncoderPass<T> duals;
};

// The encoder of the instruction set that tile.h has chosen.
template <typename T>
const Encoder<T>& encoder();

}  // namespace td3_fast::cpu
