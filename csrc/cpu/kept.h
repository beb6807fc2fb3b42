// Probabilities that the forward pass of an item logsumexp keeps for its derivatives.
#pragma once

#include "sums.h"

namespace td3_fast::cpu {

using at::Tensor;

// Bytes that are kept at most, and at most beyond one and a half times the item table: a derivative also
// writes a table, so that all of it stays within what a caller's tensors take.
constexpr int64_t kKeptBytes = int64_t{48} << 20, kKeptBytesBesideTable = int64_t{16} << 20;

// Memory for what is kept, used again once it is freed: one block of this size is met by every training step,
// and new from the system it costs as much as the pass that it saves. At most kKeptBytes wait for their next
// use.
Tensor pooled(int64_t size, const at::TensorOptions& options);

// The forward pass keeps exp(scores - maximum of the row's chunk), and the factors that make probabilities of
// them once the maxima of all chunks are known: nothing is written twice.
template <typename T>
struct Kept {
  static constexpr int64_t P = kPanel<T>;

  Chunks chunks{};
  T* values = nullptr;   // [panel][item][lane]
  T* factors = nullptr;  // [panel][chunk][lane], zero beyond the last row

  bool present() const { return values != nullptr; }
  T* tile(int64_t panel, int64_t begin) const { return values + (panel * chunks.items + begin) * P; }
  T* factor(int64_t panel, int64_t chunk) const { return factors + (panel * chunks.count + chunk) * P; }

  // The part of the rows from `row`, a multiple of the panel.
  Kept from_row(int64_t row) const {
    if (!present()) return {};
    return {chunks, values + row * chunks.items, factors + row * chunks.count};
  }

  void probabilities(int64_t panel, int64_t begin, int64_t count, T* out) const {
    for (int64_t chunk = chunks.of(begin), end = begin + count; begin < end; ++chunk) {
      const int64_t items = std::min(end, chunks.begin(chunk + 1)) - begin;
      cpu::tile<T>().scale(tile(panel, begin), items, factor(panel, chunk), out);
      begin += items;
      out += items * P;
    }
  }
};

// Chunks of what is kept: enough for all threads, and small enough for a chunk's scores to stay in cache.
constexpr int64_t kKeptChunks = 64, kSmallestKeptChunk = 256, kLargestKeptChunk = 1024;

inline Chunks kept_chunks(int64_t items) {
  const int64_t wanted = std::min(kKeptChunks, ceil_div(items, kSmallestKeptChunk));
  return {items, std::max(wanted, ceil_div(items, kLargestKeptChunk))};
}

// Elements that the probabilities of `rows` take, or zero where they are too many to be kept.
template <typename T>
int64_t kept_size(int64_t rows, const Tensor& table) {
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
  const int64_t items = table.size(0), padded = ceil_div(rows, kPanel<T>) * kPanel<T>;
  const int64_t count = kept_chunks(items).count, size = padded * (items + count);
  const int64_t beside_table = kKeptBytesBesideTable + static_cast<int64_t>(table.nbytes()) * 3 / 2;
  const bool fits = size * kSize <= std::min(kKeptBytes, beside_table) &&
                    padded * count * table.size(1) * kSize <= kScratchBytes;
  return fits ? size : 0;
}

// What was kept for `rows` rows, if anything.
template <typename T>
Kept<T> kept_in(const Tensor& probabilities, int64_t rows, int64_t items) {
  if (probabilities.numel() == 0) return {};
  T* const values = probabilities.mutable_data_ptr<T>();
  return {kept_chunks(items), values, values + ceil_div(rows, kPanel<T>) * kPanel<T> * items};
}

}  // namespace td3_fast::cpu
