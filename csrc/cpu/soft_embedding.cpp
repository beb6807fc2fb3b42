// Soft embedding and item logsumexp on the CPU: forward, backward and double backward.
//
// A task owns a range of row panels and a chunk of items. For every tile of items it forms the scores of one
// panel at a time, in cache, and turns them into sums over items (kept per chunk, merged in order) and sums
// over rows (written to the item tables' gradients, which one task owns). Formulas and symbols:
// ops/README.md. The item logsumexp is the case of no values, with the expected item row in the place of the
// embedding.

#include <ATen/TensorOperators.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "panels.h"

namespace td3_fast::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Panels whose tiles are formed before the sums over their rows are taken: the depth of those sums.
constexpr int64_t kGroup = 4;
// Panels that share one pass over a chunk where no sum over rows is asked for.
constexpr int64_t kPanelsPerTask = 32;
constexpr int64_t kTasks = 64, kTasksOfRowSums = 32;
// Elements of a tile of an item table; the derivatives hold several tiles of scores beside it.
constexpr int64_t kForwardTile = 32768, kTile = 8192;
constexpr int64_t kSmallestChunk = 256;
constexpr int64_t kLargestKeptChunk = 1024;
// Scratch of one pass, and the probabilities kept between orders.
constexpr int64_t kScratchBytes = int64_t{16} << 20;
constexpr int64_t kKeptBytes = int64_t{8} << 20;

// Items of a tile: `elements` of the wider table, within bounds.
int64_t tile_items(int64_t columns, int64_t elements) {
  return std::clamp<int64_t>(elements / std::max<int64_t>(columns, 1), 32, elements / 64) / 16 * 16;
}

template <typename T>
int64_t kept_size(int64_t rows, int64_t items) {
  const int64_t size = ceil_div(rows, kPanel<T>) * kPanel<T> * items;
  return size * static_cast<int64_t>(sizeof(T)) <= kKeptBytes ? size : 0;
}

// Sums over items are kept for every chunk and row, `columns` of them: how many fit the scratch.
template <typename T>
int64_t fitting_sums(int64_t columns) {
  return kScratchBytes / (std::max<int64_t>(columns, 1) * static_cast<int64_t>(sizeof(T)));
}

// Rows are taken in blocks of this size, so that scratch stays bounded whatever the number of rows.
template <typename T>
int64_t rows_per_block(int64_t rows, int64_t columns, bool sums_rows) {
  constexpr int64_t P = kPanel<T>;
  const int64_t fitting = fitting_sums<T>(columns) / (sums_rows ? kTasksOfRowSums : 1);
  const int64_t blocks = ceil_div(rows, std::max(fitting, 4 * P));
  return blocks <= 1 ? rows : ceil_div(ceil_div(rows, blocks), P) * P;
}

// The tasks of one pass: ranges of panels times chunks of items.
struct Plan {
  int64_t panels, panels_per_task, ranges;
  Chunks chunks;

  int64_t tasks() const { return ranges * chunks.count; }
};

