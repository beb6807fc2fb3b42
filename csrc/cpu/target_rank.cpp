// Rank of a target among all items, or among given candidates, on the CPU.
//
// The full ranking streams tiles of scores, as soft_embedding.cpp does, and keeps one count per row. What a
// row leaves out is read off the same tile of scores and taken back. Every score, the target's own included,
// is a sum in one order, so equal embeddings tie exactly.

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "panels.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

constexpr int64_t kTileItems = 128;
constexpr int64_t kPanelsPerTask = 16;
constexpr int64_t kSmallestChunk = 1024;
constexpr int64_t kTasks = 32;

void check_ids(const int64_t* ids, int64_t count, int64_t items, const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(0 <= ids[i] && ids[i] < items, what, " ", ids[i], " is not one of ", items, " items");
  }
}

// What each row leaves out: its target, its excluded items and the padding item, sorted and without repeats.
struct LeftOut {
  std::vector<int64_t> offsets, items;

  LeftOut(const Tensor& target,
          const Tensor& row_offsets,
          const Tensor& row_items,
          int64_t num_items,
          bool padding) {
    const int64_t rows = target.size(0);
    const int64_t* targets = target.const_data_ptr<int64_t>();
    const int64_t* starts = row_offsets.defined() ? row_offsets.const_data_ptr<int64_t>() : nullptr;
    const int64_t* excluded = row_items.defined() ? row_items.const_data_ptr<int64_t>() : nullptr;
    if (starts != nullptr) {
      check_ids(excluded, row_items.size(0), num_items, "excluded item");
      TORCH_CHECK_VALUE(starts[0] == 0 && starts[rows] == row_items.size(0),
                        "offsets of excluded items must rise from 0 to ", row_items.size(0), ", got ",
                        starts[0], " to ", starts[rows]);
    }
    offsets.reserve(rows + 1);
    items.reserve(2 * rows + (starts != nullptr ? row_items.size(0) : 0));
    offsets.push_back(0);
    for (int64_t row = 0; row < rows; ++row) {
      items.push_back(targets[row]);
      if (padding) items.push_back(0);
      if (starts != nullptr) {
        const int64_t begin = starts[row], end = starts[row + 1];
        TORCH_CHECK_VALUE(0 <= begin && begin <= end && end <= row_items.size(0),
                          "offsets of excluded items must rise from 0 to ", row_items.size(0));
        items.insert(items.end(), excluded + begin, excluded + end);
      }
      const auto first = items.begin() + offsets.back();
      std::sort(first, items.end());
      items.erase(std::unique(first, items.end()), items.end());
      offsets.push_back(static_cast<int64_t>(items.size()));
    }
  }
};

template <typename T>
void full_ranks(const Tensor& hidden,
                const Table<T>& table,
                int64_t num_items,
                const LeftOut& left_out,
                const int64_t* targets,
                int64_t* ranks) {
  constexpr int64_t P = kPanel<T>;
  const Tile<T>& t = tile<T>();
  const int64_t rows = hidden.size(0), depth = hidden.size(1), panels = ceil_div(rows, P);
  if (rows == 0) return;
  const int64_t ranges = ceil_div(panels, kPanelsPerTask);
  const Chunks chunks{num_items,
                      std::clamp<int64_t>(ceil_div(kTasks, ranges), 1, ceil_div(num_items, kSmallestChunk))};
  const Scratch<T> packed = pack_lanes<T>(hidden);
  const Scratch<T> target_scores(panels * P);
  std::vector<int64_t> ahead(chunks.count * panels * P, 0);
  const int64_t convert_size = table.scratch_size(kTileItems);
  const int64_t scratch_size = ceil_div(kTileItems * P + convert_size, P) * P;
  const int64_t workers = num_workers(ranges * chunks.count, rows * num_items * depth);
  const Scratch<T> scratch(workers * scratch_size);

  run_tasks(panels, workers, [&](int64_t panel, int64_t worker) {
    T* scores = scratch.data() + worker * scratch_size;
    const int64_t lanes = std::min(P, rows - panel * P);
    for (int64_t lane = 0; lane < P; ++lane) {
      target_scores.data()[panel * P + lane] = 0;
      if (lane >= lanes) continue;
      const T* item = table.tile(targets[panel * P + lane], 1, scores + kTileItems * P);
      t.product(item, depth, Walk::kRows, 1, depth, packed.data() + panel * depth * P, scores, lanes, false);
      target_scores.data()[panel * P + lane] = scores[lane];
    }
  });

  run_tasks(ranges * chunks.count, workers, [&](int64_t task, int64_t worker) {
    const int64_t chunk = task / ranges, range = task % ranges;
    const int64_t first = range * kPanelsPerTask, last = std::min(first + kPanelsPerTask, panels);
    T* scores = scratch.data() + worker * scratch_size;
    // Where each row's left-out items go on in this chunk.
    std::vector<int64_t> next((last - first) * P);
    for (int64_t row = first * P; row < std::min(last * P, rows); ++row) {
      const auto begin = left_out.items.begin();
      next[row - first * P] = std::lower_bound(begin + left_out.offsets[row],
                                               begin + left_out.offsets[row + 1], chunks.begin(chunk)) -
                              begin;
    }
    for (int64_t begin = chunks.begin(chunk), end = chunks.begin(chunk + 1); begin < end;
         begin += kTileItems) {
      const int64_t count = std::min(kTileItems, end - begin);
      const T* item = table.tile(begin, count, scores + kTileItems * P);
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t lanes = std::min(P, rows - panel * P);
        const T* target_score = target_scores.data() + panel * P;
        int64_t* counts = ahead.data() + (chunk * panels + panel) * P;
        t.product(item, depth, Walk::kRows, count, depth, packed.data() + panel * depth * P, scores, lanes,
                  false);
        t.count_ahead(scores, count, target_score, counts);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t row = panel * P + lane;
          int64_t& at = next[row - first * P];
          for (; at < left_out.offsets[row + 1] && left_out.items[at] < begin + count; ++at) {
            if (!(scores[(left_out.items[at] - begin) * P + lane] < target_score[lane])) --counts[lane];
          }
        }
      }
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    ranks[row] = 1;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) ranks[row] += ahead[chunk * panels * P + row];
  }
}

