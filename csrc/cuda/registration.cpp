#include "registration.h"

#include <c10/core/impl/VirtualGuardImpl.h>

namespace td3_fast::cuda {

void* current_stream(const at::Tensor& tensor) {
  const c10::impl::VirtualGuardImpl guard(tensor.device().type());
  return guard.getStream(tensor.device()).native_handle();
}

}  // namespace td3_fast::cuda

TORCH_LIBRARY_IMPL(td3_fast, CUDA, m) {
  td3_fast::cuda::register_operators(m);
}
