// Calls of the encoder on tensors: their checks, their dropout, and what is kept between the halves of a
// pass.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "../encoder_options.h"
#include "encoder.h"
#include "groups.h"

namespace td3_fast::cpu {

// Measured cost of each order, in plain multiply-adds for each one that for_groups counts.
constexpr int64_t kForwardCost = 2, kBackwardCost = 3, kDoubleBackwardCost = 5;

// Positions (batch, k), or (batch, k + 1) where attention goes both ways: those asked for, -1 for none, and
// the last input seen.
inline void check_positions(const Tensor& positions, const EncoderSizes& sizes) {
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const int64_t columns = positions.size(1);
  for (int64_t i = 0; i < positions.numel(); ++i) {
    const int64_t least = sizes.bidirectional && i % columns < sizes.asked ? -1 : 0;
    TORCH_CHECK_INDEX(position[i] >= least && position[i] < sizes.length, "position ", position[i],
                      " is not one of the ", sizes.length, " inputs");
  }
}

// The sequences so that those of a group have like lengths, then like numbers of outputs: a group computes as
// many rows as its longest needs. Only by their positions, so that equal calls have equal bits.
inline std::vector<int64_t> order_of(const Tensor& positions, const EncoderSizes& sizes) {
  const int64_t batch = positions.size(0), columns = positions.size(1);
  const int64_t* position = positions.const_data_ptr<int64_t>();
  std::vector<std::pair<int64_t, int64_t>> needs(batch, {0, 0});
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t* own = position + i * columns;
    for (int64_t r = 0; r < sizes.asked; ++r) {
      needs[i].first = std::max(needs[i].first, own[r]);
      if (own[r] >= 0) needs[i].second = r;
    }
    if (sizes.bidirectional) needs[i].first = std::max(needs[i].first, own[sizes.asked]);
  }
  std::vector<int64_t> order(batch);
  std::iota(order.begin(), order.end(), 0);
  if (!std::is_sorted(needs.begin(), needs.end(), std::greater<>())) {
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return needs[i] > needs[j]; });
  }
  return order;
}

template <typename T>
std::vector<EncoderDropout<T>> dropout_of(const EncoderOptions& options, at::TensorList words) {
  std::vector<EncoderDropout<T>> sites(1 + 3 * options.sizes.layers, {nullptr, 0, T(1)});
  for (size_t site = 0; site < words.size(); ++site) {
    if (words[site].numel() == 0) continue;
    const int64_t dropped = options.dropped(site);
    sites[site] = {words[site].const_data_ptr<int16_t>(), static_cast<int16_t>(dropped - 32768),
                   static_cast<T>(65536.0 / (65536 - dropped))};
  }
  return sites;
}

// run(first, count, scratch, sums) for every group of sequences, by groups.h.
template <typename T, typename Run>
void for_groups(const EncoderSizes& sizes,
                int64_t batch,
                int64_t scratch_bytes,
                int64_t cost,
                const Tensor& total,
                const Run& run) {
  // Each parameter meets each asked row, each input a few times the width.
  const int64_t of_sequence = sizes.asked * encoder_parameters(sizes) + sizes.length * sizes.width * 8;
  run_groups<T>(encoder<T>().lanes, batch, scratch_bytes, cost * batch * of_sequence, total, run);
}

// The tensors that every order reads, and a call on them whose outputs are still to be filled in.
template <typename T>
struct EncoderInputs {
  Tensor parameters, inputs, positions;
  std::vector<EncoderDropout<T>> dropout;
  std::vector<int64_t> order;
  EncoderCall<T> call;

  EncoderInputs(const EncoderOptions& options,
                const Tensor& parameters_in,
                const Tensor& inputs_in,
                const Tensor& positions_in,
                at::TensorList words)
      : parameters(parameters_in.contiguous()),
        inputs(whole_sequences(inputs_in)),
        positions(positions_in.contiguous()),
        dropout(dropout_of<T>(options, words)),
        call{} {
    check_positions(positions, options.sizes);
    order = order_of(positions, options.sizes);
    call.order = order.data();
    call.sizes = options.sizes;
    call.norm_eps = static_cast<T>(kNormEps);
    call.parameters = parameters.const_data_ptr<T>();
    call.inputs = inputs.const_data_ptr<T>();
    call.input_stride = inputs.stride(0);
    call.grad_input_stride = options.sizes.length * options.sizes.width;
    call.positions = positions.const_data_ptr<int64_t>();
    call.dropout = dropout.data();
  }

  // In the direction of whole sequences.
  void move_inputs(const Tensor& tangent) {
    call.inputs_tangent = tangent.const_data_ptr<T>();
    call.input_tangent_stride = tangent.stride(0);
  }

  // With the elements of each sequence one after the other, as a cut of longer ones has them too.
  static Tensor whole_sequences(const Tensor& tensor) {
    const bool whole = tensor.stride(2) == 1 && tensor.stride(1) == tensor.size(2);
    return whole ? tensor : tensor.contiguous();
  }
};

// Bytes between the halves of a pass that are kept; where there would be more, the first half is made again.
constexpr int64_t kKeptPassBytes = int64_t{32} << 20;

// Both halves of a pass over every group of sequences, with what is between them kept for all if it is
// little.
template <typename T>
class KeptPass {
 public:
  // For passes over at most so many sequences, one after the other.
  KeptPass(const EncoderSizes& sizes, int64_t sequences, bool tangents)
      : tangents_(tangents),
        pass_(tangents ? encoder<T>().duals : encoder<T>().values),
        size_(ceil_div(encoder<T>().scratch_size(sizes, tangents), 64) * 64) {
    const int64_t bytes = size_ * ceil_div(sequences, encoder<T>().lanes);
    if (bytes <= kKeptPassBytes) scratch_ = Scratch<uint8_t>(bytes);
  }

  // At most so many sequences, whole groups, as can be kept of a pass.
  static int64_t most_sequences(const EncoderSizes& sizes, int64_t wanted) {
    const int64_t lanes = encoder<T>().lanes;
    const int64_t fitting = kKeptPassBytes / (encoder<T>().scratch_size(sizes, false) + 64) * lanes;
    return fitting > 0 ? std::min(wanted, fitting) : wanted;
  }

  void forward(const EncoderOptions& options, const EncoderCall<T>& call) {
    call_ = &call;
    for_groups<T>(options.sizes, options.batch, keeps() ? 0 : size_,
                  tangents_ ? kDoubleBackwardCost : kForwardCost, Tensor(),
                  [&](int64_t first, int64_t count, void* scratch, T*) {
                    pass_.forward(call, first, count, keeps() ? kept(first) : scratch);
                  });
  }
  // Of the same options and call.
  void backward(const EncoderOptions& options, const Tensor& grad_parameters) const {
    for_groups<T>(options.sizes, options.batch, keeps() ? 0 : size_,
                  tangents_ ? kDoubleBackwardCost : kBackwardCost, grad_parameters,
                  [&](int64_t first, int64_t count, void* scratch, T* sums) {
                    if (!keeps()) pass_.forward(*call_, first, count, scratch);
                    pass_.backward(keeps() ? kept(first) : scratch, sums);
                  });
  }

 private:
  bool keeps() const { return scratch_.data() != nullptr; }
  void* kept(int64_t first) const { return scratch_.data() + first / encoder<T>().lanes * size_; }

  bool tangents_;
  const EncoderPass<T>& pass_;
  int64_t size_;
  Scratch<uint8_t> scratch_;
  const EncoderCall<T>* call_ = nullptr;
};

}  // namespace td3_fast::cpu
