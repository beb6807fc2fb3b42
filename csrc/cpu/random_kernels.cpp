// Philox with a block in each lane of 64 bits: a product of 32 bits by 32 fills one, and what its upper half
// holds otherwise is never looked at.

#include "../philox.h"
#include "random_words.h"
#include "vectors.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace td3_fast::cpu {
namespace {

#ifdef __SSE2__
typedef uint64_t Lanes __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(uint32_t))));
constexpr int kBlocks = kVectorBytes / sizeof(uint64_t);

// Of the lower halves.
inline Lanes multiply(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // without a mask g++ 12 warns
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

// The blocks first, ..., first + kBlocks - 1.
void vector_of_blocks(uint64_t seed, uint32_t site, uint64_t first, uint32_t* out) {
  Lanes x0, even, odd;
  for (int lane = 0; lane < kBlocks; ++lane) {
    x0[lane] = first + lane;
    even[lane] = lane / 2 + (lane % 2) * kBlocks;
    odd[lane] = even[lane] + kBlocks / 2;
  }
  const Lanes zero = {};
  Lanes x1 = x0 >> 32, x2 = zero + site, x3 = zero;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Lanes product0 = multiply(x0, zero + kPhiloxMultiplier0);
    const Lanes product1 = multiply(x2, zero + kPhiloxMultiplier1);
    x0 = (product1 >> 32) ^ x1 ^ (zero + key0);
    x1 = product1;
    x2 = (product0 >> 32) ^ x3 ^ (zero + key1);
    x3 = product0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const Lanes lower = (x0 & 0xffffffff) | (x1 << 32), upper = (x2 & 0xffffffff) | (x3 << 32);
  Unaligned* to = reinterpret_cast<Unaligned*>(out);
  to[0] = __builtin_shuffle(lower, upper, even);
  to[1] = __builtin_shuffle(lower, upper, odd);
}
#endif

void blocks(uint64_t seed, uint32_t site, int64_t first, int64_t count, uint32_t* out) {
  int64_t i = 0;
#ifdef __SSE2__
  for (; i + kBlocks <= count; i += kBlocks) vector_of_blocks(seed, site, first + i, out + 4 * i);
#endif
  for (; i < count; ++i) philox(seed, site, static_cast<uint64_t>(first + i), out + 4 * i);
}

}  // namespace

extern RandomBlocks* const TD3_FAST_CONCAT(random_blocks_, TD3_FAST_INSTRUCTION_SET);
RandomBlocks* const TD3_FAST_CONCAT(random_blocks_, TD3_FAST_INSTRUCTION_SET) = blocks;

}  // namespace td3_fast::cpu
