// How a pass of the encoder is dealt out to blocks, and what their sums come to; see encoder.cuh.

#include "device.cuh"
#include "kernels.h"

namespace td3_fast::cuda {
namespace {

constexpr int kThreads = 256;
// The most blocks of a pass; each leaves gradients of all parameters. Results depend on it.
constexpr int64_t kMostBlocks = 264, kMostForwardBlocks = 1056;

// The sizes of most recipes, for which there are kernels of their own.
bool has_width_32(const EncoderProblem& problem) {
  const EncoderSizes& s = problem.sizes;
  return s.width == 32 && s.inner == 64 && s.heads == 1 && s.layers == 1;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(int64_t rows, int64_t size, const T* partials, T* out) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= size) return;
  T sum = 0;
#pragma unroll 8
  for (int64_t row = 0; row < rows; ++row) sum += partials[row * size + at];
  out[at] = sum;
}

template <typename T>
const char* sum_rows(int64_t rows, int64_t size, const void* partials, void* out, void* stream) {
  const dim3 grid(static_cast<unsigned>((size + kThreads - 1) / kThreads));
  return launch(sum_partials_kernel<T>, grid, kThreads, 0, stream, rows, size,
                static_cast<const T*>(partials), static_cast<T*>(out));
}

}  // namespace

int64_t encoder_blocks(EncoderPass pass, const EncoderProblem& problem) {
  const int64_t most = pass == EncoderPass::kForward ? kMostForwardBlocks : kMostBlocks;
  return problem.batch < most ? problem.batch : most;
}

int64_t encoder_scratch(EncoderPass pass, const EncoderProblem& problem) {
  if (problem.float64) return encoder_scratch_float64(pass, problem);
  return has_width_32(problem) ? encoder_scratch_width32(pass, problem)
                               : encoder_scratch_float32(pass, problem);
}

const char* encode(EncoderPass pass, const EncoderProblem& problem, void* stream) {
  if (problem.float64) return encode_float64(pass, problem, stream);
  return has_width_32(problem) ? encode_width32(pass, problem, stream)
                               : encode_float32(pass, problem, stream);
}

const char* sum_partials(
    bool float64, int64_t rows, int64_t size, const void* partials, void* out, void* stream) {
  return float64 ? sum_rows<double>(rows, size, partials, out, stream)
                 : sum_rows<float>(rows, size, partials, out, stream);
}

}  // namespace td3_fast::cuda
