// What the CUDA kernels are launched with. Free of PyTorch and of CUDA, so that each side compiles without
// the other.
//
// Rows, their statistics and every output are of the accumulate type: double for float64 tables, else float.
// Pointers are null where an operand is absent or an output is not asked for; all matrices are contiguous.
#pragma once

#include <cstdint>

namespace td3_fast::cuda {

enum class Element { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct SoftEmbedding {
  Element table;
  int64_t rows, items, rank, width, splits;

  const void* queries;            // (rows, rank)
  const void* grad_embedding;     // (rows, width)
  const void* grad_grad_queries;  // (rows, rank)
  const void* logsumexp;          // (rows,)
  const void* remainder;          // (rows,)
  const void* shift;              // (rows,), grad_logsumexp - D
  const void* inner;              // (rows,), D
  const void* u_mean;             // (rows,)
  const void* offset;             // (rows,), sum p (w - D) (u - u_mean) + s_mean

  const void* keys;              // (items, rank)
  const void* values;            // (items, width)
  const void* grad_grad_keys;    // (items, rank)
  const void* grad_grad_values;  // (items, width)

  void* maxima;       // (splits, rows)
  void* sums;         // (splits, rows)
  void* weighted;     // (splits, rows, width)
  void* means;        // (splits, rows, 7): peak, centre, and the sums of row_means_kernel
  void* row_sums;     // (splits, rows, rank), towards queries
  void* grad_sums;    // (splits, rows, width), towards grad_embedding
  void* grad_keys;    // (items, rank)
  void* grad_values;  // (items, width)
};

struct Ranking {
  Element table;
  int64_t rows, items, depth, candidates;

  const void* hidden;               // (rows, depth)
  const void* item_embeddings;      // (items, depth)
  const int64_t* target;            // (rows,)
  const int64_t* candidate_ids;     // (rows, candidates)
  const int64_t* excluded_offsets;  // (rows + 1,)
  const int64_t* excluded_items;    // (nnz,)
  bool exclude_padding;
  int64_t* ranks;  // (rows,)
};

// Each returns null, or what CUDA says went wrong with the launch. `stream` is a cudaStream_t.
const char* forward(const SoftEmbedding& problem, void* stream);
const char* row_means(const SoftEmbedding& problem, void* stream);
const char* sum_over_items(const SoftEmbedding& problem, bool second_order, void* stream);
const char* sum_over_rows(const SoftEmbedding& problem, bool second_order, void* stream);
const char* full_ranks(const Ranking& problem, void* stream);
const char* candidate_ranks(const Ranking& problem, void* stream);

}  // namespace td3_fast::cuda
