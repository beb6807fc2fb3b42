// Tiles of matrices in shared memory, and their products on tensor cores.
//
// A warp makes 16 rows of a product, eight columns at a time, in the layout that mma.sync has for its result:
// lane 4 g + t holds [0], [1] = (row g, columns 2 t, 2 t + 1) and [2], [3] = the same of row g + 8. A tile's
// rows lie kPitch elements apart, 16 bytes more than they are long, by which every access below is free of
// bank conflicts. Sums are in float32.
#pragma once

#include "elements.cuh"

namespace td3_fast::cuda {

using Eight = float[4];  // a lane's part of 16 rows × 8 columns

// A matrix in global memory; without data, an operand that is absent.
struct Matrix {
  const void* data;
  Element element;
  int columns;
  int copy_bytes;  // at a time, as its alignment allows: 16, 4 or 2
};

// Columns in a tile: those of the matrix, and zeros up to a multiple of 16.
__host__ __device__ inline int padded(int columns) {
  return (columns + 15) / 16 * 16;
}

// Row and column of a lane within a `Eight`.
__device__ inline int fragment_row() {
  return static_cast<int>(threadIdx.x % kWarp / 4);
}
__device__ inline int fragment_column() {
  return static_cast<int>(threadIdx.x % 4 * 2);
}

template <typename Stored, int kDepth>
struct Tile {
  static constexpr int kPitch = kDepth + 16 / static_cast<int>(sizeof(Stored));

  // Copies rows [first, first + kRows) of `from` to `to`, zeros from row `end` and the last column on. It has
  // arrived when the copies committed next are waited for, and a barrier has been passed.
  static __device__ void copy(Stored* to, const Matrix& from, int64_t first, int64_t end, int rows) {
    if constexpr (sizeof(Stored) == 4) {
      if (from.element == Element::kFloat16) return copy_elements<__half>(to, from, first, end, rows);
      if (from.element == Element::kBFloat16) return copy_elements<__nv_bfloat16>(to, from, first, end, rows);
    }
    if (from.copy_bytes == 16) {
      copy_parts<16>(to, from, first, end, rows);
    } else if (sizeof(Stored) == 4 || from.copy_bytes == 4) {
      copy_parts<4>(to, from, first, end, rows);
    } else {
      copy_elements<Stored>(to, from, first, end, rows);
    }
  }

 private:
  template <int kBytes>
  static __device__ void copy_parts(Stored* to, const Matrix& from, int64_t first, int64_t end, int rows) {
    constexpr int kPart = kBytes / static_cast<int>(sizeof(Stored)), kParts = kDepth / kPart;
    const int columns = padded(from.columns);
    const Stored* data = static_cast<const Stored*>(from.data);
    for (int at = static_cast<int>(threadIdx.x); at < rows * kParts; at += static_cast<int>(blockDim.x)) {
      const int row = at / kParts, column = at % kParts * kPart;
      if (column >= columns) continue;
      // Rows are whole numbers of parts, so a part is inside or outside.
      const bool inside = first + row < end && column < from.columns;
      copy_async<kBytes>(to + row * kPitch + column,
                         inside ? data + (first + row) * from.columns + column : data, inside ? kBytes : 0);
    }
  }

  // What has another type, or is not aligned to be copied asynchronously.
  template <typename From>
  static __device__ void copy_elements(Stored* to, const Matrix& from, int64_t first, int64_t end, int rows) {
    const int columns = padded(from.columns);
    const From* data = static_cast<const From*>(from.data);
    for (int at = static_cast<int>(threadIdx.x); at < rows * kDepth; at += static_cast<int>(blockDim.x)) {
      const int row = at / kDepth, column = at % kDepth;
      if (column >= columns) continue;
      const bool inside = first + row < end && column < from.columns;
      to[row * kPitch + column] =
          Stored(inside ? load<float>(data + (first + row) * from.columns + column) : 0.0f);
    }
  }
};

// The kinds of product. Each has the type in which tiles are stored, and how words of tiles become operands:
// Left is 16 rows × kStep of depth, Right kStep × 8 columns. Depth may be taken in any order that both sides
// share; `of_eights` and `across` take it in the one that needs no exchange between lanes.

struct Tf32 {
  using Stored = float;
  static constexpr int kStep = 8;
  static constexpr bool kScaled = false;
  struct Left {
    uint32_t words[4];
  };
  struct Right {
    uint32_t words[2];
  };

