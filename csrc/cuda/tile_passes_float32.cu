#include "tile_passes.cuh"

namespace td3_fast::cuda {

const char* tile_pass_float32(Pass pass, const SoftEmbedding& problem, void* stream) {
  return launch_pass<Float32>(pass, problem, stream);
}

}  // namespace td3_fast::cuda
