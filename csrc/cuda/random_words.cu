// The random words of dropout masks: a thread for each block of Philox. The seed is read on the device, so
// that a captured graph draws by the seed that lies there when it is replayed.

#include "../philox.h"
#include "device.cuh"
#include "kernels.h"

namespace td3_fast::cuda {
namespace {

constexpr int kThreads = 256;

struct alignas(16) Block {
  uint32_t words[4];
};

__global__ void __launch_bounds__(kThreads) random_words_kernel(RandomWords problem) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= problem.ends[problem.sites - 1]) return;
  int64_t first = 0;  // block of the site
  int site = 0;
  while (at >= problem.ends[site]) first = problem.ends[site++];
  Block block;
  philox(static_cast<uint64_t>(*problem.seed), problem.first_site + site, static_cast<uint64_t>(at - first),
         block.words);
  static_cast<Block*>(problem.blocks)[at] = block;
}

}  // namespace

const char* draw_words(const RandomWords& problem, void* stream) {
  const dim3 grid(static_cast<unsigned>((problem.ends[problem.sites - 1] + kThreads - 1) / kThreads));
  return launch(random_words_kernel, grid, kThreads, 0, stream, problem);
}

}  // namespace td3_fast::cuda
