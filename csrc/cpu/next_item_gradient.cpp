// The gradient of the loss on real examples, on the CPU: sequences are looked up, encoded, compared with
// every item and pulled back a few hundred at a time: as many as the halves of an encoder pass can be kept
// for, so that the first is not made twice.

#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>

#include "../class_cross_entropy.h"
#include "encoder_calls.h"
#include "registration.h"
#include "row_sums.h"

namespace td3_fast::cpu {
namespace {

constexpr int64_t kSequencesAtOnce = 256;

// The random words of some of the sequences.
std::vector<Tensor> words_of(at::TensorList words, int64_t batch, int64_t first, int64_t count) {
  std::vector<Tensor> own;
  for (const Tensor& site : words) {
    const int64_t each = site.numel() / batch;
    own.push_back(site.narrow(0, first * each, count * each));
  }
  return own;
}

}  // namespace

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
  check_histories(items, histories, lengths);
  check_next_items(parameters, items, histories, targets, features);
  const int64_t batch = histories.size(0), width = items.size(1);
  const Tensor ids = histories.contiguous(), positions = lengths.sub(1).unsqueeze(1);
  return with_type(items, [&](auto zero) {
    using T = decltype(zero);
    const T share = T(1) / static_cast<T>(batch);
    const T pull = static_cast<T>(alignment / static_cast<double>(batch * width));
    const Tensor loss = items.new_zeros({}, at::kDouble), aligned = items.new_zeros({}, at::kDouble);
    const Tensor grad_parameters = parameters.new_zeros(parameters.sizes());
    const Tensor grad_items = trained ? items.new_zeros(items.sizes()) : items.new_empty({0});
    // of the whole batch, whose embeddings are never made
    const EncoderOptions all(parameters, shape_of_rows(items, ids), positions, words, sizes);
    all.check_causal();
    const int64_t at_once = KeptPass<T>::most_sequences(all.sizes, std::min(batch, kSequencesAtOnce));
    KeptPass<T> pass(all.sizes, at_once, false);
    // scratch, which the thread keeps from call to call
    const int64_t each = ids.size(1) * width;
    const Scratch<T> of_embeds(at_once * each), of_grad_embeds(trained ? at_once * each : 0);
    const auto sequences_in = [&](const Scratch<T>& scratch, int64_t count) {
      return at::from_blob(scratch.data(), {count, ids.size(1), width}, kType<T>);
    };
    for (int64_t first = 0; first < batch; first += at_once) {
      const int64_t count = std::min(at_once, batch - first);
      const Tensor own_ids = ids.narrow(0, first, count), own_targets = targets.narrow(0, first, count);
      const Tensor own_positions = positions.narrow(0, first, count);
      const std::vector<Tensor> own_words = words_of(words, batch, first, count);
      const Tensor embeds = sequences_in(of_embeds, count);
      Tensor rows = embeds.view({-1, width});
      at::index_select_out(rows, items, 0, own_ids.view(-1));
      const EncoderOptions options(parameters, embeds, own_positions, own_words, sizes);
      EncoderInputs<T> in(options, parameters, embeds, own_positions, own_words);
      const Tensor hidden = items.new_empty({count, width});
      in.call.outputs = hidden.mutable_data_ptr<T>();
      pass.forward(options, in.call);

      const auto [losses, logsumexp, remainder, mean, probabilities] =
          class_cross_entropy_forward(hidden, items, own_targets, true, trained);
      loss.add_(losses.sum(), share);
      const Tensor upstream = items.new_full({count}, share);
      auto [grad_hidden, own_grad_items] = class_cross_entropy_backward(
          upstream, hidden, items, own_targets, logsumexp, remainder, mean, probabilities, {true, trained});
      if (features) {
        const Tensor apart = hidden.sub(features->narrow(0, first, count));
        // row by row, so that the order of the sum is that of one thread
        aligned.add_(apart.mul(apart).sum({1}).sum(), pull);
        grad_hidden.add_(apart, 2 * pull);
      }
      grad_hidden = grad_hidden.contiguous();
      in.call.grad_outputs = grad_hidden.const_data_ptr<T>();
      const Tensor own_grad_parameters = parameters.new_empty(parameters.sizes());
      Tensor grad_embeds;
      if (trained) {
        grad_items.add_(own_grad_items);
        grad_embeds = sequences_in(of_grad_embeds, count);
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

}  // namespace td3_fast::cpu
