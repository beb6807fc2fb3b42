// The operators on CUDA, declared like those on the CPU, and what joins them to a device: tests run them on
// another one (tests/simt).
#pragma once

#include "../cpu/registration.h"

namespace td3_fast::cuda {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The native handle of the stream that work on the device of `tensor` goes to.
void* current_stream(const Tensor& tensor);

// Raises what CUDA said of a launch, unless it is null.
void check_launch(const char* error);

decltype(cpu::soft_embedding_forward) soft_embedding_forward;
decltype(cpu::soft_embedding_backward) soft_embedding_backward;
decltype(cpu::soft_embedding_double_backward) soft_embedding_double_backward;
decltype(cpu::item_logsumexp_forward) item_logsumexp_forward;
decltype(cpu::item_logsumexp_backward) item_logsumexp_backward;
decltype(cpu::item_logsumexp_double_backward) item_logsumexp_double_backward;
decltype(cpu::target_rank) target_rank;
decltype(cpu::candidate_rank) candidate_rank;
decltype(cpu::random_words) random_words;
decltype(cpu::random_words_of_sites) random_words_of_sites;
decltype(cpu::adam_step_) adam_step_;
decltype(cpu::adam_adjoint_) adam_adjoint_;
decltype(cpu::transformer_encoder_forward) transformer_encoder_forward;
decltype(cpu::transformer_encoder_backward) transformer_encoder_backward;
decltype(cpu::transformer_encoder_double_backward) transformer_encoder_double_backward;
decltype(cpu::encode_histories) encode_histories;
decltype(cpu::inner_gradient) inner_gradient;
decltype(cpu::inner_gradient_tangent) inner_gradient_tangent;
decltype(cpu::next_item_gradient) next_item_gradient;

}  // namespace td3_fast::cuda
