// Query rows as panels of lanes, item tables as tiles, and work spread over threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_native.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "subnormals.h"
#include "tile.h"

namespace td3_fast::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename T>
constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;

// Uninitialised memory for a pass to write. Large ones ask for huge pages, which many systems grant on
// request alone: a gradient of 25 MB is otherwise taken in 6,000 page faults, a fifth of the pass that writes
// it.
inline at::Tensor fresh(at::IntArrayRef sizes, at::ScalarType type) {
  // What at::empty does on the CPU, without its header, which takes longer to compile than most sources.
  const at::Tensor tensor = at::native::empty_cpu(sizes, type);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (data + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (data + tensor.nbytes()) / kHugePage * kHugePage;
  // A refusal changes nothing but speed.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

// So many bytes, uninitialised, aligned to 64 bytes and seen by PyTorch's memory statistics. Those of at most
// a few MiB come from blocks that this thread keeps for its next pass.
std::shared_ptr<void> scratch_block(int64_t bytes);

// Uninitialised memory for as long as a pass takes.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t size)
      : block_(scratch_block(size * static_cast<int64_t>(sizeof(T)))), data_(static_cast<T*>(block_.get())) {}
  T* data() const { return data_; }

 private:
  std::shared_ptr<void> block_;
  T* data_ = nullptr;
};

// A (rows, columns) matrix as [panel][column][lane], with zeros beyond the last row.
template <typename T>
Scratch<T> pack_lanes(const at::Tensor& matrix) {
  constexpr int64_t P = kPanel<T>;
  const int64_t rows = matrix.size(0), columns = matrix.size(1), panels = ceil_div(rows, P);
  const at::Tensor source = matrix.contiguous();
  const T* in = source.const_data_ptr<T>();
  Scratch<T> packed(panels * columns * P);
  T* out = packed.data();
  for (int64_t panel = 0; panel < panels; ++panel, out += columns * P) {
    const int64_t lanes = std::min(P, rows - panel * P);
    if (lanes < P) std::fill(out, out + columns * P, T(0));
    for (int64_t lane = 0; lane < lanes; ++lane, in += columns) {
      for (int64_t column = 0; column < columns; ++column) out[column * P + lane] = in[column];
    }
  }
  return packed;
}

// A (rows, columns) matrix as [column panel][row][lane], with zeros beyond the last column; each row times
// its weight, where weights are given. P lanes to a panel.
template <typename T, int64_t P = kPanel<T>>
Scratch<T> pack_columns(const at::Tensor& matrix, const T* weights = nullptr) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), panels = ceil_div(columns, P);
  const at::Tensor source = matrix.contiguous();
  const T* in = source.const_data_ptr<T>();
  Scratch<T> packed(panels * rows * P);
  T* out = packed.data();
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t lanes = std::min(P, columns - panel * P);
    for (int64_t row = 0; row < rows; ++row, out += P) {
      const T* from = in + row * columns + panel * P;
      if (lanes == P) {  // of a length that is known to the compiler, as most are
        for (int64_t lane = 0; lane < P; ++lane) out[lane] = from[lane];
      } else {
        for (int64_t lane = 0; lane < P; ++lane) out[lane] = lane < lanes ? from[lane] : T(0);
      }
      if (weights == nullptr) continue;
      const T weight = weights[row];
      for (int64_t lane = 0; lane < lanes; ++lane) out[lane] *= weight;
    }
  }
  return packed;
}

// A (rows,) vector as [panel * lane], with `padding` beyond the last row.
template <typename T>
Scratch<T> pack_vector(const at::Tensor& vector, T padding) {
  const int64_t rows = vector.size(0), padded = ceil_div(rows, kPanel<T>) * kPanel<T>;
  const at::Tensor source = vector.contiguous();
  Scratch<T> packed(padded);
  std::copy_n(source.const_data_ptr<T>(), rows, packed.data());
  std::fill(packed.data() + rows, packed.data() + padded, padding);
  return packed;
}

// An item table (n, columns), read tile by tile in the type of the sums. Absent where default constructed.
template <typename T>
class Table {
 public:
  Table() = default;
  explicit Table(const at::Tensor& table)
      : table_(table.contiguous()), columns_(table.size(1)), converts_(table.scalar_type() != kType<T>) {}

  bool present() const { return table_.defined(); }
  int64_t columns() const { return columns_; }

  // Elements of scratch that tile() needs for `items` rows.
  int64_t scratch_size(int64_t items) const { return converts_ ? items * columns_ : 0; }

  // Rows [begin, begin + items), in place where the table has the type already.
  const T* tile(int64_t begin, int64_t items, T* scratch) const {
    if (!present()) return nullptr;
    if (!converts_) return table_.const_data_ptr<T>() + begin * columns_;
    if (table_.scalar_type() == at::kHalf) return convert<at::Half>(begin, items, scratch);
    return convert<at::BFloat16>(begin, items, scratch);
  }

 private:
  template <typename Stored>
  const T* convert(int64_t begin, int64_t items, T* scratch) const {
    const Stored* from = table_.const_data_ptr<Stored>() + begin * columns_;
    for (int64_t i = 0; i < items * columns_; ++i) scratch[i] = static_cast<T>(static_cast<float>(from[i]));
    return scratch;
  }

  at::Tensor table_;
  int64_t columns_ = 0;
  bool converts_ = false;
};

// Items in chunks of nearly equal size. Where sums go over chunks, in their order, these depend on shapes
// alone and never on the number of threads: the sums have the same bits on any number of cores.
struct Chunks {
  int64_t items, count;
  int64_t begin(int64_t chunk) const { return items / count * chunk + std::min(chunk, items % count); }
  int64_t largest() const { return ceil_div(items, count); }
  // The chunk of an item.
  int64_t of(int64_t item) const {
    const int64_t small = items / count, num_large = items % count, of_large = num_large * (small + 1);
    return item < of_large ? item / (small + 1) : num_large + (item - of_large) / small;
  }
};

// Multiply-adds that are worth a thread of their own: below, waking it and waiting for it costs more.
constexpr int64_t kWorkOfThread = int64_t{1} << 19;

// Threads for `tasks` that make `work` multiply-adds in all.
inline int64_t num_workers(int64_t tasks, int64_t work) {
  if (at::in_parallel_region()) return 1;
  return std::clamp<int64_t>(work / kWorkOfThread, 1,
                             std::min<int64_t>(std::max<int64_t>(tasks, 1), at::get_num_threads()));
}

// run(begin, end) for ranges that cover `count`, of `grain` or more, on PyTorch's threads. All that kernels
// do for long is done in here.
template <typename Run>
void over_ranges(int64_t count, int64_t grain, const Run& run) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const SubnormalsAsZero here;
    run(begin, end);
  });
}

// work(task, worker) for every task, each worker taking the next one that is left.
template <typename Work>
void run_tasks(int64_t tasks, int64_t workers, const Work& work) {
  std::atomic<int64_t> next{0};
  over_ranges(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < tasks; task = next++) work(task, worker);
    }
  });
}

}  // namespace td3_fast::cpu
