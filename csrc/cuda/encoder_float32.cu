#include "encoder_kernels.cuh"

namespace td3_fast::cuda {

int64_t encoder_scratch_float32(EncoderPass pass, const EncoderProblem& problem) {
  return scratch_of<float, 0>(pass, problem);
}
const char* encode_float32(EncoderPass pass, const EncoderProblem& problem, void* stream) {
  return run_pass<float, 0>(pass, problem, stream);
}

}  // namespace td3_fast::cuda
