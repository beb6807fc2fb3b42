// What the encoder's kernels of every device agree on; free of PyTorch and of CUDA.
#pragma once

#include <cstdint>

namespace td3_fast {

struct EncoderSizes {
  int64_t length;     // of the input sequences
  int64_t positions;  // rows of the position table
  int64_t width;      // d
  int64_t inner;      // of the feed-forward
  int64_t heads, layers;
  int64_t asked;       // outputs of each sequence, k
  bool bidirectional;  // attention of all rows to the inputs up to one, not of each to those up to its own
};

constexpr int64_t kMaxLayers = 8;
constexpr int64_t kMaxSites = 1 + 3 * kMaxLayers;  // of dropout
constexpr double kNormEps = 1e-12;

inline int64_t encoder_parameters(const EncoderSizes& s) {
  const int64_t block =
      4 * (s.width + 1) * s.width + 4 * s.width + (s.width + 1) * s.inner + (s.inner + 1) * s.width;
  return (s.positions + 2) * s.width + s.layers * block;
}

}  // namespace td3_fast