// With sums over rows a chunk's task takes every panel, since it alone writes the chunk's items.
template <typename T>
Plan make_plan(int64_t panels, int64_t items, int64_t columns, bool sums_rows, int64_t largest_chunk) {
  const int64_t ranges = sums_rows ? 1 : ceil_div(panels, kPanelsPerTask);
  const int64_t tasks = sums_rows ? kTasksOfRowSums : kTasks;
  const int64_t panels_per_task = ceil_div(panels, std::max<int64_t>(ranges, 1));
  const int64_t most =
      std::max<int64_t>(fitting_sums<T>(columns) / std::max<int64_t>(panels * kPanel<T>, 1), 1);
  int64_t count =
      std::min({ceil_div(tasks, std::max<int64_t>(ranges, 1)), most, ceil_div(items, kSmallestChunk)});
  count = std::max({count, ceil_div(items, largest_chunk), int64_t{1}});
  return {panels, panels_per_task, ranges, Chunks{items, count}};
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

  void write(const Tensor& out) const {  // (rows, columns)
    T* rows_out = out.mutable_data_ptr<T>();
    at::parallel_for(0, panels_, kPanelsPerTask, [&](int64_t begin, int64_t end) {
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

// Sums over rows for one tile of an item table, [column panel][item][lane].
template <typename T>
class TileSums {
 public:
  TileSums(T* sums, int64_t columns, int64_t items) : sums_(sums), columns_(columns), items_(items) {
    std::fill_n(sums_, size(columns, items), T(0));
  }
  static int64_t size(int64_t columns, int64_t items) {
    return ceil_div(columns, kPanel<T>) * items * kPanel<T>;
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
      tile<T>().sum_rows(a, a_panel, items_, count, rows.data() + (panel * num_rows + first_row) * P,
                         sums_ + panel * items_ * P, std::min(P, columns_ - panel * P));
    }
  }

  void write(T* table, bool accumulate) const {
    constexpr int64_t P = kPanel<T>;
    for (int64_t item = 0; item < items_; ++item, table += columns_) {
      for (int64_t panel = 0; panel * P < columns_; ++panel) {
        const T* sum = sums_ + (panel * items_ + item) * P;
        T* to = table + panel * P;
        const int64_t lanes = std::min(P, columns_ - panel * P);
        for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = accumulate ? to[lane] + sum[lane] : sum[lane];
      }
    }
  }

 private:
  T* sums_;
  int64_t columns_, items_;
};

// One block of rows. `values` absent: the expected key is the embedding. `embedding` undefined: logsumexp
// alone. `kept`, where given, receives the probabilities as [panel][item][lane].
template <typename T>
void forward(const Tensor& queries,  // (rows, rank)
             const Table<T>& keys,
             const Table<T>& values,
             int64_t items,
             const Tensor& embedding,  // (rows, d)
             const Tensor& logsumexp,  // (rows,)
             const Tensor& remainder,  // (rows,)
             T* kept) {
  constexpr int64_t P = kPanel<T>;
  const Tile<T>& t = tile<T>();
  const int64_t rows = queries.size(0), rank = keys.columns();
  const int64_t width = embedding.defined() ? embedding.size(1) : 0;
  const Plan plan =
      make_plan<T>(ceil_div(rows, P), items, width, false, kept != nullptr ? kLargestKeptChunk : items);
  // Kept probabilities are relative to one maximum per chunk until the merge, so the tile is the chunk.
  const int64_t step =
      kept != nullptr ? plan.chunks.largest() : tile_items(std::max(rank, width), kForwardTile);

  const Scratch<T> packed = pack_lanes<T>(queries);
  const ChunkSums<T> weighted(plan, width), sums(plan, 1), maxima(plan, 1);
  std::fill_n(maxima.at(0, 0), plan.chunks.count * plan.panels * P, -std::numeric_limits<T>::infinity());
  const int64_t key_size = keys.scratch_size(step), value_size = values.scratch_size(step);
  const int64_t score_size = kept != nullptr ? 0 : step * P;
  const int64_t scratch_size = ceil_div(score_size + key_size + value_size, P) * P;
  const int64_t workers = num_workers(plan.tasks(), rows * items * (rank + width));
  const Scratch<T> scratch(workers * scratch_size);

  run_tasks(plan.tasks(), workers, [&](int64_t task, int64_t worker) {
    const int64_t chunk = task / plan.ranges, range = task % plan.ranges;
    const int64_t first = range * plan.panels_per_task,
                  last = std::min(first + plan.panels_per_task, plan.panels);
    T* score_scratch = scratch.data() + worker * scratch_size;
    T* key_scratch = score_scratch + score_size;
    T* value_scratch = key_scratch + key_size;
    for (int64_t begin = plan.chunks.begin(chunk), end = plan.chunks.begin(chunk + 1); begin < end;
         begin += step) {
      const int64_t count = std::min(step, end - begin);
      const T* key = keys.tile(begin, count, key_scratch);
      const T* value = values.present() ? values.tile(begin, count, value_scratch) : key;
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t lanes = lanes_of<T>(rows, panel);
        T* scores = kept != nullptr ? kept + (panel * items + begin) * P : score_scratch;
        T* sum = weighted.at(chunk, panel);
        t.product(key, rank, Walk::kRows, count, rank, packed.data() + panel * rank * P, scores, lanes,
                  false);
        t.online_softmax(scores, count, maxima.at(chunk, panel), sums.at(chunk, panel), sum, width);
        if (width > 0) t.product(value, width, Walk::kColumns, width, count, scores, sum, lanes, true);
      }
    }
  });

  T* logsumexp_out = logsumexp.mutable_data_ptr<T>();
  T* remainder_out = remainder.mutable_data_ptr<T>();
  T* embedding_out = width > 0 ? embedding.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, plan.panels, kPanelsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      alignas(64) T peak[P], factor[P], total[P] = {};
      std::copy_n(maxima.at(0, panel), P, peak);
      for (int64_t chunk = 1; chunk < plan.chunks.count; ++chunk) {
        const T* maximum = maxima.at(chunk, panel);
        for (int64_t lane = 0; lane < P; ++lane)
          peak[lane] = maximum[lane] > peak[lane] ? maximum[lane] : peak[lane];
      }
      T* sum = weighted.at(0, panel);
      for (int64_t chunk = 0; chunk < plan.chunks.count; ++chunk) {
        std::copy_n(maxima.at(chunk, panel), P, factor);
        t.probabilities(factor, 1, peak, nullptr);
        const T *part_sum = sums.at(chunk, panel), *part = weighted.at(chunk, panel);
        for (int64_t lane = 0; lane < P; ++lane) total[lane] += part_sum[lane] * factor[lane];
        for (int64_t column = 0; column < width; ++column) {
          for (int64_t lane = 0; lane < P; ++lane) {
            const int64_t at = column * P + lane;
            sum[at] = part[at] * factor[lane] + (chunk > 0 ? sum[at] : T(0));
          }
        }
      }
      const int64_t lanes = lanes_of<T>(rows, panel);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t row = panel * P + lane;
        const double exact = static_cast<double>(peak[lane]) + std::log(static_cast<double>(total[lane]));
        logsumexp_out[row] = static_cast<T>(exact);
        remainder_out[row] = static_cast<T>(exact - logsumexp_out[row]);
        const T inverse = T(1) / total[lane];
        for (int64_t column = 0; column < width; ++column) {
          embedding_out[row * width + column] = sum[column * P + lane] * inverse;
        }
        total[lane] = inverse;
      }
      // In the place of the sums: what turns each chunk's kept tile into probabilities, zero beyond the last
      // row.
      for (int64_t chunk = 0; kept != nullptr && chunk < plan.chunks.count; ++chunk) {
        std::copy_n(maxima.at(chunk, panel), P, factor);
        t.probabilities(factor, 1, peak, nullptr);
        for (int64_t lane = 0; lane < P; ++lane)
          sums.at(chunk, panel)[lane] = lane < lanes ? factor[lane] * total[lane] : T(0);
      }
    }
  });
  if (kept == nullptr) return;
  run_tasks(plan.chunks.count, workers, [&](int64_t chunk, int64_t) {
    const int64_t begin = plan.chunks.begin(chunk), count = plan.chunks.begin(chunk + 1) - begin;
    for (int64_t panel = 0; panel < plan.panels; ++panel) {
      t.scale(kept + (panel * items + begin) * P, count, sums.at(chunk, panel));
    }
  });
}

// What both orders share: the recomputed probabilities of one block of rows, and its upstream gradients.
template <typename T>
struct Rows {
  static constexpr int64_t P = kPanel<T>;

  int64_t rows, items, rank, width;
  Table<T> keys, values;  // values are absent where no gradient reaches the embedding
  Tensor queries, grad_embedding;
  Scratch<T> queries_lanes, grad_lanes;
  Scratch<T> logsumexp, remainder, shift, inner;  // inner is D
  const T* kept;

  Rows(const Tensor& queries_in,
       const Table<T>& keys_in,
       const Table<T>& values_in,
       int64_t num_items,
       const Tensor& grad_embedding_in,  // undefined for zero
       const Tensor& grad_logsumexp,     // undefined for zero
       const Tensor& embedding,
       const Tensor& logsumexp_in,
       const Tensor& remainder_in,
       const T* kept_in)
      : rows(queries_in.size(0)),
        items(num_items),
        rank(queries_in.size(1)),
        width(embedding.size(1)),
        keys(keys_in),
        queries(queries_in),
        grad_embedding(grad_embedding_in),
        queries_lanes(pack_lanes<T>(queries_in)),
        logsumexp(pack_vector<T>(logsumexp_in, std::numeric_limits<T>::infinity())),
        remainder(pack_vector<T>(remainder_in, T(0))),
        kept(kept_in) {
    const int64_t padded = panels() * P;
    inner = Scratch<T>(padded);
    std::fill_n(inner.data(), padded, T(0));
    if (grad_embedding.defined()) {
      values = values_in;
      grad_lanes = pack_lanes<T>(grad_embedding);
      const Tensor products = at::sum(grad_embedding * embedding, {1});
      std::copy_n(products.const_data_ptr<T>(), rows, inner.data());
    }
    if (grad_logsumexp.defined()) {
      shift = pack_vector<T>(grad_logsumexp, T(0));
    } else {
      shift = Scratch<T>(padded);
      std::fill_n(shift.data(), padded, T(0));
    }
    for (int64_t i = 0; i < padded; ++i) shift.data()[i] -= inner.data()[i];
  }

