// Every operator's schema, and the Python module with the facts of this build.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/tile.h"
#include "dispatch.h"

namespace py = pybind11;

namespace td3_fast {
namespace {

// The operators without what they save for their derivatives.

std::tuple<at::Tensor, at::Tensor> soft_embedding(const at::Tensor& queries,
                                                  const at::Tensor& keys,
                                                  const at::Tensor& values) {
  using Signature =
      std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&);
  static const auto forward = find_operator<Signature>("td3_fast::soft_embedding_forward");
  // Rows in half precision are worked on in float32: the derivatives take the embedding from the forward
  // pass, and rounded it would spoil them.
  const at::ScalarType type = queries.scalar_type();
  const bool half = (type == at::kHalf || type == at::kBFloat16) && keys.scalar_type() == type;
  const auto [embedding, logsumexp, remainder] =
      forward.call(half ? queries.to(at::kFloat) : queries, keys, values);
  return {embedding.to(type), logsumexp};
}

at::Tensor item_logsumexp(const at::Tensor& hidden, const at::Tensor& items) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&,
                                                                               const at::Tensor&, bool, bool);
  static const auto forward = find_operator<Signature>("td3_fast::item_logsumexp_forward");
  return std::get<0>(forward.call(hidden, items, false, false));
}

at::Tensor class_cross_entropy(const at::Tensor& hidden, const at::Tensor& items, const at::Tensor& target) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool);
  static const auto forward = find_operator<Signature>("td3_fast::class_cross_entropy_forward");
  return std::get<0>(forward.call(hidden, items, target, false, false));
}

}  // namespace