  static __device__ Left left(const uint32_t (&words)[4]) {
    Left result;
    for (int i = 0; i < 4; ++i) result.words[i] = to_tf32(float_of(words[i]));
    return result;
  }
  static __device__ Right right(uint32_t first, uint32_t second) {
    return {{to_tf32(float_of(first)), to_tf32(float_of(second))}};
  }
  static __device__ void multiply(Eight& sum, const Left& left, const Right& right) {
    multiply_tiles<float>(sum, left.words, right.words);
  }
  static __device__ void add_step(Eight& sum, const Left& left, const Right& right) {
    multiply(sum, left, right);
  }
};

// float32's precision from three products of tf32: each operand is the sum of two.
struct Float32 {
  using Stored = float;
  static constexpr int kStep = 8;
  static constexpr bool kScaled = false;
  struct Left {
    uint32_t high[4], low[4];
  };
  struct Right {
    uint32_t high[2], low[2];
  };

  static __device__ void split(uint32_t word, uint32_t& high, uint32_t& low) {
    high = word & 0xffffe000u;
    low = (bits_of(float_of(word) - float_of(high)) + 0x1000u) & 0xffffe000u;
  }
  static __device__ Left left(const uint32_t (&words)[4]) {
    Left result;
    for (int i = 0; i < 4; ++i) split(words[i], result.high[i], result.low[i]);
    return result;
  }
  static __device__ Right right(uint32_t first, uint32_t second) {
    Right result;
    split(first, result.high[0], result.low[0]);
    split(second, result.high[1], result.low[1]);
    return result;
  }
  static __device__ void multiply(Eight& sum, const Left& left, const Right& right) {
    multiply_tiles<float>(sum, left.low, right.high);
    multiply_tiles<float>(sum, left.high, right.low);
    multiply_tiles<float>(sum, left.high, right.high);
  }
  // Tensor cores round each sum towards zero, so scores are summed outside of them.
  static __device__ void add_step(Eight& sum, const Left& left, const Right& right) {
    Eight part = {};
    multiply(part, left, right);
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
};

template <typename Half>
struct HalfPrecision {
  using Stored = Half;
  static constexpr int kStep = 16;
  // float16 has few exponents: probabilities of large catalogues are below its smallest number.
  static constexpr bool kScaled = std::is_same_v<Half, __half>;
  struct Left {
    uint32_t words[4];
  };
  struct Right {
    uint32_t words[2];
  };

  static __device__ Left left(const uint32_t (&words)[4]) {
    return {{words[0], words[1], words[2], words[3]}};
  }
  static __device__ Right right(uint32_t first, uint32_t second) { return {{first, second}}; }
  static __device__ void multiply(Eight& sum, const Left& left, const Right& right) {
    multiply_tiles<Half>(sum, left.words, right.words);
  }
  static __device__ void add_step(Eight& sum, const Left& left, const Right& right) {
    multiply(sum, left, right);
  }
};

// Eights of a product as the left operand of the next one, whose depth is their columns.
template <typename Math, int kColumns>
struct Coefficients {
  static constexpr int kSteps = kColumns / Math::kStep;
  typename Math::Left steps[kSteps];
  float unit[2] = {1, 1};  // of rows g and g + 8

  __device__ explicit Coefficients(const Eight (&eights)[kColumns / 8]) {
    float scale[2] = {1, 1};
    if constexpr (Math::kScaled) choose_units(eights, scale);
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (Math::kStep == 8) {
        // Depth t of the product is column 2 t, depth t + 4 column 2 t + 1; see `across`.
        const Eight& eight = eights[step];
        const uint32_t words[4] = {bits_of(eight[0]), bits_of(eight[2]), bits_of(eight[1]),
                                   bits_of(eight[3])};
        steps[step] = Math::left(words);
      } else {
        const Eight &first = eights[2 * step], &second = eights[2 * step + 1];
        const auto word = [&](const Eight& from, int row) {
          return pack<typename Math::Stored>(from[2 * row] * scale[row], from[2 * row + 1] * scale[row]);
        };
        const uint32_t words[4] = {word(first, 0), word(first, 1), word(second, 0), word(second, 1)};
        steps[step] = Math::left(words);
      }
    }
  }

