// Groups of sequences, a vector's lanes each, dealt out to threads.
//
// They are dealt out in chunks that depend on shapes alone. Each chunk sums the gradients of the parameters
// for itself, and the sums are added in the order of chunks: same input, same bits, on any number of threads
// of the same instruction set.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "panels.h"

namespace td3_fast::cpu {

using at::Tensor;

// Two threads share even the few groups of an inner step.
constexpr int64_t kMinChunks = 2, kMaxChunks = 16;
constexpr int64_t kGroupsPerChunk = 2;

template <typename Run>
auto with_type(const Tensor& inputs, const Run& run) {
  return inputs.scalar_type() == at::kDouble ? run(double{}) : run(float{});
}

// run(first, count, scratch, sums) for every group of at most `lanes` of `batch` sequences, with so many
// bytes of scratch, and with what the chunks sum added up in `total`; `work` is in multiply-adds.
template <typename T, typename Run>
void run_groups(
    int64_t lanes, int64_t batch, int64_t scratch_bytes, int64_t work, const Tensor& total, const Run& run) {
  const int64_t groups = ceil_div(batch, lanes);
  const int64_t chunks =
      std::clamp(groups / kGroupsPerChunk, std::clamp<int64_t>(groups, 1, kMinChunks), kMaxChunks);
  const int64_t size = total.defined() ? total.numel() : 0;
  const int64_t scratch_size = ceil_div(scratch_bytes, 64) * 64;
  const int64_t workers = num_workers(chunks, work);
  const Scratch<T> sums(chunks * size);
  const Scratch<uint8_t> scratch(workers * scratch_size);
  run_tasks(chunks, workers, [&](int64_t chunk, int64_t worker) {
    T* own = sums.data() + chunk * size;
    std::fill_n(own, size, T(0));
    const Chunks split{groups, chunks};
    for (int64_t group = split.begin(chunk); group < split.begin(chunk + 1); ++group) {
      const int64_t first = group * lanes;
      run(first, std::min(lanes, batch - first), scratch.data() + worker * scratch_size, own);
    }
  });
  if (size == 0) return;
  T* out = total.mutable_data_ptr<T>();
  std::fill_n(out, size, T(0));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const T* part = sums.data() + chunk * size;
    for (int64_t i = 0; i < size; ++i) out[i] += part[i];
  }
}

// A direction of a derivative, which is to be like what it moves; undefined where none is given.
inline Tensor direction(const std::optional<Tensor>& given, const Tensor& like) {
  TORCH_CHECK_VALUE(
      !given.has_value() || (given->sizes() == like.sizes() && given->scalar_type() == like.scalar_type()),
      "expected a direction of the sizes and dtype of what it moves, ", like.sizes());
  return given.has_value() ? given->contiguous() : Tensor();
}
inline Tensor direction_or_zeros(const std::optional<Tensor>& given, const Tensor& like) {
  const Tensor made = direction(given, like);
  return made.defined() ? made : like.new_zeros(like.sizes());
}

// Room for the sums of two tensors' gradients, one after the other, and both of them taken out of it.
inline Tensor sums_of(const Tensor& first, const Tensor& second) {
  return first.new_empty({first.numel() + second.numel()});
}
template <typename T>
std::tuple<Tensor, Tensor> split_sums(const Tensor& sums, const Tensor& first, const Tensor& second) {
  const Tensor of_first = first.new_empty(first.sizes()), of_second = second.new_empty(second.sizes());
  const T* from = sums.const_data_ptr<T>();
  std::copy_n(from, of_first.numel(), of_first.mutable_data_ptr<T>());
  std::copy_n(from + of_first.numel(), of_second.numel(), of_second.mutable_data_ptr<T>());
  return {of_first, of_second};
}

// The sequences by falling length, equal ones as they came, so that those of a group are of like lengths.
inline std::vector<int64_t> longest_first(const int64_t* lengths, int64_t count, int64_t longest) {
  std::vector<int64_t> next(longest + 2, 0), order(count);
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(lengths[i] >= 0 && lengths[i] <= longest, "length ", lengths[i],
                      " is not one of sequences of ", longest, " inputs");
    ++next[longest - lengths[i] + 1];
  }
  std::partial_sum(next.begin(), next.end(), next.begin());
  for (int64_t i = 0; i < count; ++i) order[next[longest - lengths[i]]++] = i;
  return order;
}

}  // namespace td3_fast::cpu
