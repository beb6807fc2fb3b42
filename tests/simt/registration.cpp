// csrc/cuda/registration.cpp for the host: while installed, the CUDA operators serve tensors on the CPU.

#include "registration.h"

#include <memory>

#include "adam_operators.cpp"  // here, so that PyTorch's headers are compiled once
#include "encoder_operators.cpp"
#include "gradient_operators.cpp"
#include "operators.cpp"
#include "random_operators.cpp"

namespace td3_fast::cuda {

void* current_stream(const at::Tensor& /*tensor*/) {
  return nullptr;
}

}  // namespace td3_fast::cuda

extern "C" void simt_install(int install) {
  static std::unique_ptr<torch::Library> library;
  library.reset();
  if (install == 0) return;
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "td3_fast", c10::DispatchKey::CPU,
                                             __FILE__, __LINE__);
  td3_fast::cuda::register_operators(*library);
}
