// Choice of the instruction set, once, when the library is loaded.

#include "tile.h"

#include <cstring>

#include "adam.h"
#include "additive_attention.h"
#include "encoder.h"
#include "gru.h"
#include "random_words.h"

namespace td3_fast::cpu {

extern const Tile<float> float_tile_baseline;
extern const Tile<double> double_tile_baseline;
extern const Encoder<float> float_encoder_baseline;
extern const Encoder<double> double_encoder_baseline;
extern const Gru<float> float_gru_baseline;
extern const Gru<double> double_gru_baseline;
extern const AdditiveAttention<float> float_attention_baseline;
extern const AdditiveAttention<double> double_attention_baseline;
extern RandomBlocks* const random_blocks_baseline;
extern const Adam<float> float_adam_baseline;
extern const Adam<double> double_adam_baseline;
#ifdef TD3_FAST_X86_64
extern const Tile<float> float_tile_avx2, float_tile_avx512;
extern const Tile<double> double_tile_avx2, double_tile_avx512;
extern const Encoder<float> float_encoder_avx2, float_encoder_avx512;
extern const Encoder<double> double_encoder_avx2, double_encoder_avx512;
extern const Gru<float> float_gru_avx2, float_gru_avx512;
extern const Gru<double> double_gru_avx2, double_gru_avx512;
extern const AdditiveAttention<float> float_attention_avx2, float_attention_avx512;
extern const AdditiveAttention<double> double_attention_avx2, double_attention_avx512;
extern RandomBlocks *const random_blocks_avx2, *const random_blocks_avx512;
extern const Adam<float> float_adam_avx2, float_adam_avx512;
extern const Adam<double> double_adam_avx2, double_adam_avx512;
#endif

namespace {

struct InstructionSet {
  const Tile<float>* float_tile;
  const Tile<double>* double_tile;
  const Encoder<float>* float_encoder;
  const Encoder<double>* double_encoder;
  const Gru<float>* float_gru;
  const Gru<double>* double_gru;
  const AdditiveAttention<float>* float_attention;
  const AdditiveAttention<double>* double_attention;
  RandomBlocks* const* random_blocks;
  const Adam<float>* float_adam;
  const Adam<double>* double_adam;
  bool (*supported)();
};

const InstructionSet kInstructionSets[] = {
#ifdef TD3_FAST_X86_64
    {&float_tile_avx512, &double_tile_avx512, &float_encoder_avx512, &double_encoder_avx512,
     &float_gru_avx512, &double_gru_avx512, &float_attention_avx512, &double_attention_avx512,
     &random_blocks_avx512, &float_adam_avx512, &double_adam_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
     }},
    {&float_tile_avx2, &double_tile_avx2, &float_encoder_avx2, &double_encoder_avx2, &float_gru_avx2,
     &double_gru_avx2, &float_attention_avx2, &double_attention_avx2, &random_blocks_avx2, &float_adam_avx2,
     &double_adam_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&float_tile_baseline, &double_tile_baseline, &float_encoder_baseline, &double_encoder_baseline,
     &float_gru_baseline, &double_gru_baseline, &float_attention_baseline, &double_attention_baseline,
     &random_blocks_baseline, &float_adam_baseline, &double_adam_baseline, [] { return true; }},
};

const InstructionSet* best() {
#ifdef TD3_FAST_X86_64
  __builtin_cpu_init();
#endif
  const InstructionSet* candidate = kInstructionSets;
  while (!candidate->supported()) ++candidate;
  return candidate;
}

const InstructionSet* selected = best();

}  // namespace

template <>
const Tile<float>& tile<float>() {
  return *selected->float_tile;
}

template <>
const Tile<double>& tile<double>() {
  return *selected->double_tile;
}

template <>
const Encoder<float>& encoder<float>() {
  return *selected->float_encoder;
}

template <>
const Encoder<double>& encoder<double>() {
  return *selected->double_encoder;
}

template <>
const Gru<float>& gru<float>() {
  return *selected->float_gru;
}

template <>
const Gru<double>& gru<double>() {
  return *selected->double_gru;
}

template <>
const AdditiveAttention<float>& additive_attention<float>() {
  return *selected->float_attention;
}

template <>
const AdditiveAttention<double>& additive_attention<double>() {
  return *selected->double_attention;
}

template <>
const Adam<float>& adam<float>() {
  return *selected->float_adam;
}

template <>
const Adam<double>& adam<double>() {
  return *selected->double_adam;
}

RandomBlocks* random_blocks() {
  return *selected->random_blocks;
}

int instruction_sets(const char** names, int capacity) {
  int count = 0;
  for (const InstructionSet& candidate : kInstructionSets) {
    if (candidate.supported() && count < capacity) names[count++] = candidate.float_tile->name;
  }
  return count;
}

bool select_instruction_set(const char* name) {
  for (const InstructionSet& candidate : kInstructionSets) {
    if (candidate.supported() && std::strcmp(name, candidate.float_tile->name) == 0) {
      selected = &candidate;
      return true;
    }
  }
  return false;
}

}  // namespace td3_fast::cpu
