// A pass of the encoder over a batch, and the tensors that it reads.
#pragma once

#include <c10/core/DeviceGuard.h>

#include "../encoder_options.h"
#include "kernels.h"
#include "operators.h"

namespace td3_fast::cuda {

// Positions (batch, 1) that are lengths, and what makes them those of the last items.
inline Tensor last_positions(const Tensor& lengths) {
  return lengths.unsqueeze(1);
}
constexpr int64_t kLast = -1;

inline Tensor nothing(const Tensor& like) {
  return like.new_empty({0});
}

// With the elements of each sequence one after the other, as a cut of longer ones has them too.
inline Tensor whole_sequences(const Tensor& tensor) {
  const bool whole = tensor.stride(2) == 1 && tensor.stride(1) == tensor.size(2);
  return whole ? tensor : tensor.contiguous();
}

class EncoderCall {
 public:
  // On `inputs`, of which only the sizes count where rows are looked up; offset: what is added to the
  // positions.
  EncoderCall(const Tensor& parameters,
              const Tensor& inputs,
              const Tensor& positions,
              at::TensorList words,
              at::IntArrayRef sizes,
              int64_t offset = 0)
      : options_(parameters, inputs, positions, words, sizes), guard_(inputs.device()), like_(inputs) {
    options_.check_causal();
    problem.float64 = inputs.scalar_type() == at::kDouble;
    problem.sizes = options_.sizes;
    problem.batch = options_.batch;
    problem.parameters = read(parameters.contiguous());
    inputs_ = inputs;
    problem.offset = offset;
    problem.positions = static_cast<const int64_t*>(read(positions.contiguous()));
    for (size_t site = 0; site < words.size(); ++site) {
      if (words[site].numel() == 0) continue;
      const int64_t dropped = options_.dropped(static_cast<int64_t>(site));
      problem.sites[site] = {static_cast<const int16_t*>(read(words[site])),
                             static_cast<int16_t>(dropped - 32768),
                             65536.0 / static_cast<double>(65536 - dropped)};
    }
  }

  // Rows of a table as inputs, (batch, length) of them.
  void look_up(const Tensor& table, const Tensor& ids) {
    problem.inputs = read(table.contiguous());
    problem.ids = static_cast<const int64_t*>(read(ids.contiguous()));
    problem.table_rows = table.size(0);
  }
  // Some of the inputs: rows (batch,) of them, whose first ones count.
  void select(const Tensor& inputs, const Tensor& rows) {
    const Tensor whole = whole_sequences(inputs);
    problem.inputs = read(whole);
    problem.input_stride = whole.stride(0);
    problem.rows = static_cast<const int64_t*>(read(rows.contiguous()));
    problem.table_rows = inputs.size(0);
  }
  // In the direction of these; undefined: inputs do not move.
  void move(const Tensor& parameters, const OptionalTensor& inputs) {
    problem.parameters_tangent = read(parameters.contiguous());
    if (!inputs) return;
    const Tensor whole = whole_sequences(*inputs);
    problem.inputs_tangent = read(whole);
    problem.input_tangent_stride = whole.stride(0);
  }
  void set_upstream(const Tensor& grad_outputs, const OptionalTensor& tangent) {
    problem.grad_outputs = read(grad_outputs.contiguous());
    if (tangent) problem.grad_outputs_tangent = read(tangent->contiguous());
  }
  // Upstream is that of the cross-entropy to the rows that follow the outputs, as in kernels.h. Items (n, d)
  // that lie column by column are read where they are.
  void compare_with(const Tensor& items) {
    problem.items = read(items.t().contiguous());
    problem.num_items = items.size(0);
  }

  // (batch, k, d), made by the next pass.
  Tensor outputs() {
    const Tensor made = like_.new_empty({options_.batch, options_.sizes.asked, options_.sizes.width});
    problem.outputs = made.mutable_data_ptr();
    return made;
  }
  // (batch, rows, d), made by the next pass.
  Tensor grad_inputs(int64_t rows) {
    const bool any = options_.sizes.asked > 0;
    const std::vector<int64_t> sizes = {options_.batch, rows, options_.sizes.width};
    const Tensor made = any ? like_.new_empty(sizes) : like_.new_zeros(sizes);
    problem.grad_inputs = made.mutable_data_ptr();
    problem.grad_input_rows = rows;
    problem.grad_input_stride = made.stride(0);
    return made;
  }

  void forward() {
    if (options_.batch > 0 && options_.sizes.asked > 0) run(EncoderPass::kForward);
  }
  // The gradients of the parameters, and the loss where items are compared with.
  std::tuple<Tensor, Tensor> backward() {
    const int64_t size = encoder_parameters(options_.sizes);
    if (options_.batch == 0 || options_.sizes.asked == 0) {
      return {like_.new_zeros({size}), like_.new_zeros({})};
    }
    const int64_t blocks = encoder_blocks(EncoderPass::kBackward, problem);
    const Tensor partials = like_.new_empty({blocks, size + 1});
    problem.partials = partials.mutable_data_ptr();
    run(EncoderPass::kBackward);
    const Tensor sums = like_.new_empty({size + 1});
    check_launch(sum_partials(problem.float64, blocks, size + 1, partials.const_data_ptr(),
                              sums.mutable_data_ptr(), current_stream(like_)));
    return {sums.narrow(0, 0, size), sums.select(0, size)};
  }

  EncoderProblem problem{};

 private:
  const void* read(const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.device() == like_.device(), "expected all tensors on ", like_.device(),
                      ", got one on ", tensor.device());
    kept_.push_back(tensor);
    return tensor.const_data_ptr();
  }

  Tensor bytes_of_blocks(int64_t each) const { return like_.new_empty({problem.blocks * each}, at::kByte); }

  void run(EncoderPass pass) {
    if (problem.inputs == nullptr) {
      const Tensor whole = whole_sequences(inputs_);
      problem.inputs = read(whole);
      problem.input_stride = whole.stride(0);
    }
    problem.blocks = encoder_blocks(pass, problem);
    problem.scratch_bytes = encoder_scratch(pass, problem);
    const int64_t numbers = problem.num_items * options_.sizes.asked;
    problem.logits_bytes = numbers * (problem.parameters_tangent != nullptr ? 2 : 1) * like_.element_size();
    const Tensor logits = bytes_of_blocks(problem.logits_bytes);
    problem.logits = logits.mutable_data_ptr();
    const Tensor scratch = bytes_of_blocks(problem.scratch_bytes);
    problem.scratch = scratch.mutable_data_ptr();
    check_launch(encode(pass, problem, current_stream(like_)));
  }

  EncoderOptions options_;
  c10::OptionalDeviceGuard guard_;
  Tensor like_, inputs_;
  std::vector<Tensor> kept_;
};

}  // namespace td3_fast::cuda
