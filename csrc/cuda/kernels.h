// What the CUDA kernels are launched with. Free of PyTorch and of CUDA, so that each side compiles without
// the other.
//
// Statistics and every output are of the accumulate type: double for float64 tables, else float. Pointers are
// null where an operand is absent or an output is not asked for; all matrices are contiguous.
#pragma once

#include <cstdint>

#include "../encoder_sizes.h"

namespace td3_fast::cuda {

enum class Element { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct SoftEmbedding {
  Element table;
  int64_t rows, items, rank, width;
  int64_t split_items, split_rows;  // of a block: items where it owns rows, rows where it owns items

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
  void* means;        // (splits, rows, 7): the sums of row_means
  void* row_sums;     // (splits, rows, rank), towards queries
  void* grad_sums;    // (splits, rows, width), towards grad_embedding
  void* grad_keys;    // (splits, items, rank)
  void* grad_values;  // (splits, items, width)
};

enum class Pass {
  kForward,
  kRowMeans,
  kSumOverItems,
  kSumOverRows,
  kSecondSumOverItems,
  kSecondSumOverRows,
};

// Each returns null, or what CUDA says went wrong with the launch. `stream` is a cudaStream_t.

// Any element type and width; rows are of the accumulate type.
const char* warp_pass(Pass pass, const SoftEmbedding& problem, void* stream);
// On tensor cores, where rank and width are at most kTileWidth. Rows are float32 in the first two, and of the
// element type of the tables in the others; the second takes tables of half precision too.
constexpr int64_t kTileWidth = 128;
const char* tile_pass_tf32(Pass pass, const SoftEmbedding& problem, void* stream);
const char* tile_pass_float32(Pass pass,
                              const SoftEmbedding& problem,
                              void* stream);  // to float32's precision
const char* tile_pass_float16(Pass pass, const SoftEmbedding& problem, void* stream);
const char* tile_pass_bfloat16(Pass pass, const SoftEmbedding& problem, void* stream);

// Splits put together, in their order.
struct Merge {
  bool float64;
  int64_t splits, rows, width;
  const void* maxima;    // (splits, rows)
  const void* sums;      // (splits, rows)
  const void* weighted;  // (splits, rows, width)
  const void* means;     // (splits, rows, 7)
  void* embedding;       // (rows, width)
  void* logsumexp;       // (rows,)
  void* remainder;       // (rows,), what rounding takes from the logsumexp
  void* u_mean;          // (rows,)
  void* offset;          // (rows,)
};
const char* merge_forward(const Merge& merge, void* stream);
const char* merge_means(const Merge& merge, void* stream);
// Sums `weighted` into `embedding`.
const char* merge_sums(const Merge& merge, void* stream);

struct Ranking {
  Element table;
  int64_t rows, items, depth, candidates;
  int64_t split_items;  // of a block

  const void* hidden;               // (rows, depth)
  const void* item_embeddings;      // (items, depth)
  const int64_t* target;            // (rows,)
  const int64_t* candidate_ids;     // (rows, candidates)
  const int64_t* excluded_offsets;  // (rows + 1,)
  const int64_t* excluded_items;    // (nnz,)
  bool exclude_padding;
  void* target_scores;  // (rows,), scratch
  int64_t* ranks;       // (rows,)
};

const char* full_ranks(const Ranking& problem, void* stream);
const char* candidate_ranks(const Ranking& problem, void* stream);

// The words of sites in a row, by blocks of Philox: whole ones, so that each site starts at 16 bytes.
struct RandomWords {
  const int64_t* seed;  // on the device
  uint32_t first_site;
  int sites;                // at least 1
  int64_t ends[kMaxSites];  // of each site, in blocks; the last is at least 1
  void* blocks;             // (ends[sites - 1], 16 bytes)
};

const char* draw_words(const RandomWords& problem, void* stream);

// One dropout site: an element survives, scaled, where its word is not below the threshold.
struct EncoderSite {
  const int16_t* words;  // null: nothing is dropped
  int16_t threshold;
  double scale;
};

// Tensors are of one type, float64 or float32. Null: zero, or not asked for.
struct EncoderProblem {
  bool float64;
  EncoderSizes sizes;
  int64_t batch;
  const void* parameters;          // (size,), in the order of the learner's vector
  const void* parameters_tangent;  // (size,)
  const void* inputs;              // (batch, length, d), or where there are `ids` a table (n, d)
  const void* inputs_tangent;      // (batch, length, d)
  const int64_t* ids;              // (batch, length), rows of the table
  const int64_t* rows;             // (batch,), which of the inputs each sequence is; null: in their order
  int64_t table_rows;              // that ids or rows may name
  int64_t input_stride, input_tangent_stride, grad_input_stride;  // elements from one sequence to the next
  const int64_t* positions;                                       // (batch, k)
  int64_t offset;                                                 // what is added to positions
  EncoderSite sites[kMaxSites];
  const void* grad_outputs;          // (batch, k, d)
  const void* grad_outputs_tangent;  // (batch, k, d)