  int64_t panels() const { return ceil_div(rows, P); }
  int64_t lanes(int64_t panel) const { return lanes_of<T>(rows, panel); }

  // The probabilities of a tile: where they are kept, or made anew in `out`.
  const T* probabilities(int64_t panel, int64_t begin, int64_t count, const T* key, T* out) const {
    if (kept != nullptr) return kept + (panel * items + begin) * P;
    tile<T>().product(key, rank, Walk::kRows, count, rank, queries_lanes.data() + panel * rank * P, out,
                      lanes(panel), false);
    tile<T>().probabilities(out, count, logsumexp.data() + panel * P, remainder.data() + panel * P);
    return out;
  }
  // Elements from one panel's probabilities to the next's, for tiles made `step` items apart.
  int64_t probabilities_panel(int64_t step) const { return (kept != nullptr ? items : step) * P; }

  // w = grad_embedding . value, or null where no gradient reaches the embedding.
  const T* value_grads(int64_t panel, int64_t count, const T* value, T* out) const {
    if (!values.present()) return nullptr;
    tile<T>().product(value, width, Walk::kRows, count, width, grad_lanes.data() + panel * width * P, out,
                      lanes(panel), false);
    return out;
  }
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

template <typename T>
void backward(const Rows<T>& r,
              const Tensor& grad_queries,  // outputs; undefined where not asked for
              const Tensor& grad_keys,
              const Tensor& grad_values,
              bool accumulate_tables) {
  constexpr int64_t P = kPanel<T>;
  const Tile<T>& t = tile<T>();
  const bool sums_rows = grad_keys.defined() || grad_values.defined();
  const Plan plan = make_plan<T>(r.panels(), r.items, r.rank, sums_rows, r.items);
  const int64_t step = tile_items(std::max(r.rank, r.width), kTile), slot = step * P;
  const ChunkSums<T> query_sums = grad_queries.defined() ? ChunkSums<T>(plan, r.rank) : ChunkSums<T>();
  const Scratch<T> query_columns = grad_keys.defined() ? pack_columns<T>(r.queries) : Scratch<T>();
  const Scratch<T> grad_columns = grad_values.defined() ? pack_columns<T>(r.grad_embedding) : Scratch<T>();

  const int64_t scratch_size = (2 * kGroup + 1) * slot + r.keys.scratch_size(step) +
                               r.values.scratch_size(step) + TileSums<T>::size(r.rank, step) +
                               TileSums<T>::size(r.width, step) + 4 * P;
  const int64_t workers = num_workers(plan.tasks(), r.rows * r.items * 2 * (r.rank + r.width));
  const Scratch<T> scratch(workers * scratch_size);
  run_tasks(plan.tasks(), workers, [&](int64_t task, int64_t worker) {
    const int64_t chunk = task / plan.ranges, range = task % plan.ranges;
    const int64_t first = range * plan.panels_per_task,
                  last = std::min(first + plan.panels_per_task, plan.panels);
    Cursor<T> cursor{scratch.data() + worker * scratch_size};
    T* p_slots = cursor.take(kGroup * slot);
    T* grad_slots = cursor.take(kGroup * slot);
    T* w_slot = cursor.take(slot);
    T* key_scratch = cursor.take(r.keys.scratch_size(step));
    T* value_scratch = cursor.take(r.values.scratch_size(step));
    T* key_sums = cursor.take(TileSums<T>::size(r.rank, step));
    T* value_sums = cursor.take(TileSums<T>::size(r.width, step));
    for (int64_t begin = plan.chunks.begin(chunk), end = plan.chunks.begin(chunk + 1); begin < end;
         begin += step) {
      const int64_t count = std::min(step, end - begin);
      const T* key = r.keys.tile(begin, count, key_scratch);
      const T* value = r.values.tile(begin, count, value_scratch);
      TileSums<T> to_keys(key_sums, grad_keys.defined() ? r.rank : 0, count);
      TileSums<T> to_values(value_sums, grad_values.defined() ? r.width : 0, count);
      for (int64_t group = first; group < last; group += kGroup) {
        const int64_t group_end = std::min(group + kGroup, last);
        const T* p_first = nullptr;
        for (int64_t panel = group; panel < group_end; ++panel) {
          const T* p = r.probabilities(panel, begin, count, key, p_slots + (panel - group) * slot);
          if (panel == group) p_first = p;
          T* grad = grad_slots + (panel - group) * slot;
          t.grad_scores(p, r.value_grads(panel, count, value, w_slot), count, r.shift.data() + panel * P,
                        grad);
          if (grad_queries.defined()) {
            t.product(key, r.rank, Walk::kColumns, r.rank, count, grad, query_sums.at(chunk, panel),
                      r.lanes(panel), true);
          }
        }
        const int64_t group_rows = std::min(group_end * P, r.rows) - group * P;
        if (grad_keys.defined()) to_keys.add(grad_slots, slot, group * P, group_rows, query_columns, r.rows);
        if (grad_values.defined()) {
          to_values.add(p_first, r.probabilities_panel(step), group * P, group_rows, grad_columns, r.rows);
        }
      }
      if (grad_keys.defined())
        to_keys.write(grad_keys.mutable_data_ptr<T>() + begin * r.rank, accumulate_tables);
      if (grad_values.defined())
        to_values.write(grad_values.mutable_data_ptr<T>() + begin * r.width, accumulate_tables);
    }
  });
  if (grad_queries.defined()) query_sums.write(grad_queries);
}

// The cotangents of one block of rows, and u and s of a tile.
template <typename T>
struct Cotangents {
  static constexpr int64_t P = kPanel<T>;

  const Rows<T>& r;
  Tensor grad_grad_queries;                   // undefined for zero
  Table<T> grad_grad_keys, grad_grad_values;  // absent for zero
  Scratch<T> query_lanes;

