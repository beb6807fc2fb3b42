// The random words of dropout masks, on the CPU.

#include "random_words.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "../philox.h"
#include "panels.h"

namespace td3_fast::cpu {
namespace {

using at::Tensor;

constexpr int64_t kBlocksPerTask = 4096;
constexpr int64_t kWorkOfBlock = 64;  // in multiply-adds, by which threads are counted

Tensor random_words(const Tensor& seed, int64_t site, int64_t count) {
  check_random_words(seed, site, count);
  const Tensor words = at::empty({count}, seed.options().dtype(at::kShort));
  const uint64_t key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  int16_t* to = words.mutable_data_ptr<int16_t>();
  const int64_t whole = count / kWordsPerBlock, tasks = ceil_div(whole, kBlocksPerTask);
  RandomBlocks* const draw = random_blocks();
  const uint32_t stream = static_cast<uint32_t>(site);
  run_tasks(tasks, num_workers(tasks, whole * kWorkOfBlock), [&](int64_t task, int64_t) {
    const int64_t first = task * kBlocksPerTask;
    draw(key, stream, first, std::min(kBlocksPerTask, whole - first),
         reinterpret_cast<uint32_t*>(to + first * kWordsPerBlock));
  });
  if (const int64_t rest = count - whole * kWordsPerBlock; rest > 0) {
    uint32_t block[4];
    draw(key, stream, whole, 1, block);
    std::memcpy(to + whole * kWordsPerBlock, block, rest * sizeof(int16_t));
  }
  return words;
}

}  // namespace
}  // namespace td3_fast::cpu

TORCH_LIBRARY_IMPL(td3_fast, CPU, m) {
  m.impl("random_words", td3_fast::cpu::random_words);
}
