// The gradient of the loss on real examples, on the CPU: sequences are looked up, encoded, compared with
// every item and pulled back a few hundred at a time: as many as the halves of an encoder pass can be kept
// for, so that the first is not made twice.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "encoder_calls.h"
#include "row_sums.h"

namespace td3_fast::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kSequencesAtOnce = 512;

// The random words of some of the sequences.
std::vector<Tensor> words_of(at::TensorList words, int64_t batch, int64_t first, int64_t count) {
  std::vector<Tensor> own;
  for (const Tensor& site : words) {
    const int64_t each = site.numel() / batch;
    own.push_back(site.narrow(0, first * each, count * each));
  }
  return own;
}

using Backward = std::tuple<Tensor, Tensor>(const Tensor&,
                                            const Tensor&,
                                            const Tensor&,
                                            const Tensor&,
                                            const Tensor&,
                                            const Tensor&,
                                            const Tensor&,
                                            const Tensor&,
                                            std::array<bool, 2>);

// Mean cross-entropy of the targets, and `alignment` times the mean square of what the outputs differ from
// `features`; the gradients of their sum, that of items only where `trained`.
std::tuple<Tensor, Tensor, Tensor, Tensor> next_item_gradient(const Tensor& parameters,
                                                              const Tensor& items,
                                                              const Tensor& histories,
                                                              const Tensor& lengths,
                                                              const Tensor& targets,
                                                              const OptionalTensor& features,
                                                              double alignment,
                                                              at::TensorList words,
                                                              at::IntArrayRef sizes,
                                                              bool trained) {
  using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                     const Tensor&, bool, bool);
  static const auto loss_forward = find_operator<Forward>("td3_fast::class_cross_entropy_forward");
  static const auto loss_backward = find_operator<Backward>("td3_fast::class_cross_entropy_backward");
  check_histories(items, histories, lengths);
  check_next_items(parameters, items, histories, targets, features);
  const int64_t batch = histories.size(0), width = items.size(1);
  const Tensor ids = histories.contiguous(), positions = (lengths - 1).unsqueeze(1);
  return with_type(items, [&](auto zero) {
    using T = decltype(zero);
    const T share = T(1) / static_cast<T>(batch);
    const T pull = static_cast<T>(alignment / static_cast<double>(batch * width));
    const Tensor loss = at::zeros({}, items.options().dtype(at::kDouble)), aligned = at::zeros_like(loss);
    const Tensor grad_parameters = at::zeros_like(parameters);
    const Tensor grad_items =
        trained ? at::zeros(items.sizes(), items.options()) : at::empty({0}, items.options());
    // of the whole batch, whose embeddings are never made
    const EncoderSizes all =
        EncoderOptions(parameters, shape_of_rows(items, ids), positions, words, sizes).sizes;
    const int64_t at_once = KeptPass<T>::most_sequences(all, std::min(batch, kSequencesAtOnce));
    KeptPass<T> pass(all, at_once, false);
    for (int64_t first = 0; first < batch; first += at_once) {
      const int64_t count = std::min(at_once, batch - first);
      const Tensor own_ids = ids.narrow(0, first, count), own_targets = targets.narrow(0, first, count);
      const Tensor own_positions = positions.narrow(0, first, count);
      const std::vector<Tensor> own_words = words_of(words, batch, first, count);
      const Tensor embeds = at::index_select(items, 0, own_ids.view(-1)).view({count, -1, width});
      const EncoderOptions options(parameters, embeds, own_positions, own_words, sizes);
      EncoderInputs<T> in(options, parameters, embeds, own_positions, own_words);
      const Tensor hidden = at::empty({count, width}, items.options());
      in.call.outputs = hidden.mutable_data_ptr<T>();
      pass.forward(options, in.call);

      const auto [losses, logsumexp, remainder, mean, probabilities] =
          loss_forward.call(hidden, items, own_targets, true, trained);
      loss.add_(losses.sum(), share);
      const Tensor upstream = at::full({count}, share, items.options());
      auto [grad_hidden, own_grad_items] = loss_backward.call(
          upstream, hidden, items, own_targets, logsumexp, remainder, mean, probabilities, {true, trained});
      if (features) {
        const Tensor apart = hidden - features->narrow(0, first, count);
        aligned.add_((apart * apart).sum(), pull);
        grad_hidden.add_(apart, 2 * pull);
      }
      grad_hidden = grad_hidden.contiguous();
      in.call.grad_outputs = grad_hidden.const_data_ptr<T>();
      const Tensor own_grad_parameters = at::empty_like(grad_parameters);
      Tensor grad_embeds;
      if (trained) {
        grad_items.add_(own_grad_items);
        grad_embeds = at::empty(embeds.sizes(), embeds.options());
        in.call.grad_inputs = grad_embeds.mutable_data_ptr<T>();
      }
      pass.backward(options, own_grad_parameters);
      grad_parameters.add_(own_grad_parameters);
      if (trained) add_rows<T>(grad_embeds, own_ids, grad_items);
    }
    return std::make_tuple(loss.to(items.scalar_type()), aligned.to(items.scalar_type()), grad_parameters,
                           grad_items);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(td3_fast, CPU, m) {
  m.impl("next_item_gradient", next_item_gradient);
}

// What it returns has no history: a derivative of it raises instead of being zero.
TORCH_LIBRARY_IMPL(td3_fast, Autograd, m) {
  m.impl("next_item_gradient", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace td3_fast::cpu