  Cotangents(const Rows<T>& rows,
             const Tensor& grad_grad_queries_in,
             const Table<T>& keys,
             const Table<T>& values)
      : r(rows), grad_grad_queries(grad_grad_queries_in), grad_grad_keys(keys), grad_grad_values(values) {
    if (grad_grad_queries.defined()) query_lanes = pack_lanes<T>(grad_grad_queries);
  }

  int64_t scratch_size(int64_t step) const {
    return r.keys.scratch_size(step) + r.values.scratch_size(step) + grad_grad_keys.scratch_size(step) +
           grad_grad_values.scratch_size(step) + 4 * P;
  }

  void u(int64_t panel, int64_t count, const T* key, const T* grad_grad_key, T* out) const {
    bool accumulate = false;
    if (grad_grad_queries.defined()) {
      tile<T>().product(key, r.rank, Walk::kRows, count, r.rank, query_lanes.data() + panel * r.rank * P, out,
                        r.lanes(panel), false);
      accumulate = true;
    }
    if (grad_grad_keys.present()) {
      tile<T>().product(grad_grad_key, r.rank, Walk::kRows, count, r.rank,
                        r.queries_lanes.data() + panel * r.rank * P, out, r.lanes(panel), accumulate);
      accumulate = true;
    }
    if (!accumulate) std::fill_n(out, count * P, T(0));
  }

  const T* s(int64_t panel, int64_t count, const T* grad_grad_value, T* out) const {
    if (!grad_grad_values.present()) return nullptr;
    tile<T>().product(grad_grad_value, r.width, Walk::kRows, count, r.width,
                      r.grad_lanes.data() + panel * r.width * P, out, r.lanes(panel), false);
    return out;
  }
};

// The tables of one tile, converted where they have to be.
template <typename T>
struct TableTiles {
  const T *key, *value, *grad_grad_key, *grad_grad_value;

  TableTiles(const Cotangents<T>& c, int64_t begin, int64_t count, int64_t step, Cursor<T> cursor)
      : key(c.r.keys.tile(begin, count, cursor.take(c.r.keys.scratch_size(step)))),
        value(c.r.values.tile(begin, count, cursor.take(c.r.values.scratch_size(step)))),
        grad_grad_key(c.grad_grad_keys.tile(begin, count, cursor.take(c.grad_grad_keys.scratch_size(step)))),
        grad_grad_value(
            c.grad_grad_values.tile(begin, count, cursor.take(c.grad_grad_values.scratch_size(step)))) {}
};

// Lane vectors of RowSums, one after the other.
constexpr int64_t kRowSums = 7;

template <typename T>
RowSums<T> row_sums_in(T* sums) {
  constexpr int64_t P = kPanel<T>;
  return {sums, sums + P, sums + 2 * P, sums + 3 * P, sums + 4 * P, sums + 5 * P, sums + 6 * P};
}

// Adds the sums of other items to `into`, relative to the centre of the larger peak.
template <typename T>
void merge(const RowSums<T>& into, const RowSums<T>& from) {
  for (int64_t lane = 0; lane < kPanel<T>; ++lane) {
    const bool higher = from.peak[lane] > into.peak[lane];
    const T centre = higher ? from.centre[lane] : into.centre[lane];
    const T moved_into = into.centre[lane] - centre, moved_from = from.centre[lane] - centre;
    into.u[lane] += moved_into * into.mass[lane] + moved_from * from.mass[lane] + from.u[lane];
    into.covariance[lane] += moved_into * into.w[lane] + moved_from * from.w[lane] + from.covariance[lane];
    into.mass[lane] += from.mass[lane];
    into.w[lane] += from.w[lane];
    into.s[lane] += from.s[lane];
    into.peak[lane] = higher ? from.peak[lane] : into.peak[lane];
    into.centre[lane] = centre;
  }
}

// u_mean and offset of the rows of every panel, or of those where `wanted` is set: means is [2][panel][lane].
template <typename T>
void row_means(const Cotangents<T>& c, const std::vector<bool>& wanted, const Scratch<T>& means) {
  constexpr int64_t P = kPanel<T>;
  const Rows<T>& r = c.r;
  const Plan plan = make_plan<T>(r.panels(), r.items, kRowSums, false, r.items);
  const int64_t step = tile_items(std::max(r.rank, r.width), kTile), slot = step * P;
  const ChunkSums<T> sums(plan, kRowSums);
  const int64_t scratch_size = 4 * slot + c.scratch_size(step);
  const int64_t workers = num_workers(plan.tasks(), r.rows * r.items * 2 * (r.rank + r.width));
  const Scratch<T> scratch(workers * scratch_size);
  run_tasks(plan.tasks(), workers, [&](int64_t task, int64_t worker) {
    const int64_t chunk = task / plan.ranges, range = task % plan.ranges;
    const int64_t first = range * plan.panels_per_task,
                  last = std::min(first + plan.panels_per_task, plan.panels);
    Cursor<T> cursor{scratch.data() + worker * scratch_size};
    T *p_slot = cursor.take(slot), *w_slot = cursor.take(slot);
    T *u_slot = cursor.take(slot), *s_slot = cursor.take(slot);
    for (int64_t begin = plan.chunks.begin(chunk), end = plan.chunks.begin(chunk + 1); begin < end;
         begin += step) {
      const int64_t count = std::min(step, end - begin);
      const TableTiles<T> tables(c, begin, count, step, cursor);
      for (int64_t panel = first; panel < last; ++panel) {
        if (!wanted[panel]) continue;
        const T* p = r.probabilities(panel, begin, count, tables.key, p_slot);
        const T* w = r.value_grads(panel, count, tables.value, w_slot);
        c.u(panel, count, tables.key, tables.grad_grad_key, u_slot);
        const T* s = c.s(panel, count, tables.grad_grad_value, s_slot);
        tile<T>().row_means(p, w, u_slot, s, count, r.inner.data() + panel * P,
                            row_sums_in(sums.at(chunk, panel)));
      }
    }
  });
  for (int64_t panel = 0; panel < plan.panels; ++panel) {
    if (!wanted[panel]) continue;
    const RowSums<T> total = row_sums_in(sums.at(0, panel));
    for (int64_t chunk = 1; chunk < plan.chunks.count; ++chunk)
      merge(total, row_sums_in(sums.at(chunk, panel)));
    T *u_mean = means.data() + panel * P, *offset = u_mean + plan.panels * P;
    for (int64_t lane = 0; lane < P; ++lane) {
      // Lanes beyond the last row have no probability.
      const T from_centre = total.mass[lane] != 0 ? total.u[lane] / total.mass[lane] : T(0);
      u_mean[lane] = total.centre[lane] + from_centre;
      offset[lane] = total.covariance[lane] - from_centre * total.w[lane] + total.s[lane];
    }
  }
}

template <typename T>
Scratch<T> row_means(const Cotangents<T>& c) {
  const int64_t panels = c.r.panels();
  Scratch<T> means(2 * panels * kPanel<T>);
  row_means(c, std::vector<bool>(panels, true), means);
  return means;
}

// The expected row of grad_grad_keys, sum p grad_grad_key, and the largest p of every query row.
template <typename T>
struct ExpectedKeys {
  static constexpr int64_t P = kPanel<T>;

