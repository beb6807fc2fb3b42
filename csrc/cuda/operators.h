// What joins the CUDA operators to a device: tests run them on another one (tests/simt).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace td3_fast::cuda {

// The native handle of the stream that work on the device of `tensor` goes to.
void* current_stream(const at::Tensor& tensor);

// Raises what CUDA said of a launch, unless it is null.
void check_launch(const char* error);

void register_encoder_operators(torch::Library& library);
void register_gradient_operators(torch::Library& library);

// Gives `library` the implementation of every operator of td3_fast.
void register_operators(torch::Library& library);

}  // namespace td3_fast::cuda