 private:
  // The power of two below each row's largest coefficient.
  __device__ void choose_units(const Eight (&eights)[kColumns / 8], float (&scale)[2]) {
    for (int row = 0; row < 2; ++row) {
      float largest = 0;
      for (int i = 0; i < kColumns / 8; ++i) {
        for (int j = 2 * row; j < 2 * row + 2; ++j) {
          const float size = float_of(bits_of(eights[i][j]) & 0x7fffffffu);
          largest = size > largest ? size : largest;
        }
      }
      for (int mask = 1; mask < 4; mask *= 2) {
        const float other = shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
      }
      const uint32_t exponent = bits_of(largest) & 0x7f800000u;
      unit[row] = float_of(exponent);
      scale[row] = float_of(0x7f000000u - exponent);
    }
  }
};

// eights (16, kColumns) += left (16, depth) × right (kColumns, depth)ᵀ, both in shared memory.
template <typename Math, int kDepth, int kColumns>
__device__ void add_products(Eight (&eights)[kColumns / 8],
                             const typename Math::Stored* left,
                             const typename Math::Stored* right,
                             int depth) {
  constexpr int kPitch = Tile<typename Math::Stored, kDepth>::kPitch;
  constexpr int kPart = Math::kStep / 2;  // elements in 16 bytes
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  left += lane % 16 * kPitch + lane / 16 * kPart;
  right += (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * kPart;
  for (int at = 0; at < depth; at += Math::kStep) {
    uint32_t words[4];
    load_matrices(words, left + at);
    const typename Math::Left a = Math::left(words);
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) {
      load_matrices(words, right + pair * 16 * kPitch + at);
      Math::add_step(eights[2 * pair], a, Math::right(words[0], words[1]));
      Math::add_step(eights[2 * pair + 1], a, Math::right(words[2], words[3]));
    }
  }
}

// The right operands of two times eight columns from `column` on, whose depth is the tile's rows from `row`
// on.
template <typename Math, int kDepth>
__device__ void across(typename Math::Right (&right)[2],
                       const typename Math::Stored* tile,
                       int row,
                       int column) {
  constexpr int kPitch = Tile<typename Math::Stored, kDepth>::kPitch;
  if constexpr (Math::kStep == 8) {
    tile += (row + fragment_column()) * kPitch + column + fragment_row();
    for (int i = 0; i < 2; ++i) {
      right[i] = Math::right(bits_of(tile[8 * i]), bits_of(tile[8 * i + kPitch]));
    }
  } else {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    uint32_t words[4];
    load_matrices_transposed(words, tile + (row + lane % 16) * kPitch + column + lane / 16 * 8);
    right[0] = Math::right(words[0], words[1]);
    right[1] = Math::right(words[2], words[3]);
  }
}

// sums (16, kDepth) = factor sums + coefficients (16, kColumns) × tile (kColumns, kDepth); the factor is that
// of rows g and g + 8. Tensor cores round towards zero, which would add up over a catalogue: so they sum a
// tile from zero, and tiles are added to each other outside of them.
template <typename Math, int kDepth, int kColumns>
__device__ void add_weighted(Eight (&sums)[kDepth / 8],
                             const float (&factor)[2],
                             const Coefficients<Math, kColumns>& coefficients,
                             const typename Math::Stored* tile,
                             int width) {
#pragma unroll
  for (int pair = 0; pair < kDepth / 16; ++pair) {
    if (pair * 16 >= width) break;
    Eight parts[2] = {};
#pragma unroll
    for (int step = 0; step < kColumns / Math::kStep; ++step) {
      typename Math::Right right[2];
      across<Math, kDepth>(right, tile, step * Math::kStep, pair * 16);
      for (int i = 0; i < 2; ++i) Math::multiply(parts[i], coefficients.steps[step], right[i]);
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        float& sum = sums[2 * pair + i][j];
        sum = sum * factor[j / 2] + parts[i][j] * coefficients.unit[j / 2];
      }
    }
  }
}

// Rows [first, rows) of a matrix (rows, columns), from the sums of a warp.
template <int kDepth>
__device__ void write_sums(
    float* to, const Eight (&sums)[kDepth / 8], int64_t first, int64_t rows, int columns) {
#pragma unroll
  for (int i = 0; i < kDepth / 8; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first + fragment_row() + j / 2 * 8;
      const int column = 8 * i + fragment_column() + j % 2;
      if (row < rows && column < columns) to[row * columns + column] = sums[i][j];
    }
  }
}

}  // namespace td3_fast::cuda