  ChunkSums<T> rows;  // its totals: [panel][column][lane] of the first chunk
  Scratch<T> largest;

  explicit ExpectedKeys(const Cotangents<T>& c) : largest(c.r.panels() * P) {
    const Rows<T>& r = c.r;
    const Tile<T>& t = tile<T>();
    const Plan plan = make_plan<T>(r.panels(), r.items, r.rank, false, r.items);
    const int64_t step = tile_items(r.rank, kForwardTile), slot = step * P;
    rows = ChunkSums<T>(plan, r.rank);
    const ChunkSums<T> largest_of_chunks(plan, 1);
    const int64_t scratch_size = slot + c.scratch_size(step);
    const int64_t workers = num_workers(plan.tasks(), r.rows * r.items * 2 * r.rank);
    const Scratch<T> scratch(workers * scratch_size);
    run_tasks(plan.tasks(), workers, [&](int64_t task, int64_t worker) {
      const int64_t chunk = task / plan.ranges, range = task % plan.ranges;
      const int64_t first = range * plan.panels_per_task,
                    last = std::min(first + plan.panels_per_task, plan.panels);
      Cursor<T> cursor{scratch.data() + worker * scratch_size};
      T* p_slot = cursor.take(slot);
      for (int64_t begin = plan.chunks.begin(chunk), end = plan.chunks.begin(chunk + 1); begin < end;
           begin += step) {
        const int64_t count = std::min(step, end - begin);
        const TableTiles<T> tables(c, begin, count, step, cursor);
        for (int64_t panel = first; panel < last; ++panel) {
          const T* p = r.probabilities(panel, begin, count, tables.key, p_slot);
          t.largest(p, count, largest_of_chunks.at(chunk, panel));
          t.product(tables.grad_grad_key, r.rank, Walk::kColumns, r.rank, count, p, rows.at(chunk, panel),
                    r.lanes(panel), true);
        }
      }
    });
    for (int64_t panel = 0; panel < plan.panels; ++panel) {
      T* const of_panel = largest.data() + panel * P;
      std::fill_n(of_panel, P, T(0));
      for (int64_t chunk = 0; chunk < plan.chunks.count; ++chunk)
        t.largest(largest_of_chunks.at(chunk, panel), 1, of_panel);
      rows.total(panel);
    }
  }

