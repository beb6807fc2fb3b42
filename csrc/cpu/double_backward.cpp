// The double backward of one block of rows; see softmax_passes.h.

#include <vector>

#include "softmax_passes.h"

namespace td3_fast::cpu {
namespace {

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
  const Plan plan = make_plan<T>(r.panels(), r.items, kRowSums, false);
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
    T *p = cursor.take(slot), *w_slot = cursor.take(slot);
    T *u_slot = cursor.take(slot), *s_slot = cursor.take(slot);
    for (int64_t begin = plan.chunks.begin(chunk), end = plan.chunks.begin(chunk + 1); begin < end;
         begin += step) {
      const int64_t count = std::min(step, end - begin);
      const TableTiles<T> tables(c, begin, count, step, cursor);
      for (int64_t panel = first; panel < last; ++panel) {
        if (!wanted[panel]) continue;
        r.probabilities(panel, begin, count, tables.key, p);
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

}  // namespace

template <typename T>
Scratch<T> row_means(const Cotangents<T>& c) {
  const int64_t panels = c.r.panels();
  Scratch<T> means(2 * panels * kPanel<T>);
  row_means(c, std::vector<bool>(panels, true), means);
  return means;
}

template <typename T>
ExpectedKeys<T>::ExpectedKeys(const Cotangents<T>& c) : largest(c.r.panels() * P) {
  const Rows<T>& r = c.r;
  const Tile<T>& t = tile<T>();
  const Plan plan = make_plan<T>(r.panels(), r.items, r.rank, false);
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
    T* p = cursor.take(slot);
    for (int64_t begin = plan.chunks.begin(chunk), end = plan.chunks.begin(chunk + 1); begin < end;
         begin += step) {
      const int64_t count = std::min(step, end - begin);
      const TableTiles<T> tables(c, begin, count, step, cursor);
      for (int64_t panel = first; panel < last; ++panel) {
        r.probabilities(panel, begin, count, tables.key, p);
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
  const Plan plan = make_plan<T>(r.panels(), r.items, r.rank + r.width, sums_rows);
  const int64_t step = tile_items(std::max(r.rank, r.width), kTile), slot = step * P;
  const ChunkSums<T> query_sums = grad_queries.defined() ? ChunkSums<T>(plan, r.rank) : ChunkSums<T>();
  const ChunkSums<T> grad_sums = grad_grad_embedding.defined() ? ChunkSums<T>(plan, r.width) : ChunkSums<T>();
  const bool needs_b = grad_queries.defined() || grad_keys.defined();
  const bool adds_grad_grad_keys =
      grad_queries.defined() && c.grad_grad_keys.present() && expected == nullptr;
  const bool grad_to_keys = grad_keys.defined() && c.grad_grad_queries.defined();
  // Without values grad_scores = p shift: the rows of grad_grad_queries take the shift, and p is summed as it
  // is.
  const bool sums_p = grad_to_keys && !adds_grad_grad_keys && !r.values.present();
  const bool needs_grad = adds_grad_grad_keys || (grad_to_keys && !sums_p);
  const bool needs_centred = grad_values.defined() || grad_grad_embedding.defined();
  const Scratch<T> query_columns = grad_keys.defined() ? pack_columns<T>(r.queries) : Scratch<T>();
  const Scratch<T> grad_query_columns =
      grad_to_keys ? pack_columns<T>(c.grad_grad_queries, sums_p ? r.shift.data() : nullptr) : Scratch<T>();
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
      TileSums<T> to_keys = r.sums_of_tile(grad_keys, begin, count, key_sums, accumulate_tables);
      TileSums<T> to_values = r.sums_of_tile(grad_values, begin, count, value_sums, accumulate_tables);
      for (int64_t group = first; group < last; group += kGroup) {
        const int64_t group_end = std::min(group + kGroup, last);
        for (int64_t panel = group; panel < group_end; ++panel) {
          const int64_t lanes = r.lanes(panel), at = (panel - group) * slot;
          T* b = needs_b ? b_slots + at : nullptr;
          T* grad = needs_grad ? grad_slots + at : nullptr;
          T* centred = needs_centred ? centred_slots + at : nullptr;
          T* p = sums_p ? grad_slots + at : p_slot;
          r.probabilities(panel, begin, count, tables.key, p);
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
          if (grad_to_keys) to_keys.add(grad_slots, slot, row, group_rows, grad_query_columns, r.rows);
        }
        if (grad_values.defined()) to_values.add(centred_slots, slot, row, group_rows, grad_columns, r.rows);
      }
      to_keys.finish();
      to_values.finish();
    }
  });
  if (grad_queries.defined()) query_sums.write(grad_queries);
  if (grad_grad_embedding.defined()) grad_sums.write(grad_grad_embedding);
}

template Scratch<float> row_means(const Cotangents<float>&);
template Scratch<double> row_means(const Cotangents<double>&);
template struct ExpectedKeys<float>;
template struct ExpectedKeys<double>;
template Scratch<float> row_means_of_logsumexp(const Cotangents<float>&,
                                               const ExpectedKeys<float>&,
                                               const Tensor&);
template Scratch<double> row_means_of_logsumexp(const Cotangents<double>&,
                                                const ExpectedKeys<double>&,
                                                const Tensor&);
template void double_backward(const Cotangents<float>&,
                              const Scratch<float>&,
                              const ExpectedKeys<float>*,
                              const Tensor&,
                              const Tensor&,
                              const Tensor&,
                              const Tensor&,
                              bool);
template void double_backward(const Cotangents<double>&,
                              const Scratch<double>&,
                              const ExpectedKeys<double>*,
                              const Tensor&,
                              const Tensor&,
                              const Tensor&,
                              const Tensor&,
                              bool);

}  // namespace td3_fast::cpu