// The remainder is what the logsumexp loses to rounding: derivatives make the probabilities anew from their
// sum, and float32 alone would be off by 1e-3 for scores of 1e4. It is not differentiable, and neither are
// the expected item row (mean) and the probabilities. A gradient that `needed` does not ask for is returned
// as an empty tensor. The embedding and the logsumexp given to a derivative are functions of its other
// inputs: derivatives towards queries, keys and values are total.
TORCH_LIBRARY(td3_fast, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  m.set_python_module("td3_fast.ops.soft_embedding");
  m.def("soft_embedding(Tensor queries, Tensor keys, Tensor values) -> (Tensor embedding, Tensor logsumexp)",
        soft_embedding, tags);
  m.def(
      "soft_embedding_forward(Tensor queries, Tensor keys, Tensor values) "
      "-> (Tensor embedding, Tensor logsumexp, Tensor remainder)",
      tags);
  m.def(
      "soft_embedding_backward(Tensor? grad_embedding, Tensor? grad_logsumexp, "
      "Tensor queries, Tensor keys, Tensor values, Tensor embedding, Tensor logsumexp, Tensor remainder, "
      "bool[3] needed) -> (Tensor grad_queries, Tensor grad_keys, Tensor grad_values)",
      tags);
  m.def(
      "soft_embedding_double_backward("
      "Tensor? grad_grad_queries, Tensor? grad_grad_keys, Tensor? grad_grad_values, "
      "Tensor? grad_embedding, Tensor? grad_logsumexp, "
      "Tensor queries, Tensor keys, Tensor values, Tensor embedding, Tensor logsumexp, Tensor remainder, "
      "bool[5] needed) -> (Tensor grad_queries, Tensor grad_keys, Tensor grad_values, "
      "Tensor grad_grad_embedding, Tensor grad_grad_logsumexp)",
      tags);

  m.set_python_module("td3_fast.ops.item_cross_entropy");
  m.def("item_logsumexp(Tensor hidden, Tensor items) -> Tensor", item_logsumexp, tags);
  m.def(
      "item_logsumexp_forward(Tensor hidden, Tensor items, bool save, bool keep) "
      "-> (Tensor logsumexp, Tensor remainder, Tensor mean, Tensor probabilities)",
      tags);
  m.def(
      "item_logsumexp_backward(Tensor grad_logsumexp, Tensor hidden, Tensor items, "
      "Tensor logsumexp, Tensor remainder, Tensor mean, Tensor probabilities, bool[2] needed) "
      "-> (Tensor grad_hidden, Tensor grad_items)",
      tags);
  m.def(
      "item_logsumexp_double_backward(Tensor? grad_grad_hidden, Tensor? grad_grad_items, "
      "Tensor grad_logsumexp, Tensor hidden, Tensor items, "
      "Tensor logsumexp, Tensor remainder, Tensor mean, Tensor probabilities, bool[3] needed) "
      "-> (Tensor grad_grad_logsumexp, Tensor grad_hidden, Tensor grad_items)",
      tags);
  m.def("class_cross_entropy(Tensor hidden, Tensor items, Tensor target) -> Tensor", class_cross_entropy,
        tags);
  m.def(
      "class_cross_entropy_forward(Tensor hidden, Tensor items, Tensor target, bool save, bool keep) "
      "-> (Tensor loss, Tensor logsumexp, Tensor remainder, Tensor mean, Tensor probabilities)",
      tags);
  m.def(
      "class_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor items, Tensor target, "
      "Tensor logsumexp, Tensor remainder, Tensor mean, Tensor probabilities, bool[2] needed) "
      "-> (Tensor grad_hidden, Tensor grad_items)",
      tags);
  m.def(
      "class_cross_entropy_double_backward(Tensor? grad_grad_hidden, Tensor? grad_grad_items, "
      "Tensor grad_loss, Tensor hidden, Tensor items, Tensor target, "
      "Tensor logsumexp, Tensor remainder, Tensor mean, Tensor probabilities, bool[3] needed) "
      "-> (Tensor grad_grad_loss, Tensor grad_hidden, Tensor grad_items)",
      tags);

  m.set_python_module("td3_fast.ops.transformer_encoder");
  m.def(
      "transformer_encoder_forward(Tensor parameters, Tensor inputs, Tensor positions, Tensor[] words, "
      "int[] sizes) "
      "-> Tensor",
      tags);
  m.def(
      "transformer_encoder_backward(Tensor grad_outputs, Tensor parameters, Tensor inputs, Tensor positions, "
      "Tensor[] words, int[] sizes, bool needs_inputs) -> (Tensor grad_parameters, Tensor grad_inputs)",
      tags);
  m.def(
      "transformer_encoder_double_backward(Tensor? grad_grad_parameters, Tensor? grad_grad_inputs, "
      "Tensor grad_outputs, Tensor parameters, Tensor inputs, Tensor positions, Tensor[] words, int[] sizes, "
      "bool needs_inputs) -> (Tensor grad_grad_outputs, Tensor grad_parameters, Tensor grad_inputs)",
      tags);

  m.def(
      "encode_histories(Tensor parameters, Tensor items, Tensor histories, Tensor lengths, Tensor[] words, "
      "int[] sizes) -> Tensor",
      tags);

  // The derivatives of these two are nodes in Python: their passes take much longer than the crossing.
  m.set_python_module("td3_fast.ops.gru");
  m.def("gru_forward(Tensor inputs, Tensor input_weight, Tensor state_weight, Tensor lengths) -> Tensor",
        tags);
  m.def(
      "gru_backward(Tensor grad_states, Tensor inputs, Tensor input_weight, Tensor state_weight, "
      "Tensor lengths, bool needs_inputs) "
      "-> (Tensor grad_inputs, Tensor grad_input_weight, Tensor grad_state_weight)",
      tags);
  m.def(
      "gru_double_backward(Tensor? grad_grad_inputs, Tensor? grad_grad_input_weight, "
      "Tensor? grad_grad_state_weight, Tensor grad_states, Tensor inputs, Tensor input_weight, "
      "Tensor state_weight, Tensor lengths, bool needs_inputs) "
      "-> (Tensor grad_grad_states, Tensor grad_inputs, Tensor grad_input_weight, Tensor grad_state_weight)",
      tags);

  m.set_python_module("td3_fast.ops.additive_attention");
  m.def(
      "additive_attention_forward(Tensor query, Tensor states, Tensor key_weight, Tensor energy, "
      "Tensor lengths) -> Tensor",
      tags);
  m.def(
      "additive_attention_backward(Tensor grad_local, Tensor query, Tensor states, Tensor key_weight, "
      "Tensor energy, Tensor lengths) "
      "-> (Tensor grad_query, Tensor grad_states, Tensor grad_key_weight, Tensor grad_energy)",
      tags);
  m.def(
      "additive_attention_double_backward(Tensor? grad_grad_query, Tensor? grad_grad_states, "
      "Tensor? grad_grad_key_weight, Tensor? grad_grad_energy, Tensor grad_local, Tensor query, "
      "Tensor states, Tensor key_weight, Tensor energy, Tensor lengths) -> (Tensor grad_grad_local, "
      "Tensor grad_query, Tensor grad_states, Tensor grad_key_weight, Tensor grad_energy)",
      tags);

  m.set_python_module("td3_fast.ops.inner_gradient");
  m.def(
      "inner_gradient(Tensor parameters, Tensor embeds, Tensor targets, Tensor items, Tensor[] words, "
      "int[] sizes, bool trained, Tensor? users=None) "
      "-> (Tensor loss, Tensor grad_parameters, Tensor grad_items, Tensor grad_embeds, Tensor[] saved)",
      tags);
  m.def(
      "inner_gradient_tangent(Tensor tangent_parameters, Tensor? tangent_items, Tensor? tangent_embeds, "
      "Tensor parameters, Tensor embeds, Tensor targets, Tensor items, Tensor[] saved, Tensor[] words, "
      "int[] sizes, Tensor? users=None) -> (Tensor grad_parameters, Tensor grad_items, Tensor grad_embeds)",
      tags);

  // On the CPU alone. A state is a parameter and its moments, or those of the encoder and then of the table.
  m.set_python_module("td3_fast.ops.inner_steps");
  m.def(
      "inner_steps_(Tensor(a!)[] state, Tensor source, Tensor items, Tensor users, Tensor targets, "
      "Tensor seeds, float[] step_sizes, float[] rates, int[] sizes) -> Tensor losses",
      tags);
  m.def(
      "kept_inner_steps(Tensor[] state, Tensor source, Tensor items, Tensor users, Tensor targets, "
      "Tensor seeds, float[] step_sizes, float[] rates, int[] sizes) "
      "-> (Tensor losses, Tensor[] states, Tensor[] gradients, Tensor[] to_embeds, Tensor[] saved)",
      tags);
  m.def(
      "pull_back_inner_steps_(Tensor(a!)[] adjoint, Tensor[] states, Tensor[] gradients, Tensor[] to_embeds, "
      "Tensor[] saved, Tensor source, Tensor items, Tensor users, Tensor targets, float[] step_sizes, "
      "float[] rates, int[] sizes, float? limit=None) -> (Tensor[] cotangents, Tensor[] tables, bool beyond)",
      tags);

  m.set_python_module("td3_fast.ops.adam");
  m.def(
      "adam_step_(Tensor(a!) parameter, Tensor(b!) first_moment, Tensor(c!) second_moment, Tensor gradient, "
      "float[] rates, Tensor? size=None) -> ()",
      tags);
  m.def(
      "adam_adjoint_(Tensor parameter, Tensor first_moment, Tensor second_moment, Tensor gradient, "
      "Tensor(a!) to_parameter, Tensor(b!) to_first_moment, Tensor(c!) to_second_moment, float[] rates, "
      "Tensor? size=None) -> Tensor",
      tags);

  m.set_python_module("td3_fast.ops.dropout");
  m.def("random_words(Tensor seed, int site, int count) -> Tensor", tags);
  // Whole blocks of Philox of each site, one site after the other.
  m.def("random_words_of_sites(Tensor seed, int first_site, int[] counts) -> Tensor", tags);

  m.set_python_module("td3_fast.ops.look_up");
  m.def("sum_rows_by_id(Tensor rows, Tensor ids, int num_ids) -> Tensor", tags);

  m.set_python_module("td3_fast.ops.next_item_gradient");
  m.def(
      "next_item_gradient(Tensor parameters, Tensor items, Tensor histories, Tensor lengths, Tensor targets, "
      "Tensor? features, float alignment, Tensor[] words, int[] sizes, bool trained) "
      "-> (Tensor loss, Tensor aligned, Tensor grad_parameters, Tensor grad_items)",
      tags);

  m.set_python_module("td3_fast.ops.mix_items");
  m.def("item_probabilities(Tensor queries, Tensor keys) -> Tensor", tags);
  m.def("mix_items(Tensor probabilities, Tensor items) -> Tensor", tags);
  m.def("mix_items_transposed(Tensor probabilities, Tensor cotangent) -> Tensor", tags);
  m.def(
      "weigh_products(Tensor probabilities, Tensor[] cotangents, Tensor[] tables, Tensor keys, "
      "Tensor? queries=None) -> (Tensor by_keys, Tensor of_rows, Tensor of_items)",
      tags);

  m.set_python_module("td3_fast.ops.target_rank");
  m.def(
      "target_rank(Tensor hidden, Tensor item_embeddings, Tensor target, "
      "Tensor? excluded_offsets, Tensor? excluded_items, bool exclude_padding) -> Tensor",
      tags);
  m.def("candidate_rank(Tensor hidden, Tensor item_embeddings, Tensor target, Tensor candidates) -> Tensor",
        tags);
}

}  // namespace td3_fast

