#include "encoder_kernels.cuh"

namespace td3_fast::cuda {

int64_t encoder_scratch_float64(EncoderPass pass, const EncoderProblem& problem) {
  return scratch_of<double, 0>(pass, problem);
}
const char* encode_float64(EncoderPass pass, const EncoderProblem& problem, void* stream) {
  return run_pass<double, 0>(pass, problem, stream);
}

}  // namespace td3_fast::cuda
