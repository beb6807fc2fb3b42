#include "encoder_kernels.cuh"

namespace td3_fast::cuda {

int64_t encoder_scratch_width32(EncoderPass pass, const EncoderProblem& problem) {
  return scratch_of<float, 32>(pass, problem);
}
const char* encode_width32(EncoderPass pass, const EncoderProblem& problem, void* stream) {
  return run_pass<float, 32>(pass, problem, stream);
}

}  // namespace td3_fast::cuda
