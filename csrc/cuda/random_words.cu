// The random words of dropout masks: a thread for each block of Philox. The seed is read on the device, so
// that a captured graph draws by the seed that lies there when it is replayed.

#include "../philox.h"
#include "device.cuh"
#include "kernels.h"

namespace td3_fast::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) random_words_kernel(RandomWords problem) {
  const int64_t block = int64_t{blockIdx.x} * kThreads + threadIdx.x, first = block * kWordsPerBlock;
  if (first >= problem.count) return;
  uint32_t words[4];
  philox(static_cast<uint64_t>(*problem.seed), problem.site, static_cast<uint64_t>(block), words);
  for (int i = 0; i < kWordsPerBlock && first + i < problem.count; ++i) {
    problem.words[first + i] = static_cast<int16_t>(words[i / 2] >> (16 * (i % 2)));
  }
}

}  // namespace

const char* draw_words(const RandomWords& problem, void* stream) {
  const int64_t blocks = (problem.count + kWordsPerBlock - 1) / kWordsPerBlock;
  const dim3 grid(static_cast<unsigned>((blocks + kThreads - 1) / kThreads));
  return launch(random_words_kernel, grid, kThreads, 0, stream, problem);
}

}  // namespace td3_fast::cuda
