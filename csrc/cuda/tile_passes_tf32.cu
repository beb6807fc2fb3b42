#include "tile_passes.cuh"

namespace td3_fast::cuda {

const char* tile_pass_tf32(Pass pass, const SoftEmbedding& problem, void* stream) {
  return launch_pass<Tf32>(pass, problem, stream);
}

}  // namespace td3_fast::cuda
