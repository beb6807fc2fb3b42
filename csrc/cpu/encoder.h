// A causal self-attention encoder on groups of sequences; built once per instruction set.
//
// Sequences are lanes: every number of the pass is a vector with one lane per sequence, so that norms,
// softmax and attention are elementwise and a product with a weight is one scalar times a vector. Lengths and
// asked positions may differ between lanes.
#pragma once

#include <cstdint>

namespace td3_fast::cpu {

struct EncoderSizes {
  int64_t length;     // of the input sequences
  int64_t positions;  // rows of the position table
  int64_t width;      // d
  int64_t inner;      // of the feed-forward
  int64_t heads, layers;
  int64_t asked;  // outputs of each sequence, k
};

// One dropout site: an element survives, scaled, where its word is not below the threshold.
template <typename T>
struct EncoderDropout {
  const int16_t* words;  // null: nothing is dropped
  int16_t threshold;
  T scale;
};

// Tensors of one call; the *_tangent ones are the direction of a double backward, null for zero.
template <typename T>
struct EncoderCall {
  EncoderSizes sizes;
  T norm_eps;
  const T* parameters;  // in the order of the learner's vector: position table, norm, blocks
  const T* parameters_tangent;
  const T* inputs;  // (batch, length, d)
  const T* inputs_tangent;
  const int64_t* positions;          // (batch, k)
  const EncoderDropout<T>* dropout;  // the input's, then three a layer: attention, its output, feed-forward
  const T* grad_outputs;             // (batch, k, d)
  T* outputs;                        // (batch, k, d); of a double backward the tangent
  T* grad_inputs;                    // (batch, length, d), null where not asked for; likewise
};

template <typename T>
struct Encoder {
  int64_t lanes;

  // Bytes of scratch of one call on a group.
  int64_t (*scratch_size)(const EncoderSizes& sizes, bool tangents);

  // Sequences first, ..., first + count - 1 <= first + lanes - 1. The gradients of the parameters are added
  // to `sums`, a vector of lanes each. A double backward runs the forward and backward pass on dual numbers:
  // the derivative of (outputs, grad_parameters, grad_inputs) in the given direction.
  void (*forward)(const EncoderCall<T>& call, int64_t first, int64_t count, void* scratch);
  void (*backward)(const EncoderCall<T>& call, int64_t first, int64_t count, void* scratch, T* sums);
  void (*double_backward)(const EncoderCall<T>& call, int64_t first, int64_t count, void* scratch, T* sums);

  // out[i] += the sum of the lanes of sums[i].
  void (*add_lanes)(const T* sums, int64_t size, T* out);
};

// The encoder of the instruction set that tile.h has chosen.
template <typename T>
const Encoder<T>& encoder();

constexpr int64_t kMaxLayers = 8;

inline int64_t encoder_parameters(const EncoderSizes& s) {
  const int64_t block =
      4 * (s.width + 1) * s.width + 4 * s.width + (s.width + 1) * s.inner + (s.inner + 1) * s.width;
  return (s.positions + 2) * s.width + s.layers * block;
}

}  // namespace td3_fast::cpu
