// Blocks of scratch that a thread keeps from one pass to the next.
#include <ATen/Context.h>

#include <utility>
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
      if (block->bytes >= bytes && (best == free_.end() || block->bytes < best->bytes)) best = block;
    }
    if (best == free_.end()) {
      const int64_t rounded = ceil_div(bytes, kGrain) * kGrain;
      make_room(rounded);
      return fresh({rounded}, at::kByte);
    }
    const at::Tensor found = std::move(best->memory);
    total_ -= best->bytes;
    free_.erase(best);
    return found;
  }

  void give(const at::Tensor& block) {
    make_room(block.numel());
    free_.push_back({block.numel(), block});
    total_ += block.numel();
  }

  static bool serves(int64_t bytes) { return bytes >= kSmallest && bytes <= kKept - kGrain; }

 private:
  static constexpr int64_t kSmallest = int64_t{32} << 10;  // below, the allocator has lists of its own
  static constexpr int64_t kGrain = int64_t{64} << 10;
  static constexpr int64_t kKept = int64_t{8} << 20;

  struct Block {
    int64_t bytes;
    at::Tensor memory;
  };

  // The oldest go first.
  void make_room(int64_t bytes) {
    auto first = free_.begin();
    for (; total_ + bytes > kKept && first != free_.end(); ++first) total_ -= first->bytes;
    free_.erase(free_.begin(), first);
  }

  std::vector<Block> free_;
  int64_t total_ = 0;  // bytes that are free
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
