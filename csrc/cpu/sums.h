// Sums over items and over rows, and how a pass over both is cut into tasks.
//
// A task owns a range of row panels and a chunk of items. For every tile of items it forms the scores of one
// panel at a time, in cache, and turns them into sums over items (kept per chunk, merged in order) and sums
// over rows (written to the item tables' gradients, which one task owns). Formulas and symbols:
// ops/README.md.
#pragma once

#include <limits>

#include "panels.h"

namespace td3_fast::cpu {

// Panels whose tiles are formed before the sums over their rows are taken: the depth of those sums.
constexpr int64_t kGroup = 8;
// Panels that share one pass over a chunk where no sum over rows is asked for.
constexpr int64_t kPanelsPerTask = 32;
constexpr int64_t kTasks = 128, kTasksOfRowSums = 32;
// Elements of a tile of an item table; the derivatives hold several tiles of scores beside it.
constexpr int64_t kForwardTile = 32768, kTile = 8192;
constexpr int64_t kSmallestChunk = 256;
// Scratch of one pass.
constexpr int64_t kScratchBytes = int64_t{16} << 20;

// Chunks of so many items or a little fewer. Several are a multiple of four, so that two or four threads have
// as many each.
inline int64_t num_chunks(int64_t items, int64_t smallest) {
  const int64_t count = ceil_div(items, smallest);
  return count > 2 ? ceil_div(count, 4) * 4 : count;
}

// Items of a tile: `elements` of the wider table, within bounds.
inline int64_t tile_items(int64_t columns, int64_t elements) {
  return std::clamp<int64_t>(elements / std::max<int64_t>(columns, 1), 32, elements / 64) / 16 * 16;
}

// Sums over items are kept for every chunk and row, `columns` of them: how many fit the scratch.
template <typename T>
int64_t fitting_sums(int64_t columns) {
  return kScratchBytes / (std::max<int64_t>(columns, 1) * static_cast<int64_t>(sizeof(T)));
}

// The tasks of one pass: ranges of panels times chunks of items.
struct Plan {
  int64_t panels, panels_per_task, ranges;
  Chunks chunks;

  int64_t tasks() const { return ranges * chunks.count; }
};

// With sums over rows a chunk's task takes every panel, since it alone writes the chunk's items.
template <typename T>
Plan make_plan(int64_t panels, int64_t items, int64_t columns, bool sums_rows) {
  const int64_t ranges = sums_rows ? 1 : ceil_div(panels, kPanelsPerTask);
  const int64_t tasks = sums_rows ? kTasksOfRowSums : kTasks;
  const int64_t panels_per_task = ceil_div(panels, std::max<int64_t>(ranges, 1));
  const int64_t most =
      std::max<int64_t>(fitting_sums<T>(columns) / std::max<int64_t>(panels * kPanel<T>, 1), 1);
  const int64_t count =
      std::min({ceil_div(tasks, std::max<int64_t>(ranges, 1)), most, num_chunks(items, kSmallestChunk)});
  return {panels, panels_per_task, ranges, Chunks{items, std::max<int64_t>(count, 1)}};
}

template <typename T>
int64_t lanes_of(int64_t rows, int64_t panel) {
  return std::min(kPanel<T>, rows - panel * kPanel<T>);
}

// Sums over items of one chunk for every panel, [chunk][panel][columns][lane], merged in the order of chunks.
template <typename T>
class ChunkSums {
 public:
  ChunkSums() = default;
  ChunkSums(const Plan& plan, int64_t columns)
      : columns_(columns),
        panels_(plan.panels),
        chunks_(plan.chunks.count),
        sums_(chunks_ * panels_ * columns * kPanel<T>) {
    std::fill_n(sums_.data(), chunks_ * panels_ * columns * kPanel<T>, T(0));
  }
  T* at(int64_t chunk, int64_t panel) const {
    return sums_.data() + (chunk * panels_ + panel) * columns_ * kPanel<T>;
  }

  // The total of one panel, left in the first chunk.
  T* total(int64_t panel) const {
    T* sum = at(0, panel);
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      const T* part = at(chunk, panel);
      for (int64_t i = 0; i < columns_ * kPanel<T>; ++i) sum[i] += part[i];
    }
    return sum;
  }

  void write(const at::Tensor& out) const {  // (rows, columns)
    T* rows_out = out.mutable_data_ptr<T>();
    over_ranges(panels_, kPanelsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const T* sum = total(panel);
        T* to = rows_out + panel * kPanel<T> * columns_;
        for (int64_t lane = 0; lane < lanes_of<T>(out.size(0), panel); ++lane) {
          for (int64_t column = 0; column < columns_; ++column) *to++ = sum[column * kPanel<T> + lane];
        }
      }
    });
  }

 private:
  int64_t columns_ = 0, panels_ = 0, chunks_ = 0;
  Scratch<T> sums_;
};

// Sums over rows for one tile of a gradient towards an item table: written in place, but for columns that do
// not fill a panel, which wait in scratch.
template <typename T>
class TileSums {
 public:
  TileSums(T* table, int64_t columns, int64_t items, T* scratch, bool accumulate)
      : table_(table), columns_(columns), items_(items), scratch_(scratch), accumulate_(accumulate) {}

  // Elements of scratch.
  static int64_t size(int64_t columns, int64_t items) {
    return columns % kPanel<T> > 0 ? items * kPanel<T> : 0;
  }

  // Adds sum_row a[row][item] rows[row][column]; rows are packed by columns, num_rows to a column panel.
  void add(const T* a,
           int64_t a_panel,
           int64_t first_row,
           int64_t count,
           const Scratch<T>& rows,
           int64_t num_rows) {
    constexpr int64_t P = kPanel<T>;
    for (int64_t panel = 0; panel * P < columns_; ++panel) {
      const int64_t lanes = std::min(P, columns_ - panel * P);
      const bool whole = lanes == P;
      tile<T>().sum_rows(a, a_panel, items_, count, rows.data() + (panel * num_rows + first_row) * P,
                         whole ? table_ + panel * P : scratch_, whole ? columns_ : P, lanes,
                         added_ || (whole && accumulate_));
    }
    added_ = true;
  }

  // To be called after the last add.
  void finish() const {
    constexpr int64_t P = kPanel<T>;
    const int64_t lanes = columns_ % P;
    T* to = table_ + columns_ - lanes;
    for (int64_t item = 0; lanes > 0 && item < items_; ++item, to += columns_) {
      const T* sum = scratch_ + item * P;
      for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = accumulate_ ? to[lane] + sum[lane] : sum[lane];
    }
  }

 private:
  T* table_;
  int64_t columns_, items_;
  T* scratch_;
  bool accumulate_, added_ = false;
};

// Bump allocation from one worker's share of scratch.
template <typename T>
struct Cursor {
  T* at;
  T* take(int64_t size) {
    T* taken = at;
    at += ceil_div(size, kPanel<T>) * kPanel<T>;
    return taken;
  }
};

}  // namespace td3_fast::cpu
