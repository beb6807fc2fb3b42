// Blocks of scratch that a thread keeps from one pass to the next.
#include <ATen/Context.h>

#include <algorithm>
#include <vector>

#include "panels.h"

namespace td3_fast::cpu {

namespace {

// A block that is given back between what is kept of one step and of the next leaves a hole that other sizes
// break up: over a hundred steps of a differentiated window holes took several times what is kept.
class Blocks {
 public:
  at::Tensor take(int64_t bytes) {
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      const int64_t size = bytes_of(*block);
      if (size >= bytes && (best == free_.end() || size < bytes_of(*best))) best = block;
    }
    if (best == free_.end()) {
      const int64_t rounded = ceil_div(bytes, kGrain) * kGrain;
      make_room(rounded);
      return fresh({rounded}, at::kByte);
    }
    const at::Tensor found = *best;
    free_.erase(best);
    return found;
  }

  void give(const at::Tensor& block) {
    make_room(bytes_of(block));
    free_.push_back(block);
  }

  static bool serves(int64_t bytes) { return bytes >= kSmallest && bytes <= kKept - kGrain; }

 private:
  static constexpr int64_t kSmallest = int64_t{32} << 10;  // below, the allocator has lists of its own
  static constexpr int64_t kGrain = int64_t{64} << 10;
  static constexpr int64_t kKept = int64_t{8} << 20;

  static int64_t bytes_of(const at::Tensor& block) { return block.numel(); }

  // The oldest go first.
  void make_room(int64_t bytes) {
    int64_t total = bytes;
    for (const at::Tensor& block : free_) total += bytes_of(block);
    auto first = free_.begin();
    for (; total > kKept && first != free_.end(); ++first) total -= bytes_of(*first);
    free_.erase(free_.begin(), first);
  }

  std::vector<at::Tensor> free_;
};

Blocks& blocks() {
  static thread_local Blocks blocks;
  return blocks;
}

}  // namespace

std::shared_ptr<void> scratch_block(int64_t bytes) {
  if (bytes == 0) return nullptr;
  // Where PyTorch is to fill what is not initialised, every block is a new one, so that tests see what is
  // not.
  const bool kept = Blocks::serves(bytes) && !at::globalContext().deterministicAlgorithms();
  at::Tensor block = kept ? blocks().take(bytes) : fresh({bytes}, at::kByte);
  void* data = block.mutable_data_ptr();
  return {data, [block, kept](void*) {
            if (kept) blocks().give(block);
          }};
}

}  // namespace td3_fast::cpu
