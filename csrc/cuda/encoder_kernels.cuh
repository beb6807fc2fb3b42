// The encoder's kernels of one type; encoder.cuh has the passes.
#pragma once

#include "encoder.cuh"

namespace td3_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kManyThreads = 512;  // where most multiprocessors have nothing to do
constexpr int64_t kFewSequences = 132;

template <typename T, bool kTangents, bool kBackward>
__global__ void __launch_bounds__(kManyThreads)
    encoder_kernel(const __grid_constant__ EncoderProblem problem, int64_t shared_limit) {
  const int64_t block = blockIdx.x;
  Arena arena{
      reinterpret_cast<uintptr_t>(shared_memory<unsigned char>()),
      reinterpret_cast<uintptr_t>(problem.scratch) + static_cast<uintptr_t>(block * problem.scratch_bytes),
      shared_limit};
  SequencePass<T, kTangents, kBackward> pass(problem, &arena);
  pass.run(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), block);
}

bool few(const EncoderProblem& problem) {
  return problem.batch <= kFewSequences;
}

// Of the shared memory of a multiprocessor, all for one block where there are few, else for as many as two.
int64_t shared_limit(const EncoderProblem& problem) {
  const int64_t limit = shared_memory_limit() - 1024;
  return few(problem) ? limit : limit / 2 / 16 * 16;
}

// The instance of the kernel that a pass needs.
template <typename T, bool kTangents, bool kBackward>
struct Instance {
  static Arena count_bytes(const EncoderProblem& problem) {
    Arena arena{0, 0, shared_limit(problem)};
    const SequencePass<T, kTangents, kBackward> pass(problem, &arena);
    return arena;
  }
  static const char* run(const EncoderProblem& problem, void* stream) {
    const Arena arena = count_bytes(problem);
    return launch(encoder_kernel<T, kTangents, kBackward>, dim3(static_cast<unsigned>(problem.blocks)),
                  few(problem) ? kManyThreads : kThreads, arena.shared_used, stream, problem,
                  arena.shared_limit);
  }
};

template <typename T, typename Use>
auto with_instance(EncoderPass pass, const EncoderProblem& problem, const Use& use) {
  const bool tangents = problem.parameters_tangent != nullptr;
  if (pass == EncoderPass::kForward) {
    return tangents ? use(Instance<T, true, false>()) : use(Instance<T, false, false>());
  }
  return tangents ? use(Instance<T, true, true>()) : use(Instance<T, false, true>());
}

template <typename T>
int64_t scratch_of(EncoderPass pass, const EncoderProblem& problem) {
  return with_instance<T>(pass, problem,
                          [&](auto instance) { return instance.count_bytes(problem).global_used; });
}
template <typename T>
const char* run_pass(EncoderPass pass, const EncoderProblem& problem, void* stream) {
  return with_instance<T>(pass, problem, [&](auto instance) { return instance.run(problem, stream); });
}

}  // namespace
}  // namespace td3_fast::cuda
