#include "tile_passes.cuh"

namespace td3_fast::cuda {

const char* tile_pass_bfloat16(Pass pass, const SoftEmbedding& problem, void* stream) {
  return launch_pass<HalfPrecision<__nv_bfloat16>>(pass, problem, stream);
}

}  // namespace td3_fast::cuda