  const T* at(int64_t panel) const { return rows.at(0, panel); }
};

// u_mean of the rows of an item logsumexp, of which `mean` is the expected item. u is linear in the items, so
// its mean is that of two expected rows. Where one item has most of the probability, the difference of u
// there and its mean would be lost to rounding: such panels take the pass over u.
template <typename T>
Scratch<T> row_means_of_logsumexp(const Cotangents<T>& c,
                                  const ExpectedKeys<T>& expected,
                                  const Tensor& mean) {
  constexpr int64_t P = kPanel<T>;
  constexpr T kMost = T(0.5);
  const Rows<T>& r = c.r;
  Scratch<T> means(2 * r.panels() * P);
  std::fill_n(means.data(), 2 * r.panels() * P, T(0));
  const Scratch<T> mean_lanes = pack_lanes<T>(mean);
  std::vector<bool> peaked(r.panels(), false);
  bool any = false;
  for (int64_t panel = 0; panel < r.panels(); ++panel) {
    const int64_t first = panel * r.rank * P;
    for (int64_t lane = 0; lane < r.lanes(panel); ++lane) {
      double sum = 0;
      for (int64_t at = lane; at < r.rank * P; at += P) {
        sum += static_cast<double>(r.queries_lanes.data()[first + at]) * expected.at(panel)[at];
        if (c.grad_grad_queries.defined())
          sum += static_cast<double>(c.query_lanes.data()[first + at]) * mean_lanes.data()[first + at];
      }
      means.data()[panel * P + lane] = static_cast<T>(sum);
      if (expected.largest.data()[panel * P + lane] > kMost) peaked[panel] = any = true;
    }
  }
  if (any) row_means(c, peaked, means);
  return means;
}

// `means` as row_means() gives them. Outputs are undefined where not asked for; `expected` may be null.
template <typename T>
void double_backward(const Cotangents<T>& c,
                     const Scratch<T>& means,
                     const ExpectedKeys<T>* expected,
                     const Tensor& grad_queries,
                     const Tensor& grad_keys,
                     const Tensor& grad_values,
                     const Tensor& grad_grad_embedding,  // the gradient towards grad_embedding
                     bool accumulate_tables) {
  constexpr int64_t P = kPanel<T>;
  const Tile<T>& t = tile<T>();
  const Rows<T>& r = c.r;
  const bool sums_rows = grad_keys.defined() || grad_values.defined();
  const Plan plan = make_plan<T>(r.panels(), r.items, r.rank + r.width, sums_rows, r.items);
  const int64_t step = tile_items(std::max(r.rank, r.width), kTile), slot = step * P;
  const ChunkSums<T> query_sums = grad_queries.defined() ? ChunkSums<T>(plan, r.rank) : ChunkSums<T>();
  const ChunkSums<T> grad_sums = grad_grad_embedding.defined() ? ChunkSums<T>(plan, r.width) : ChunkSums<T>();
  const bool needs_b = grad_queries.defined() || grad_keys.defined();
  const bool adds_grad_grad_keys =
      grad_queries.defined() && c.grad_grad_keys.present() && expected == nullptr;
  const bool needs_grad = adds_grad_grad_keys || (grad_keys.defined() && c.grad_grad_queries.defined());
  const bool needs_centred = grad_values.defined() || grad_grad_embedding.defined();
  const Scratch<T> query_columns = grad_keys.defined() ? pack_columns<T>(r.queries) : Scratch<T>();
  const Scratch<T> grad_query_columns = grad_keys.defined() && c.grad_grad_queries.defined()
                                            ? pack_columns<T>(c.grad_grad_queries)
                                            : Scratch<T>();
  const Scratch<T> grad_columns = grad_values.defined() ? pack_columns<T>(r.grad_embedding) : Scratch<T>();

  const int64_t padded = plan.panels * P;
  const T *u_mean = means.data(), *offset = u_mean + padded;
  for (int64_t panel = 0; expected != nullptr && grad_queries.defined() && panel < plan.panels; ++panel) {
    // sum p (w + shift) grad_grad_key, where there is no w
    const T *from = expected->at(panel), *shift = r.shift.data() + panel * P;
    T* sum = query_sums.at(0, panel);
    for (int64_t i = 0; i < r.rank * P; ++i) sum[i] = shift[i % P] * from[i];
  }

  const int64_t scratch_size = (3 * kGroup + 4) * slot + c.scratch_size(step) +
                               TileSums<T>::size(r.rank, step) + TileSums<T>::size(r.width, step) + 4 * P;
  const int64_t workers = num_workers(plan.tasks(), r.rows * r.items * 2 * (r.rank + r.width));
  const Scratch<T> scratch(workers * scratch_size);
  run_tasks(plan.tasks(), workers, [&](int64_t task, int64_t worker) {
    const int64_t chunk = task / plan.ranges, range = task % plan.ranges;
    const int64_t first = range * plan.panels_per_task,
                  last = std::min(first + plan.panels_per_task, plan.panels);
    Cursor<T> cursor{scratch.data() + worker * scratch_size};
    T* b_slots = cursor.take(kGroup * slot);
    T* grad_slots = cursor.take(kGroup * slot);
    T* centred_slots = cursor.take(kGroup * slot);
    T *p_slot = cursor.take(slot), *w_slot = cursor.take(slot), *u_slot = cursor.take(slot),
      *s_slot = cursor.take(slot);
    T* key_sums = cursor.take(TileSums<T>::size(r.rank, step));
    T* value_sums = cursor.take(TileSums<T>::size(r.width, step));
    for (int64_t begin = plan.chunks.begin(chunk), end = plan.chunks.begin(chunk + 1); begin < end;
         begin += step) {
      const int64_t count = std::min(step, end - begin);
      const TableTiles<T> tables(c, begin, count, step, cursor);
      TileSums<T> to_keys(key_sums, grad_keys.defined() ? r.rank : 0, count);
      TileSums<T> to_values(value_sums, grad_values.defined() ? r.width : 0, count);
      for (int64_t group = first; group < last; group += kGroup) {
        const int64_t group_end = std::min(group + kGroup, last);
        for (int64_t panel = group; panel < group_end; ++panel) {
          const int64_t lanes = r.lanes(panel), at = (panel - group) * slot;
          T* b = needs_b ? b_slots + at : nullptr;
          T* grad = needs_grad ? grad_slots + at : nullptr;
          T* centred = needs_centred ? centred_slots + at : nullptr;
          const T* p = r.probabilities(panel, begin, count, tables.key, p_slot);
          c.u(panel, count, tables.key, tables.grad_grad_key, u_slot);
          t.second_order(p, r.value_grads(panel, count, tables.value, w_slot), u_slot,
                         c.s(panel, count, tables.grad_grad_value, s_slot), count,
                         {r.shift.data() + panel * P, u_mean + panel * P, offset + panel * P}, b, grad,
                         centred);
          if (grad_queries.defined()) {
            T* sum = query_sums.at(chunk, panel);
            t.product(tables.key, r.rank, Walk::kColumns, r.rank, count, b, sum, lanes, true);
            if (adds_grad_grad_keys) {
              t.product(tables.grad_grad_key, r.rank, Walk::kColumns, r.rank, count, grad, sum, lanes, true);
            }
          }
          if (grad_grad_embedding.defined()) {
            T* sum = grad_sums.at(chunk, panel);
            t.product(tables.value, r.width, Walk::kColumns, r.width, count, centred, sum, lanes, true);
            if (c.grad_grad_values.present()) {
              t.product(tables.grad_grad_value, r.width, Walk::kColumns, r.width, count, p, sum, lanes, true);
            }
          }
        }
        const int64_t row = group * P, group_rows = std::min(group_end * P, r.rows) - row;
        if (grad_keys.defined()) {
          to_keys.add(b_slots, slot, row, group_rows, query_columns, r.rows);
          if (needs_grad && c.grad_grad_queries.defined()) {
            to_keys.add(grad_slots, slot, row, group_rows, grad_query_columns, r.rows);
          }
        }
        if (grad_values.defined()) to_values.add(centred_slots, slot, row, group_rows, grad_columns, r.rows);
      }
      if (grad_keys.defined())
        to_keys.write(grad_keys.mutable_data_ptr<T>() + begin * r.rank, accumulate_tables);
      if (grad_values.defined())
        to_values.write(grad_values.mutable_data_ptr<T>() + begin * r.width, accumulate_tables);
    }
  });
  if (grad_queries.defined()) query_sums.write(grad_queries);
  if (grad_grad_embedding.defined()) grad_sums.write(grad_grad_embedding);
}

Tensor undefined_or(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

template <typename T>
Tensor as(const Tensor& tensor) {
  return tensor.defined() ? tensor.to(c10::CppTypeToScalarType<T>::value) : tensor;
}

Tensor rows_of(const Tensor& tensor, int64_t begin, int64_t count) {
  return tensor.defined() ? tensor.narrow(0, begin, count) : tensor;
}

template <typename T>
Tensor output(bool needed, at::IntArrayRef sizes) {
  return needed ? fresh(sizes, options_of<T>()) : Tensor();
}

// What an operator returns for a gradient that was not asked for: an empty tensor.
Tensor result(const Tensor& tensor, const Tensor& like) {
  return tensor.defined() ? tensor.to(like.scalar_type()) : at::empty({0}, like.options());
}

template <typename T>
Table<T> table_or_absent(const Tensor& table) {
  return table.defined() ? Table<T>(table) : Table<T>();
}

// body(begin, count) for every block of rows.
template <typename T, typename Body>
void for_row_blocks(int64_t rows, int64_t columns, bool sums_rows, const Body& body) {
  const int64_t block = rows_per_block<T>(rows, columns, sums_rows);
  for (int64_t begin = 0; begin < rows; begin += block) body(begin, std::min(block, rows - begin));
}

template <typename Run>
auto with_accumulate_type(const Tensor& rows, const Run& run) {
  return accumulate_type(rows) == at::kDouble ? run(double{}) : run(float{});
}

// The part of kept probabilities that belongs to the rows from `begin`, a multiple of the panel.
template <typename T>
T* kept_from(const Tensor& probabilities, int64_t begin, int64_t items) {
  return probabilities.numel() > 0 ? probabilities.mutable_data_ptr<T>() + begin * items : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> soft_embedding_forward(const Tensor& queries,
                                                          const Tensor& keys,
                                                          const Tensor& values) {
  check_soft_embedding(queries, keys, values);
  return with_accumulate_type(queries, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = queries.size(0), width = values.size(1);
    const Tensor rows_in = as<T>(queries);
    const Tensor embedding = output<T>(true, {rows, width}), logsumexp = output<T>(true, {rows});
    const Tensor remainder = output<T>(true, {rows});
    const Table<T> key_table(keys), value_table(values);
    for_row_blocks<T>(rows, width, false, [&](int64_t begin, int64_t count) {
      forward<T>(rows_of(rows_in, begin, count), key_table, value_table, keys.size(0),
                 rows_of(embedding, begin, count), rows_of(logsumexp, begin, count),
                 rows_of(remainder, begin, count), nullptr);
    });
    return std::make_tuple(embedding.to(queries.scalar_type()), logsumexp, remainder);
  });
}

std::tuple<Tensor, Tensor, Tensor> soft_embedding_backward(const OptionalTensor& grad_embedding,
                                                           const OptionalTensor& grad_logsumexp,
                                                           const Tensor& queries,
                                                           const Tensor& keys,
                                                           const Tensor& values,
                                                           const Tensor& embedding,
                                                           const Tensor& logsumexp,
                                                           const Tensor& remainder,
                                                           std::array<bool, 3> needed) {
  check_soft_embedding(queries, keys, values);
  return with_accumulate_type(queries, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = queries.size(0), items = keys.size(0), rank = keys.size(1), width = values.size(1);
    const Tensor grad_x = as<T>(undefined_or(grad_embedding)), grad_l = as<T>(undefined_or(grad_logsumexp));
    const Tensor rows_in = as<T>(queries), embedding_in = as<T>(embedding);
    const Tensor grad_queries = output<T>(needed[0], {rows, rank}),
                 grad_keys = output<T>(needed[1], {items, rank});
    // Without grad_embedding, or without rows, a gradient is zero that no pass below writes.
    Tensor grad_values = output<T>(needed[2] && grad_x.defined(), {items, width});
    const Table<T> key_table(keys), value_table(values);
    for_row_blocks<T>(rows, rank, needed[1] || needed[2], [&](int64_t begin, int64_t count) {
      const Rows<T> block(rows_of(rows_in, begin, count), key_table, value_table, items,
                          rows_of(grad_x, begin, count), rows_of(grad_l, begin, count),
                          rows_of(embedding_in, begin, count), rows_of(logsumexp, begin, count),
                          rows_of(remainder, begin, count), nullptr);
      backward(block, rows_of(grad_queries, begin, count), grad_keys, grad_values, begin > 0);
    });
    if (needed[2] && !grad_x.defined()) grad_values = at::zeros({items, width}, options_of<T>());
    if (rows == 0 && grad_keys.defined()) grad_keys.zero_();
    if (rows == 0 && grad_values.defined()) grad_values.zero_();
    return std::make_tuple(result(grad_queries, queries), result(grad_keys, keys),
                           result(grad_values, values));
  });
}

// Gradients towards queries, keys, values, grad_embedding and grad_logsumexp.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_embedding_double_backward(
    const OptionalTensor& grad_grad_queries,
    const OptionalTensor& grad_grad_keys,
    const OptionalTensor& grad_grad_values,
    const OptionalTensor& grad_embedding,
    const OptionalTensor& grad_logsumexp,
    const Tensor& queries,
    const Tensor& keys,
    const Tensor& values,
    const Tensor& embedding,
    const Tensor& logsumexp,
    const Tensor& remainder,
    std::array<bool, 5> needed) {
  check_soft_embedding(queries, keys, values);
  return with_accumulate_type(queries, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = queries.size(0), items = keys.size(0), rank = keys.size(1), width = values.size(1);
    const Tensor grad_x = as<T>(undefined_or(grad_embedding)), grad_l = as<T>(undefined_or(grad_logsumexp));
    const Tensor grad_grad_q = as<T>(undefined_or(grad_grad_queries));
    const Tensor rows_in = as<T>(queries), embedding_in = as<T>(embedding);
    const bool reaches_values = grad_x.defined();
    const Tensor out_queries = output<T>(needed[0], {rows, rank}),
                 out_keys = output<T>(needed[1], {items, rank});
    Tensor out_values = output<T>(needed[2] && reaches_values, {items, width});
    const Tensor out_grad_x = output<T>(needed[3] && reaches_values, {rows, width});
    const Tensor out_grad_l = output<T>(needed[4], {rows});
    const Table<T> key_table(keys), value_table(values),
        grad_grad_k = table_or_absent<T>(undefined_or(grad_grad_keys));
    const Table<T> grad_grad_v =
        reaches_values ? table_or_absent<T>(undefined_or(grad_grad_values)) : Table<T>();
    for_row_blocks<T>(rows, rank + width, needed[1] || needed[2], [&](int64_t begin, int64_t count) {
      const Rows<T> block(rows_of(rows_in, begin, count), key_table, value_table, items,
                          rows_of(grad_x, begin, count), rows_of(grad_l, begin, count),
                          rows_of(embedding_in, begin, count), rows_of(logsumexp, begin, count),
                          rows_of(remainder, begin, count), nullptr);
      const Cotangents<T> cotangents(block, rows_of(grad_grad_q, begin, count), grad_grad_k, grad_grad_v);
      const Scratch<T> means = row_means(cotangents);
      if (out_grad_l.defined()) std::copy_n(means.data(), count, out_grad_l.mutable_data_ptr<T>() + begin);
      double_backward<T>(cotangents, means, nullptr, rows_of(out_queries, begin, count), out_keys, out_values,
                         rows_of(out_grad_x, begin, count), begin > 0);
    });
    if (needed[2] && !reaches_values) out_values = at::zeros({items, width}, options_of<T>());
    if (rows == 0 && out_keys.defined()) out_keys.zero_();
    if (rows == 0 && out_values.defined()) out_values.zero_();
    return std::make_tuple(result(out_queries, queries), result(out_keys, keys), result(out_values, values),
                           result(out_grad_x, queries), result(out_grad_l, logsumexp));
  });
}

