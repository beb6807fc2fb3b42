// What joins the CUDA operators to a device: tests run them on another one (tests/simt).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace td3_fast::cuda {

// The native handle of the stream that work on the device of `tensor` goes to.
void* current_stream(const at::Tensor& tensor);

// Gives `library` the implementation of every operator of td3_fast.
void register_operators(torch::Library& library);

}  // namespace td3_fast::cuda
