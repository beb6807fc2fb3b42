// The memory of kept probabilities.

#include "kept.h"

#include <ATen/ops/from_blob.h>

#include <mutex>
#include <vector>

namespace td3_fast::cpu {
namespace {

class Pool {
 public:
  // A block of at least `bytes` and at most a quarter more.
  at::Tensor take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = free_.begin(); block != free_.end(); ++block) {
        if (block->numel() < bytes || block->numel() > bytes + bytes / 4) continue;
        const at::Tensor taken = *block;
        free_.erase(block);
        return taken;
      }
    }
    return fresh({bytes}, at::kByte);
  }

  // Blocks that wait longest make room.
  void give(const at::Tensor& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    int64_t bytes = 0;
    for (const at::Tensor& waiting : free_) bytes += waiting.numel();
    while (bytes > kKeptBytes) {
      bytes -= free_.front().numel();
      free_.erase(free_.begin());
    }
  }

 private:
  std::mutex mutex_;
  std::vector<at::Tensor> free_;
};

}  // namespace

at::Tensor pooled(int64_t size, at::ScalarType type) {
  constexpr int64_t kSmall = int64_t{1} << 20;  // an allocator has these at hand
  const int64_t bytes = size * static_cast<int64_t>(c10::elementSize(type));
  if (bytes < kSmall) return fresh({size}, type);
  static Pool* const pool = new Pool;  // never destroyed: tensors may outlive it
  const at::Tensor block = pool->take(bytes);
  return at::from_blob(block.mutable_data_ptr(), {size}, [block](void*) { pool->give(block); }, type);
}

}  // namespace td3_fast::cpu
