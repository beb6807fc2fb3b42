// The cross-entropy to one item per row, on any device; library.cpp says what is returned.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace td3_fast {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> class_cross_entropy_forward(
    const Tensor& hidden, const Tensor& items, const Tensor& target, bool save, bool keep);

std::tuple<Tensor, Tensor> class_cross_entropy_backward(const Tensor& grad_loss,
                                                        const Tensor& hidden,
                                                        const Tensor& items,
                                                        const Tensor& target,
                                                        const Tensor& logsumexp,
                                                        const Tensor& remainder,
                                                        const Tensor& mean,
                                                        const Tensor& probabilities,
                                                        std::array<bool, 2> needed);

std::tuple<Tensor, Tensor, Tensor> class_cross_entropy_double_backward(const OptionalTensor& grad_grad_hidden,
                                                                       const OptionalTensor& grad_grad_items,
                                                                       const Tensor& grad_loss,
                                                                       const Tensor& hidden,
                                                                       const Tensor& items,
                                                                       const Tensor& target,
                                                                       const Tensor& logsumexp,
                                                                       const Tensor& remainder,
                                                                       const Tensor& mean,
                                                                       const Tensor& probabilities,
                                                                       std::array<bool, 3> needed);

}  // namespace td3_fast