  // Where `items` are given, upstream is the gradient of the mean over outputs h of logsumexp(h E^T) - h x,
  // x the row of the inputs after that of h.
  const void* items;  // (d, n): column by column
  int64_t num_items;
  void* logits;  // (blocks, logits_bytes), scratch: in shared memory they are slower
  int64_t logits_bytes;

  void* outputs;            // (batch, k, d)
  void* grad_inputs;        // (batch, grad_input_rows, d)
  double to_targets;        // times the outputs is added to the row of grad_inputs after that of the output
  int64_t grad_input_rows;  // of each sequence; those beyond the length are zero before that
  int64_t blocks;           // of threads; each takes every blocks-th sequence
  void* partials;           // (blocks, size + 1): the gradients of the parameters, and the loss
  void* scratch;            // (blocks, scratch_bytes)
  int64_t scratch_bytes;    // encoder_scratch
};

enum class EncoderPass { kForward, kBackward };

// How many blocks a pass over so many sequences takes, and the bytes of scratch of each.
int64_t encoder_blocks(EncoderPass pass, const EncoderProblem& problem);
int64_t encoder_scratch(EncoderPass pass, const EncoderProblem& problem);
// Where the parameters have a tangent, every result is its derivative in the direction of the tangents.
const char* encode(EncoderPass pass, const EncoderProblem& problem, void* stream);

// Their instances of each type.
int64_t encoder_scratch_float32(EncoderPass pass, const EncoderProblem& problem);
int64_t encoder_scratch_float64(EncoderPass pass, const EncoderProblem& problem);
const char* encode_float32(EncoderPass pass, const EncoderProblem& problem, void* stream);
const char* encode_float64(EncoderPass pass, const EncoderProblem& problem, void* stream);
// float32, of width 32, inner width 64, one layer and one head.
int64_t encoder_scratch_width32(EncoderPass pass, const EncoderProblem& problem);
const char* encode_width32(EncoderPass pass, const EncoderProblem& problem, void* stream);

// out[i] = the sum over rows of partials[row][i], in their order.
const char* sum_partials(
    bool float64, int64_t rows, int64_t size, const void* partials, void* out, void* stream);

// A step of Adam, which overwrites the parameter and its moments, or its adjoint, which overwrites their
// cotangents.
struct AdamCall {
  bool float64;
  int64_t count;  // at least 1
  double beta1, beta2, eps, weight_decay, size;
  const void* size_on_device;  // (), where there is one in place of `size`

  const void* parameter;      // (count,)
  const void* first_moment;   // (count,)
  const void* second_moment;  // (count,)
  const void* gradient;       // (count,)
  void* overwritten[3];       // (count,) each, in the order of the three
  void* to_gradient;          // (count,), of the adjoint
};

const char* adam_step(const AdamCall& call, void* stream);
const char* adam_adjoint(const AdamCall& call, void* stream);

}  // namespace td3_fast::cuda
