// The encoder's operators on any device: their checks, and their dropout sites.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "checks.h"
#include "encoder_sizes.h"

namespace td3_fast {

struct EncoderOptions {
  EncoderSizes sizes;
  int64_t batch, hidden_dropped, attention_dropped;

  EncoderOptions(const at::Tensor& parameters,
                 const at::Tensor& inputs,
                 const at::Tensor& positions,
                 at::TensorList words,
                 at::IntArrayRef sizes_in) {
    TORCH_CHECK_VALUE(sizes_in.size() == 7,
                      "expected sizes (positions, inner, heads, layers, dropped of hidden, "
                      "dropped of attention, bidirectional)");
    TORCH_CHECK_VALUE(inputs.dim() == 3 && positions.dim() == 2 && positions.size(0) == inputs.size(0) &&
                          positions.scalar_type() == at::kLong,
                      "expected inputs (batch, length, d) and int64 positions (batch, k), got ",
                      inputs.sizes(), " and ", positions.sizes());
    batch = inputs.size(0);
    hidden_dropped = sizes_in[4], attention_dropped = sizes_in[5];
    const bool bidirectional = sizes_in[6] != 0;
    TORCH_CHECK_VALUE(
        !bidirectional || positions.size(1) > 0,
        "expected positions (batch, k + 1), the last of which are those of the last inputs seen");
    const int64_t asked = positions.size(1) - (bidirectional ? 1 : 0);
    sizes = {inputs.size(1), sizes_in[0], inputs.size(2), sizes_in[1],
             sizes_in[2],    sizes_in[3], asked,          bidirectional};
    TORCH_CHECK_VALUE(
        sizes.layers >= 1 && sizes.layers <= kMaxLayers && sizes.heads >= 1 &&
            sizes.width % sizes.heads == 0 && sizes.length >= 1 && sizes.length <= sizes.positions,
        "expected 1 to ", kMaxLayers, " layers, heads that divide d, and 1 to ", sizes.positions, " inputs");
    TORCH_CHECK_VALUE(parameters.dim() == 1 && parameters.size(0) == encoder_parameters(sizes),
                      "expected a vector of ", encoder_parameters(sizes), " parameters, got ",
                      parameters.sizes());
    TORCH_CHECK_VALUE(parameters.scalar_type() == inputs.scalar_type() &&
                          (inputs.scalar_type() == at::kFloat || inputs.scalar_type() == at::kDouble),
                      "parameters and inputs must both be float32 or float64");
    if (words.empty()) return;
    TORCH_CHECK_VALUE(static_cast<int64_t>(words.size()) == 1 + 3 * sizes.layers, "expected ",
                      1 + 3 * sizes.layers, " tensors of random words, got ", words.size());
    for (int64_t site = 0; site < 1 + 3 * sizes.layers; ++site) {
      const int64_t size = site_size(site);
      TORCH_CHECK_VALUE(words[site].scalar_type() == at::kShort && words[site].is_contiguous() &&
                            (words[site].numel() == 0 || words[site].numel() >= size),
                        "expected ", size, " int16 words for dropout site ", site);
    }
  }

  void check_causal() const {
    TORCH_CHECK_VALUE(!sizes.bidirectional,
                      "this operator has no attention to later inputs on this device; only "
                      "transformer_encoder on the CPU has it");
  }

  bool attention_site(int64_t site) const { return site > 0 && site % 3 == 1; }
  int64_t site_size(int64_t site) const {
    if (site == 0) return batch * sizes.length * sizes.width;
    const int64_t rows = (site - 1) / 3 + 1 < sizes.layers ? sizes.length : sizes.asked;
    return batch * rows * (attention_site(site) ? sizes.heads * sizes.length : sizes.width);
  }
  // In 65536ths.
  int64_t dropped(int64_t site) const { return attention_site(site) ? attention_dropped : hidden_dropped; }
};

// The items that sequences consist of: histories (batch, length), of which the first `lengths` count.
inline void check_histories(const at::Tensor& items, const at::Tensor& histories, const at::Tensor& lengths) {
  TORCH_CHECK_VALUE(items.dim() == 2 && histories.dim() == 2 && lengths.dim() == 1 &&
                        lengths.size(0) == histories.size(0) && histories.scalar_type() == at::kLong &&
                        lengths.scalar_type() == at::kLong,
                    "expected items (n, d), int64 histories (batch, length) and lengths (batch,), got ",
                    items.sizes(), ", ", histories.sizes(), " and ", lengths.sizes());
}

// What is predicted from at least one history, and what the outputs are drawn to.
inline void check_next_items(const at::Tensor& parameters,
                             const at::Tensor& items,
                             const at::Tensor& histories,
                             const at::Tensor& targets,
                             const std::optional<at::Tensor>& features) {
  TORCH_CHECK_VALUE(items.scalar_type() == parameters.scalar_type(),
                    "expected items (n, d) of the dtype of the parameters, got ", items.sizes());
  TORCH_CHECK_VALUE(histories.size(0) > 0 && targets.dim() == 1 && targets.size(0) == histories.size(0),
                    "expected targets (batch,) of at least one example, got ", histories.sizes(), " and ",
                    targets.sizes());
  TORCH_CHECK_VALUE(!features || (features->sizes() == at::IntArrayRef({histories.size(0), items.size(1)}) &&
                                  features->scalar_type() == items.scalar_type()),
                    "expected features (batch, d) of the dtype of the items");
}

// Of the sizes of embedded histories, whose rows are never made.
inline at::Tensor shape_of_rows(const at::Tensor& items, const at::Tensor& histories) {
  return items.narrow(0, 0, 1).unsqueeze(0).expand({histories.size(0), histories.size(1), items.size(1)});
}

}  // namespace td3_fast
