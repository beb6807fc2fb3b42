// Probabilities that the forward pass of an item logsumexp keeps for its derivatives.
#pragma once

#include "sums.h"

namespace td3_fast::cpu {

using at::Tensor;

// Bytes of what is kept and of the sums of its pass, at most, and at most beyond one and a half times the
// item table: a pass is to take 32 MiB beside its inputs, outputs and gradients, and a tenth of theirs.
constexpr int64_t kKeptBytes = (int64_t{67} << 20) / 2, kKeptBytesBesideTable = int64_t{16} << 20;

// Memory for what is kept, used again once it is freed: one block of this size is met by every training step,
// and new from the system it costs as much as the pass that it saves. At most kKeptBytes wait for their next
// use.
Tensor pooled(int64_t size, at::ScalarType type);

// Of the first `panels` panels of rows the forward pass keeps exp(scores - maximum of the row's chunk), and
// the factors that make probabilities of them once the maxima of all chunks are known: nothing is written
// twice.
template <typename T>
struct Kept {
  static constexpr int64_t P = kPanel<T>;

  int64_t panels = 0;
  Chunks chunks{};
  T* values = nullptr;   // [panel][item][lane]
  T* factors = nullptr;  // [panel][chunk][lane], zero beyond the last row

  bool present() const { return panels > 0; }
  bool holds(int64_t panel) const { return panel < panels; }
  T* tile(int64_t panel, int64_t begin) const { return values + (panel * chunks.items + begin) * P; }
  T* factor(int64_t panel, int64_t chunk) const { return factors + (panel * chunks.count + chunk) * P; }

  // The part of the rows from `row`, a multiple of the panel.
  Kept from_row(int64_t row) const {
    const int64_t left = panels - row / P;
    if (left <= 0) return {};
    return {left, chunks, values + row * chunks.items, factors + row * chunks.count};
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
  const int64_t wanted = std::min(kKeptChunks, num_chunks(items, kSmallestKeptChunk));
  return {items, std::max(wanted, ceil_div(items, kLargestKeptChunk))};
}

// Elements of one panel.
template <typename T>
int64_t kept_panel_size(int64_t items) {
  return kPanel<T> * (items + kept_chunks(items).count);
}

// Panels of `rows` rows that are kept: all, or as many as fit if those are half of them, or none.
template <typename T>
int64_t kept_panels(int64_t rows, const Tensor& table) {
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
  const int64_t items = table.size(0), panels = ceil_div(rows, kPanel<T>);
  const int64_t sums = panels * kPanel<T> * kept_chunks(items).count * table.size(1) * kSize;
  const int64_t beside_table = kKeptBytesBesideTable + static_cast<int64_t>(table.nbytes()) * 3 / 2;
  const int64_t room = std::max<int64_t>(std::min(kKeptBytes, beside_table) - sums, 0);
  const int64_t fitting = std::min(panels, room / (kept_panel_size<T>(items) * kSize));
  return 2 * fitting >= panels ? fitting : 0;
}

// What was kept, if anything.
template <typename T>
Kept<T> kept_in(const Tensor& probabilities, int64_t items) {
  const int64_t panels = probabilities.numel() / kept_panel_size<T>(items);
  if (panels == 0) return {};
  T* const values = probabilities.mutable_data_ptr<T>();
  return {panels, kept_chunks(items), values, values + panels * kPanel<T> * items};
}

}  // namespace td3_fast::cpu
