// Registers the CUDA operators; apart from them, since PyTorch's header for it takes long to compile.
#pragma once

#include <torch/library.h>

#include "operators.h"

namespace td3_fast::cuda {

// Gives `m` the implementation of every operator of td3_fast.
inline void register_operators(torch::Library& m) {
  m.impl("soft_embedding_forward", soft_embedding_forward);
  m.impl("soft_embedding_backward", soft_embedding_backward);
  m.impl("soft_embedding_double_backward", soft_embedding_double_backward);
  m.impl("item_logsumexp_forward", item_logsumexp_forward);
  m.impl("item_logsumexp_backward", item_logsumexp_backward);
  m.impl("item_logsumexp_double_backward", item_logsumexp_double_backward);
  m.impl("target_rank", target_rank);
  m.impl("candidate_rank", candidate_rank);
  m.impl("random_words", random_words);
  m.impl("random_words_of_sites", random_words_of_sites);
  m.impl("adam_step_", adam_step_);
  m.impl("adam_adjoint_", adam_adjoint_);
  m.impl("transformer_encoder_forward", transformer_encoder_forward);
  m.impl("transformer_encoder_backward", transformer_encoder_backward);
  m.impl("transformer_encoder_double_backward", transformer_encoder_double_backward);
  m.impl("encode_histories", encode_histories);
  m.impl("inner_gradient", inner_gradient);
  m.impl("inner_gradient_tangent", inner_gradient_tangent);
  m.impl("next_item_gradient", next_item_gradient);
}

}  // namespace td3_fast::cuda
