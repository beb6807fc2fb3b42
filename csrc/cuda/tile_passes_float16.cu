#include "tile_passes.cuh"

namespace td3_fast::cuda {

const char* tile_pass_float16(Pass pass, const SoftEmbedding& problem, void* stream) {
  return launch_pass<HalfPrecision<__half>>(pass, problem, stream);
}

}  // namespace td3_fast::cuda
