// Registers the operators on the CPU; apart from them, since PyTorch's header for it takes longer to compile.

#include "registration.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace td3_fast::cpu {

TORCH_LIBRARY_IMPL(td3_fast, CPU, m) {
  m.impl("soft_embedding_forward", soft_embedding_forward);
  m.impl("soft_embedding_backward", soft_embedding_backward);
  m.impl("soft_embedding_double_backward", soft_embedding_double_backward);
  m.impl("item_logsumexp_forward", item_logsumexp_forward);
  m.impl("item_logsumexp_backward", item_logsumexp_backward);
  m.impl("item_logsumexp_double_backward", item_logsumexp_double_backward);
  m.impl("transformer_encoder_forward", transformer_encoder_forward);
  m.impl("transformer_encoder_backward", transformer_encoder_backward);
  m.impl("transformer_encoder_double_backward", transformer_encoder_double_backward);
  m.impl("encode_histories", encode_histories);
  m.impl("additive_attention_forward", additive_attention_forward);
  m.impl("additive_attention_backward", additive_attention_backward);
  m.impl("additive_attention_double_backward", additive_attention_double_backward);
  m.impl("gru_forward", gru_forward);
  m.impl("gru_backward", gru_backward);
  m.impl("gru_double_backward", gru_double_backward);
  m.impl("inner_gradient", inner_gradient);
  m.impl("inner_gradient_tangent", inner_gradient_tangent);
  m.impl("inner_steps_", inner_steps_);
  m.impl("kept_inner_steps", kept_inner_steps);
  m.impl("pull_back_inner_steps_", pull_back_inner_steps_);
  m.impl("adam_step_", adam_step_);
  m.impl("adam_adjoint_", adam_adjoint_);
  m.impl("random_words", random_words);
  m.impl("random_words_of_sites", random_words_of_sites);
  m.impl("sum_rows_by_id", sum_rows_by_id);
  m.impl("next_item_gradient", next_item_gradient);
  m.impl("item_probabilities", item_probabilities);
  m.impl("mix_items", mix_items);
  m.impl("mix_items_transposed", mix_items_transposed);
  m.impl("weigh_products", weigh_products);
  m.impl("target_rank", target_rank);
  m.impl("candidate_rank", candidate_rank);
}

// What these return has no history: a derivative of it raises instead of being zero.
TORCH_LIBRARY_IMPL(td3_fast, Autograd, m) {
  m.impl("encode_histories", torch::autograd::autogradNotImplementedFallback());
  m.impl("additive_attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("additive_attention_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("additive_attention_double_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gru_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gru_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gru_double_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("inner_gradient", torch::autograd::autogradNotImplementedFallback());
  m.impl("inner_gradient_tangent", torch::autograd::autogradNotImplementedFallback());
  m.impl("inner_steps_", torch::autograd::autogradNotImplementedFallback());
  m.impl("kept_inner_steps", torch::autograd::autogradNotImplementedFallback());
  m.impl("pull_back_inner_steps_", torch::autograd::autogradNotImplementedFallback());
  m.impl("adam_step_", torch::autograd::autogradNotImplementedFallback());
  m.impl("adam_adjoint_", torch::autograd::autogradNotImplementedFallback());
  m.impl("next_item_gradient", torch::autograd::autogradNotImplementedFallback());
  m.impl("item_probabilities", torch::autograd::autogradNotImplementedFallback());
  m.impl("mix_items", torch::autograd::autogradNotImplementedFallback());
  m.impl("mix_items_transposed", torch::autograd::autogradNotImplementedFallback());
  m.impl("weigh_products", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace td3_fast::cpu