template <typename T>
void candidate_ranks(const Tensor& hidden,
                     const Table<T>& table,
                     const int64_t* candidates,
                     int64_t num_candidates,
                     const int64_t* targets,
                     int64_t* ranks) {
  const Tile<T>& t = tile<T>();
  const int64_t rows = hidden.size(0), depth = hidden.size(1);
  const T* hidden_rows = hidden.const_data_ptr<T>();
  constexpr int64_t kRowsPerTask = 64;
  const int64_t tasks = ceil_div(rows, kRowsPerTask), convert_size = table.scratch_size(1);
  const int64_t workers = num_workers(tasks, rows * num_candidates * depth);
  const Scratch<T> scratch(workers * convert_size);
  run_tasks(tasks, workers, [&](int64_t task, int64_t worker) {
    T* converted = scratch.data() + worker * convert_size;
    for (int64_t row = task * kRowsPerTask; row < std::min((task + 1) * kRowsPerTask, rows); ++row) {
      const T* h = hidden_rows + row * depth;
      const T target_score = t.inner_product(h, table.tile(targets[row], 1, converted), depth);
      ranks[row] = 1;
      for (const int64_t* id = candidates + row * num_candidates;
           id < candidates + (row + 1) * num_candidates; ++id) {
        if (*id == targets[row]) continue;
        if (!(t.inner_product(h, table.tile(*id, 1, converted), depth) < target_score)) ++ranks[row];
      }
    }
  });
}

template <typename Run>
void with_rows(const Tensor& hidden, const Run& run) {
  if (accumulate_type(hidden) == at::kDouble) {
    run(double{}, hidden.contiguous());
  } else {
    run(float{}, hidden.to(at::kFloat).contiguous());
  }
}

}  // namespace

Tensor target_rank(const Tensor& hidden,
                   const Tensor& item_embeddings,
                   const Tensor& target,
                   const OptionalTensor& excluded_offsets,
                   const OptionalTensor& excluded_items,
                   bool exclude_padding) {
  check_ranking(hidden, item_embeddings, target);
  check_excluded(hidden, excluded_offsets, excluded_items);
  Tensor offsets, items;
  if (excluded_offsets.has_value()) {
    offsets = excluded_offsets->contiguous();
    items = excluded_items->contiguous();
  }
  const Tensor targets = target.contiguous();
  const Tensor ranks = target.new_empty(target.sizes());
  check_ids(targets.const_data_ptr<int64_t>(), targets.size(0), item_embeddings.size(0), "target");
  const LeftOut left_out(targets, offsets, items, item_embeddings.size(0), exclude_padding);
  with_rows(hidden, [&](auto zero, const Tensor& rows) {
    using T = decltype(zero);
    full_ranks<T>(rows, Table<T>(item_embeddings), item_embeddings.size(0), left_out,
                  targets.const_data_ptr<int64_t>(), ranks.mutable_data_ptr<int64_t>());
  });
  return ranks;
}

Tensor candidate_rank(const Tensor& hidden,
                      const Tensor& item_embeddings,
                      const Tensor& target,
                      const Tensor& candidates) {
  check_ranking(hidden, item_embeddings, target);
  check_candidates(hidden, candidates);
  const Tensor targets = target.contiguous(), ids = candidates.contiguous();
  const Tensor ranks = target.new_empty(target.sizes());
  check_ids(targets.const_data_ptr<int64_t>(), targets.numel(), item_embeddings.size(0), "target");
  check_ids(ids.const_data_ptr<int64_t>(), ids.numel(), item_embeddings.size(0), "candidate");
  with_rows(hidden, [&](auto zero, const Tensor& rows) {
    using T = decltype(zero);
    candidate_ranks<T>(rows, Table<T>(item_embeddings), ids.const_data_ptr<int64_t>(), ids.size(1),
                       targets.const_data_ptr<int64_t>(), ranks.mutable_data_ptr<int64_t>());
  });
  return ranks;
}

}  // namespace td3_fast::cpu
