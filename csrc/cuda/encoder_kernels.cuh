// The encoder's kernels of one type; encoder.cuh and those beside it have the passes.
#pragma once

#include "encoder_backward.cuh"
#include "encoder_forward.cuh"
#include "encoder_items.cuh"

namespace td3_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kManyThreads = 512;  // where most multiprocessors have nothing to do
constexpr int64_t kFewSequences = 132;

// kShared: everything that is handed on between threads lies in shared memory; else in global scratch.
template <typename T, bool kTangents, bool kBackward, int kWidth, bool kShared>
__global__ void __launch_bounds__(kManyThreads)
    encoder_kernel(const __grid_constant__ EncoderProblem problem) {
  const int64_t block = blockIdx.x;
  SequencePass<T, kTangents, kBackward, kWidth> pass(problem);
  if constexpr (kShared) {
    pass.run(shared_memory<unsigned char>(), static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
             block);
  } else {
    pass.run(static_cast<unsigned char*>(problem.scratch) + block * problem.scratch_bytes,
             static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), block);
  }
}

// The instance of the kernel that a pass needs.
template <typename T, bool kTangents, bool kBackward, int kWidth>
struct Instance {
  static int64_t bytes(const EncoderProblem& problem) {
    return SequencePass<T, kTangents, kBackward, kWidth>(problem).bytes();
  }
  static bool in_shared(const EncoderProblem& problem) { return bytes(problem) <= shared_memory_limit(); }
  static const char* run(const EncoderProblem& problem, void* stream) {
    const dim3 grid(static_cast<unsigned>(problem.blocks));
    const int threads = problem.batch <= kFewSequences ? kManyThreads : kThreads;
    if (in_shared(problem)) {
      return launch(encoder_kernel<T, kTangents, kBackward, kWidth, true>, grid, threads, bytes(problem),
                    stream, problem);
    }
    if constexpr (kWidth > 0) {
      return encode_float32(kBackward ? EncoderPass::kBackward : EncoderPass::kForward, problem, stream);
    } else {
      return launch(encoder_kernel<T, kTangents, kBackward, 0, false>, grid, threads, 0, stream, problem);
    }
  }
};

template <typename T, int kWidth, typename Use>
auto with_instance(EncoderPass pass, const EncoderProblem& problem, const Use& use) {
  const bool tangents = problem.parameters_tangent != nullptr;
  if (pass == EncoderPass::kForward) {
    return tangents ? use(Instance<T, true, false, kWidth>()) : use(Instance<T, false, false, kWidth>());
  }
  return tangents ? use(Instance<T, true, true, kWidth>()) : use(Instance<T, false, true, kWidth>());
}

template <typename T, int kWidth>
int64_t scratch_of(EncoderPass pass, const EncoderProblem& problem) {
  return with_instance<T, kWidth>(pass, problem, [&](auto instance) {
    return instance.in_shared(problem) ? int64_t{0} : (instance.bytes(problem) + 255) / 256 * 256;
  });
}
template <typename T, int kWidth>
const char* run_pass(EncoderPass pass, const EncoderProblem& problem, void* stream) {
  return with_instance<T, kWidth>(pass, problem,
                                  [&](auto instance) { return instance.run(problem, stream); });
}

}  // namespace
}  // namespace td3_fast::cuda
