// The CUDA operators that draw the words of dropout; see random_words.cu.

#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "../checks.h"
#include "../philox.h"
#include "kernels.h"
#include "operators.h"

namespace td3_fast::cuda {

Tensor random_words_of_sites(const Tensor& seed, int64_t first_site, at::IntArrayRef counts) {
  const int64_t sites = static_cast<int64_t>(counts.size()),
                all = check_random_words(seed, first_site, counts);
  const c10::OptionalDeviceGuard guard(seed.device());
  const Tensor words = seed.new_empty({all * kWordsPerBlock}, at::kShort);
  int16_t* to = words.mutable_data_ptr<int16_t>();
  for (int64_t first = 0; first < sites; first += kMaxSites) {
    RandomWords problem{};
    problem.seed = seed.const_data_ptr<int64_t>();
    problem.first_site = static_cast<uint32_t>(first_site + first);
    problem.sites = static_cast<int>(std::min(kMaxSites, sites - first));
    problem.blocks = to;
    int64_t end = 0;
    for (int i = 0; i < problem.sites; ++i) problem.ends[i] = end += blocks_of_words(counts[first + i]);
    if (end > 0) check_launch(draw_words(problem, current_stream(seed)));
    to += end * kWordsPerBlock;
  }
  return words;
}

Tensor random_words(const Tensor& seed, int64_t site, int64_t count) {
  return random_words_of_sites(seed, site, count).narrow(0, 0, count);
}

}  // namespace td3_fast::cuda
