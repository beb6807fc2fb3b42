// Additive attention of a few queries to the states of a sequence, on groups of sequences; built once per
// instruction set.
//
// Sequences are lanes, as in encoder.h.
#pragma once

#include <cstdint>

namespace td3_fast::cpu {

struct AttentionSizes {
  int64_t length;   // of the sequences of states
  int64_t width;    // of states and queries, h
  int64_t queries;  // of each sequence, k
};

// Tensors of one call; the *_tangent ones are the direction of a derivative, null for zero.
template <typename T>
struct AttentionCall {
  AttentionSizes sizes;
  const T *query, *query_tangent;            // (batch, k, h)
  const T *states, *states_tangent;          // (batch, length, h)
  const T *key_weight, *key_weight_tangent;  // (h, h); of the tangents of both weights neither or both
  const T *energy, *energy_tangent;          // (h,)
  const int64_t* lengths;                    // (batch, k), states that a query sees, at most `length`
  const int64_t* longest;                    // (batch,), the largest of them
  const int64_t* order;                      // (batch,), the sequences, the longest first
  const T* grad_local;                       // (batch, k, h)
  T* local;                                  // (batch, k, h), of dual numbers the tangent
  T *grad_query, *grad_states;               // likewise, like `query` and `states`
};

// Passes over sequences order[first], ..., order[first + count - 1], of no more than there are lanes.
template <typename T>
struct AdditiveAttention {
  int64_t lanes;

  // Bytes of scratch of one pass.
  int64_t (*scratch_size)(const AttentionSizes& sizes, bool tangents);

  void (*forward)(const AttentionCall<T>& call, int64_t first, int64_t count, void* scratch);
  // The gradients of key_weight and energy, one after the other, are added to `sums`.
  void (*backward)(const AttentionCall<T>& call, int64_t first, int64_t count, void* scratch, T* sums);
  // On dual numbers: the derivative of (local, grad_query, grad_states, sums) in the given direction.
  void (*double_backward)(const AttentionCall<T>& call, int64_t first, int64_t count, void* scratch, T* sums);
};

// That of the instruction set that tile.h has chosen.
template <typename T>
const AdditiveAttention<T>& additive_attention();

}  // namespace td3_fast::cpu
