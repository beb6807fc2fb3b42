// The random words of dropout masks, on the CPU.

#include "random_words.h"

#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "../philox.h"
#include "panels.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

constexpr int64_t kBlocksPerTask = 4096;
constexpr int64_t kWorkOfBlock = 64;  // in multiply-adds, by which threads are counted

uint64_t key_of(const Tensor& seed) {
  return static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
}

// The first `blocks` blocks of a site.
void draw_blocks(uint64_t key, int64_t site, int64_t blocks, int16_t* to) {
  const int64_t tasks = ceil_div(blocks, kBlocksPerTask);
  RandomBlocks* const draw = random_blocks();
  run_tasks(tasks, num_workers(tasks, blocks * kWorkOfBlock), [&](int64_t task, int64_t) {
    const int64_t first = task * kBlocksPerTask;
    draw(key, static_cast<uint32_t>(site), first, std::min(kBlocksPerTask, blocks - first),
         reinterpret_cast<uint32_t*>(to + first * kWordsPerBlock));
  });
}

}  // namespace

Tensor random_words(const Tensor& seed, int64_t site, int64_t count) {
  check_random_words(seed, site, count);
  const Tensor words = seed.new_empty({count}, at::kShort);
  int16_t* to = words.mutable_data_ptr<int16_t>();
  const int64_t whole = count / kWordsPerBlock;
  draw_blocks(key_of(seed), site, whole, to);
  if (const int64_t rest = count - whole * kWordsPerBlock; rest > 0) {
    uint32_t block[4];
    random_blocks()(key_of(seed), static_cast<uint32_t>(site), whole, 1, block);
    std::memcpy(to + whole * kWordsPerBlock, block, rest * sizeof(int16_t));
  }
  return words;
}

Tensor random_words_of_sites(const Tensor& seed, int64_t first_site, at::IntArrayRef counts) {
  const int64_t all = check_random_words(seed, first_site, counts);
  const Tensor words = seed.new_empty({all * kWordsPerBlock}, at::kShort);
  int16_t* to = words.mutable_data_ptr<int16_t>();
  int64_t site = first_site;
  for (const int64_t count : counts) {
    const int64_t blocks = blocks_of_words(count);
    draw_blocks(key_of(seed), site++, blocks, to);
    to += blocks * kWordsPerBlock;
  }
  return words;
}

}  // namespace td3_fast::cpu