// With `save`, also softmax(hidden items^T) items; with `keep`, while it is small, softmax(hidden items^T) in
// panels.
std::tuple<Tensor, Tensor, Tensor, Tensor> item_logsumexp_forward(const Tensor& hidden,
                                                                  const Tensor& items,
                                                                  bool save,
                                                                  bool keep) {
  check_soft_embedding(hidden, items, items);
  return with_accumulate_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = hidden.size(0), num_items = items.size(0), width = items.size(1);
    const Tensor rows_in = as<T>(hidden);
    const Tensor logsumexp = output<T>(true, {rows}), remainder = output<T>(true, {rows});
    const Tensor mean = output<T>(save, {rows, width});
    const Tensor probabilities = output<T>(true, {save && keep ? kept_size<T>(rows, num_items) : 0});
    const Table<T> table(items);
    for_row_blocks<T>(rows, width, false, [&](int64_t begin, int64_t count) {
      forward<T>(rows_of(rows_in, begin, count), table, Table<T>(), num_items, rows_of(mean, begin, count),
                 rows_of(logsumexp, begin, count), rows_of(remainder, begin, count),
                 kept_from<T>(probabilities, begin, num_items));
    });
    return std::make_tuple(logsumexp, remainder, result(mean, logsumexp), probabilities);
  });
}