// torch.vmap takes these apart before it asks for the batching rules of their parts (ops/batching.py).
TORCH_LIBRARY_IMPL(td3_fast, FuncTorchBatchedDecomposition, m) {
  m.impl("soft_embedding", td3_fast::soft_embedding);
  m.impl("item_logsumexp", td3_fast::item_logsumexp);
  m.impl("class_cross_entropy", td3_fast::class_cross_entropy);
}

PYBIND11_MODULE(_kernels, module) {
  module.def(
      "build_facts",
      [] {
        py::dict facts;
        facts["version"] = TD3_FAST_VERSION;
        facts["torch"] = TORCH_VERSION;
        facts["compiler"] = TD3_FAST_COMPILER;
        facts["flags"] = TD3_FAST_FLAGS;
        facts["cuda"] = TD3_FAST_CUDA_VERSION;
        facts["cuda_architectures"] = TD3_FAST_CUDA_ARCHITECTURES;
        const char* names[8];
        const int count = td3_fast::cpu::instruction_sets(names, 8);
        facts["instruction_sets"] = std::vector<std::string>(names, names + count);
        return facts;
      },
      "Compiler, flags, versions, GPU architectures, and the instruction sets that this machine runs, best "
      "first.");
  module.def(
      "select_instruction_set",
      [](const std::string& name) {
        if (!td3_fast::cpu::select_instruction_set(name.c_str())) {
          throw py::value_error("no kernels for the instruction set " + name + " run on this machine");
        }
      },
      py::arg("name"), "Use the named instruction set from now on, in the whole process; for tests.");
}
