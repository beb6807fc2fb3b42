// The operators on the CPU; library.cpp says what they return, and their sources how.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace td3_fast::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> soft_embedding_forward(const Tensor& queries,
                                                          const Tensor& keys,
                                                          const Tensor& values);
std::tuple<Tensor, Tensor, Tensor> soft_embedding_backward(const OptionalTensor& grad_embedding,
                                                           const OptionalTensor& grad_logsumexp,
                                                           const Tensor& queries,
                                                           const Tensor& keys,
                                                           const Tensor& values,
                                                           const Tensor& embedding,
                                                           const Tensor& logsumexp,
                                                           const Tensor& remainder,
                                                           std::array<bool, 3> needed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_embedding_double_backward(
    const OptionalTensor& grad_grad_queries,
    const OptionalTensor& grad_grad_keys,
    const OptionalTensor& grad_grad_values,
    const OptionalTensor& grad_embedding,
    const OptionalTensor& grad_logsumexp,
    const Tensor& queries,
    const Tensor& keys,
    const Tensor& values,
    const Tensor& embedding,
    const Tensor& logsumexp,
    const Tensor& remainder,
    std::array<bool, 5> needed);

std::tuple<Tensor, Tensor, Tensor, Tensor> item_logsumexp_forward(const Tensor& hidden,
                                                                  const Tensor& items,
                                                                  bool save,
                                                                  bool keep);
std::tuple<Tensor, Tensor> item_logsumexp_backward(const Tensor& grad_logsumexp,
                                                   const Tensor& hidden,
                                                   const Tensor& items,
                                                   const Tensor& logsumexp,
                                                   const Tensor& remainder,
                                                   const Tensor& mean,
                                                   const Tensor& probabilities,
                                                   std::array<bool, 2> needed);
std::tuple<Tensor, Tensor, Tensor> item_logsumexp_double_backward(const OptionalTensor& grad_grad_hidden,
                                                                  const OptionalTensor& grad_grad_items,
                                                                  const Tensor& grad_logsumexp,
                                                                  const Tensor& hidden,
                                                                  const Tensor& items,
                                                                  const Tensor& logsumexp,
                                                                  const Tensor& remainder,
                                                                  const Tensor& mean,
                                                                  const Tensor& probabilities,
                                                                  std::array<bool, 3> needed);

Tensor transformer_encoder_forward(const Tensor& parameters,
                                   const Tensor& inputs,
                                   const Tensor& positions,
                                   at::TensorList words,
                                   at::IntArrayRef sizes);
std::tuple<Tensor, Tensor> transformer_encoder_backward(const Tensor& grad_outputs,
                                                        const Tensor& parameters,
                                                        const Tensor& inputs,
                                                        const Tensor& positions,
                                                        at::TensorList words,
                                                        at::IntArrayRef sizes,
                                                        bool needs_inputs);
std::tuple<Tensor, Tensor, Tensor> transformer_encoder_double_backward(
    const OptionalTensor& grad_grad_parameters,
    const OptionalTensor& grad_grad_inputs,
    const Tensor& grad_outputs,
    const Tensor& parameters,
    const Tensor& inputs,
    const Tensor& positions,
    at::TensorList words,
    at::IntArrayRef sizes,
    bool needs_inputs);

Tensor gru_forward(const Tensor& inputs,
                   const Tensor& input_weight,
                   const Tensor& state_weight,
                   const Tensor& lengths);
std::tuple<Tensor, Tensor, Tensor> gru_backward(const Tensor& grad_states,
                                                const Tensor& inputs,
                                                const Tensor& input_weight,
                                                const Tensor& state_weight,
                                                const Tensor& lengths,
                                                bool needs_inputs);
std::tuple<Tensor, Tensor, Tensor, Tensor> gru_double_backward(const OptionalTensor& grad_grad_inputs,
                                                               const OptionalTensor& grad_grad_input_weight,
                                                               const OptionalTensor& grad_grad_state_weight,
                                                               const Tensor& grad_states,
                                                               const Tensor& inputs,
                                                               const Tensor& input_weight,
                                                               const Tensor& state_weight,
                                                               const Tensor& lengths,
                                                               bool needs_inputs);

Tensor additive_attention_forward(const Tensor& query,
                                  const Tensor& states,
                                  const Tensor& key_weight,
                                  const Tensor& energy,
                                  const Tensor& lengths);
std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(const Tensor& grad_local,
                                                                       const Tensor& query,
                                                                       const Tensor& states,
                                                                       const Tensor& key_weight,
                                                                       const Tensor& energy,
                                                                       const Tensor& lengths);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> additive_attention_double_backward(
    const OptionalTensor& grad_grad_query,
    const OptionalTensor& grad_grad_states,
    const OptionalTensor& grad_grad_key_weight,
    const OptionalTensor& grad_grad_energy,
    const Tensor& grad_local,
    const Tensor& query,
    const Tensor& states,
    const Tensor& key_weight,
    const Tensor& energy,
    const Tensor& lengths);

Tensor encode_histories(const Tensor& parameters,
                        const Tensor& items,
                        const Tensor& histories,
                        const Tensor& lengths,
                        at::TensorList words,
                        at::IntArrayRef sizes);

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> inner_gradient(const Tensor& parameters,
                                                                               const Tensor& embeds,
                                                                               const Tensor& targets,
                                                                               const Tensor& items,
                                                                               at::TensorList words,
                                                                               at::IntArrayRef sizes,
                                                                               bool trained,
                                                                               const OptionalTensor& users);
std::tuple<Tensor, Tensor, Tensor> inner_gradient_tangent(const Tensor& tangent_parameters,
                                                          const OptionalTensor& tangent_items,
                                                          const OptionalTensor& tangent_embeds,
                                                          const Tensor& parameters,
                                                          const Tensor& embeds,
                                                          const Tensor& targets,
                                                          const Tensor& items,
                                                          at::TensorList saved,
                                                          at::TensorList words,
                                                          at::IntArrayRef sizes,
                                                          const OptionalTensor& users);

Tensor inner_steps_(at::TensorList state,
                    const Tensor& source,
                    const Tensor& items,
                    const Tensor& users,
                    const Tensor& targets,
                    const Tensor& seeds,
                    at::ArrayRef<double> step_sizes,
                    at::ArrayRef<double> rates,
                    at::IntArrayRef sizes);
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
kept_inner_steps(at::TensorList state,
                 const Tensor& source,
                 const Tensor& items,
                 const Tensor& users,
                 const Tensor& targets,
                 const Tensor& seeds,
                 at::ArrayRef<double> step_sizes,
                 at::ArrayRef<double> rates,
                 at::IntArrayRef sizes);
std::tuple<std::vector<Tensor>, std::vector<Tensor>, bool> pull_back_inner_steps_(
    at::TensorList adjoint,
    at::TensorList states,
    at::TensorList gradients,
    at::TensorList to_embeds,
    at::TensorList saved,
    const Tensor& source,
    const Tensor& items,
    const Tensor& users,
    const Tensor& targets,
    at::ArrayRef<double> step_sizes,
    at::ArrayRef<double> rates,
    at::IntArrayRef sizes,
    std::optional<double> limit);

void adam_step_(const Tensor& parameter,
                const Tensor& first_moment,
                const Tensor& second_moment,
                const Tensor& gradient,
                at::ArrayRef<double> rates,
                const OptionalTensor& size);
Tensor adam_adjoint_(const Tensor& parameter,
                     const Tensor& first_moment,
                     const Tensor& second_moment,
                     const Tensor& gradient,
                     const Tensor& to_parameter,
                     const Tensor& to_first_moment,
                     const Tensor& to_second_moment,
                     at::ArrayRef<double> rates,
                     const OptionalTensor& size);

Tensor random_words(const Tensor& seed, int64_t site, int64_t count);
Tensor random_words_of_sites(const Tensor& seed, int64_t first_site, at::IntArrayRef counts);

Tensor sum_rows_by_id(const Tensor& rows, const Tensor& ids, int64_t num_ids);

std::tuple<Tensor, Tensor, Tensor, Tensor> next_item_gradient(const Tensor& parameters,
                                                              const Tensor& items,
                                                              const Tensor& histories,
                                                              const Tensor& lengths,
                                                              const Tensor& targets,
                                                              const OptionalTensor& features,
                                                              double alignment,
                                                              at::TensorList words,
                                                              at::IntArrayRef sizes,
                                                              bool trained);

Tensor item_probabilities(const Tensor& queries, const Tensor& keys);
Tensor mix_items(const Tensor& probabilities, const Tensor& items);
Tensor mix_items_transposed(const Tensor& probabilities, const Tensor& cotangent);
std::tuple<Tensor, Tensor, Tensor> weigh_products(const Tensor& probabilities,
                                                  at::TensorList cotangents,
                                                  at::TensorList tables,
                                                  const Tensor& keys,
                                                  const OptionalTensor& queries);

Tensor target_rank(const Tensor& hidden,
                   const Tensor& item_embeddings,
                   const Tensor& target,
                   const OptionalTensor& excluded_offsets,
                   const OptionalTensor& excluded_items,
                   bool exclude_padding);
Tensor candidate_rank(const Tensor& hidden,
                      const Tensor& item_embeddings,
                      const Tensor& target,
                      const Tensor& candidates);

}  // namespace td3_fast::cpu
