// The backward pass of one block of rows; see softmax_passes.h.

#include "softmax_passes.h"

namespace td3_fast::cpu {

template <typename T>
void backward(const Rows<T>& r,
              const Tensor& grad_queries,
              const Tensor& grad_keys,
              const Tensor& grad_values,
              bool accumulate_tables) {
  constexpr int64_t P = kPanel<T>;
  const Tile<T>& t = tile<T>();
  const bool sums_rows = grad_keys.defined() || grad_values.defined();
  const Plan plan = make_plan<T>(r.panels(), r.items, r.rank, sums_rows);
  const int64_t step = tile_items(std::max(r.rank, r.width), kTile), slot = step * P;
  const ChunkSums<T> query_sums = grad_queries.defined() ? ChunkSums<T>(plan, r.rank) : ChunkSums<T>();
  // Without values grad_scores = p shift: the query rows take the shift, and p is summed as it is.
  const bool needs_grad = r.values.present() || grad_queries.defined();
  const Scratch<T> query_columns =
      grad_keys.defined() ? pack_columns<T>(r.queries, needs_grad ? nullptr : r.shift.data()) : Scratch<T>();
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
      TileSums<T> to_keys = r.sums_of_tile(grad_keys, begin, count, key_sums, accumulate_tables);
      TileSums<T> to_values = r.sums_of_tile(grad_values, begin, count, value_sums, accumulate_tables);
      for (int64_t group = first; group < last; group += kGroup) {
        const int64_t group_end = std::min(group + kGroup, last);
        for (int64_t panel = group; panel < group_end; ++panel) {
          T* p = p_slots + (panel - group) * slot;
          r.probabilities(panel, begin, count, key, p);
          if (!needs_grad) continue;
          T* grad = grad_slots + (panel - group) * slot;
          t.grad_scores(p, r.value_grads(panel, count, value, w_slot), count, r.shift.data() + panel * P,
                        grad);
          if (grad_queries.defined()) {
            t.product(key, r.rank, Walk::kColumns, r.rank, count, grad, query_sums.at(chunk, panel),
                      r.lanes(panel), true);
          }
        }
        const int64_t group_rows = std::min(group_end * P, r.rows) - group * P;
        if (grad_keys.defined()) {
          to_keys.add(needs_grad ? grad_slots : p_slots, slot, group * P, group_rows, query_columns, r.rows);
        }
        if (grad_values.defined()) to_values.add(p_slots, slot, group * P, group_rows, grad_columns, r.rows);
      }
      to_keys.finish();
      to_values.finish();
    }
  });
  if (grad_queries.defined()) query_sums.write(grad_queries);
}

template void backward(const Rows<float>&, const Tensor&, const Tensor&, const Tensor&, bool);
template void backward(const Rows<double>&, const Tensor&, const Tensor&, const Tensor&, bool);

}  // namespace td3_fast::cpu