std::tuple<Tensor, Tensor> item_logsumexp_backward(const Tensor& grad_logsumexp,
                                                   const Tensor& hidden,
                                                   const Tensor& items,
                                                   const Tensor& logsumexp,
                                                   const Tensor& remainder,
                                                   const Tensor& mean,
                                                   const Tensor& probabilities,
                                                   std::array<bool, 2> needed) {
  check_soft_embedding(hidden, items, items);
  return with_accumulate_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = hidden.size(0), num_items = items.size(0), width = items.size(1);
    // The expected item row is the gradient of the logsumexp.
    const Tensor grad_hidden = needed[0] ? mean * grad_logsumexp.unsqueeze(1) : Tensor();
    const Tensor grad_items = output<T>(needed[1], {num_items, width});
    if (needed[1]) {
      const Tensor rows_in = as<T>(hidden);
      const Table<T> table(items);
      for_row_blocks<T>(rows, width, true, [&](int64_t begin, int64_t count) {
        const Rows<T> block(rows_of(rows_in, begin, count), table, Table<T>(), num_items, Tensor(),
                            rows_of(grad_logsumexp, begin, count), rows_of(mean, begin, count),
                            rows_of(logsumexp, begin, count), rows_of(remainder, begin, count),
                            kept_from<T>(probabilities, begin, num_items));
        backward(block, Tensor(), grad_items, Tensor(), begin > 0);
      });
      if (rows == 0) grad_items.zero_();
    }
    return std::make_tuple(result(grad_hidden, hidden), result(grad_items, items));
  });
}

// Gradients towards grad_logsumexp, hidden and items.
std::tuple<Tensor, Tensor, Tensor> item_logsumexp_double_backward(const OptionalTensor& grad_grad_hidden,
                                                                  const OptionalTensor& grad_grad_items,
                                                                  const Tensor& grad_logsumexp,
                                                                  const Tensor& hidden,
                                                                  const Tensor& items,
                                                                  const Tensor& logsumexp,
                                                                  const Tensor& remainder,
                                                                  const Tensor& mean,
                                                                  const Tensor& probabilities,
                                                                  std::array<bool, 3> needed) {
  check_soft_embedding(hidden, items, items);
  return with_accumulate_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = hidden.size(0), num_items = items.size(0), width = items.size(1);
    const Tensor rows_in = as<T>(hidden), grad_grad_h = as<T>(undefined_or(grad_grad_hidden));
    const Tensor out_grad = output<T>(needed[0], {rows}), out_hidden = output<T>(needed[1], {rows, width});
    const Tensor out_items = output<T>(needed[2], {num_items, width});
    const Table<T> table(items), grad_grad_table = table_or_absent<T>(undefined_or(grad_grad_items));
    for_row_blocks<T>(rows, 2 * width, needed[2], [&](int64_t begin, int64_t count) {
      const Rows<T> block(rows_of(rows_in, begin, count), table, Table<T>(), num_items, Tensor(),
                          rows_of(grad_logsumexp, begin, count), rows_of(mean, begin, count),
                          rows_of(logsumexp, begin, count), rows_of(remainder, begin, count),
                          kept_from<T>(probabilities, begin, num_items));
      const Cotangents<T> cotangents(block, rows_of(grad_grad_h, begin, count), grad_grad_table, Table<T>());
      Scratch<T> means;
      std::optional<ExpectedKeys<T>> expected;
      if (grad_grad_table.present()) {
        expected.emplace(cotangents);
        means = row_means_of_logsumexp(cotangents, *expected, rows_of(mean, begin, count));
      } else {
        // The mean of u = grad_grad_hidden . item is known: one pass suffices.
        const int64_t padded = block.panels() * kPanel<T>;
        means = Scratch<T>(2 * padded);
        std::fill_n(means.data(), 2 * padded, T(0));
        if (grad_grad_h.defined()) {
          const Tensor products =
              at::sum(rows_of(grad_grad_h, begin, count) * rows_of(mean, begin, count), {1});
          std::copy_n(products.template const_data_ptr<T>(), count, means.data());
        }
      }
      if (out_grad.defined())
        std::copy_n(means.data(), count, out_grad.template mutable_data_ptr<T>() + begin);
      if (out_hidden.defined() || out_items.defined()) {
        double_backward<T>(cotangents, means, expected ? &*expected : nullptr,
                           rows_of(out_hidden, begin, count), out_items, Tensor(), Tensor(), begin > 0);
      }
    });
    if (rows == 0 && out_items.defined()) out_items.zero_();
    return std::make_tuple(result(out_grad, logsumexp), result(out_hidden, hidden), result(out_items, items));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(td3_fast, CPU, m) {
  m.impl("soft_embedding_forward", soft_embedding_forward);
  m.impl("soft_embedding_backward", soft_embedding_backward);
  m.impl("soft_embedding_double_backward", soft_embedding_double_backward);
  m.impl("item_logsumexp_forward", item_logsumexp_forward);
  m.impl("item_logsumexp_backward", item_logsumexp_backward);
  m.impl("item_logsumexp_double_backward", item_logsumexp_double_backward);
}

}  // namespace td3_fast::cpu
