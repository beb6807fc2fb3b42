// The forward pass of one block of rows; see softmax_passes.h.

#include <cmath>

#include "softmax_passes.h"

namespace td3_fast::cpu {

template <typename T>
void forward(const Tensor& queries,  // (rows, rank)
             const Table<T>& keys,
             const Table<T>& values,
             int64_t items,
             const Tensor& embedding,  // (rows, d)
             const Tensor& logsumexp,  // (rows,)
             const Tensor& remainder,  // (rows,)
             const Kept<T>& kept) {
  constexpr int64_t P = kPanel<T>;
  const Tile<T>& t = tile<T>();
  const int64_t rows = queries.size(0), rank = keys.columns();
  const int64_t width = embedding.defined() ? embedding.size(1) : 0;
  Plan plan = make_plan<T>(ceil_div(rows, P), items, width, false);
  int64_t step = tile_items(std::max(rank, width), kForwardTile);
  if (kept.present()) {
    plan.chunks = kept.chunks;
    step = plan.chunks.largest();  // what is kept of a chunk is relative to one maximum
  }

  const Scratch<T> packed = pack_lanes<T>(queries);
  const ChunkSums<T> weighted(plan, width), sums(plan, 1), maxima(plan, 1);
  std::fill_n(maxima.at(0, 0), plan.chunks.count * plan.panels * P, -std::numeric_limits<T>::infinity());
  const int64_t key_size = keys.scratch_size(step), value_size = values.scratch_size(step);
  const int64_t score_size = kept.holds(plan.panels - 1) ? 0 : step * P;
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
        T* scores = kept.holds(panel) ? kept.tile(panel, begin) : score_scratch;
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
  over_ranges(plan.panels, kPanelsPerTask, [&](int64_t begin, int64_t end) {
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
        t.add_scaled(part, width, factor, sum, chunk == 0);
      }
      const int64_t lanes = lanes_of<T>(rows, panel);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t row = panel * P + lane;
        const double exact = static_cast<double>(peak[lane]) + std::log(static_cast<double>(total[lane]));
        // what a score differs from an infinite one is no number
        const bool infinite = std::isinf(peak[lane]);
        logsumexp_out[row] = infinite ? peak[lane] : static_cast<T>(exact);
        remainder_out[row] = infinite ? T(0) : static_cast<T>(exact - logsumexp_out[row]);
        const T inverse = T(1) / total[lane];
        for (int64_t column = 0; column < width; ++column) {
          embedding_out[row * width + column] = sum[column * P + lane] * inverse;
        }
        total[lane] = inverse;
      }
      for (int64_t chunk = 0; kept.holds(panel) && chunk < plan.chunks.count; ++chunk) {
        std::copy_n(maxima.at(chunk, panel), P, factor);
        t.probabilities(factor, 1, peak, nullptr);
        T* to_probabilities = kept.factor(panel, chunk);
        for (int64_t lane = 0; lane < P; ++lane)
          to_probabilities[lane] = lane < lanes ? factor[lane] * total[lane] : T(0);
      }
    }
  });
}

template void forward<float>(const Tensor&,
                             const Table<float>&,
                             const Table<float>&,
                             int64_t,
                             const Tensor&,
                             const Tensor&,
                             const Tensor&,
                             const Kept<float>&);
template void forward<double>(const Tensor&,
                              const Table<double>&,
                              const Table<double>&,
                              int64_t,
                              const Tensor&,
                              const Tensor&,
                              const Tensor&,
                              const Kept<double>&);

}  // namespace td3_fast::cpu
