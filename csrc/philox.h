// Philox4x32-10 (Salmon et al., 2011, doi:10.1145/2063384.2063405): 128 random bits as a function of a
// counter and a key, so that any part of a stream can be drawn anywhere, in any order.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TD3_FAST_HOST_DEVICE __host__ __device__
#else
#define TD3_FAST_HOST_DEVICE
#endif

namespace td3_fast {
namespace {  // built once per instruction set, see cpu/vectors.h

constexpr int64_t kWordsPerBlock = 8;  // int16
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;  // added to the key in each round

// Blocks that hold so many words.
TD3_FAST_HOST_DEVICE inline int64_t blocks_of_words(int64_t count) {
  return (count + kWordsPerBlock - 1) / kWordsPerBlock;
}

// What masks are drawn from: the block-th block of the words of a site.
TD3_FAST_HOST_DEVICE inline void philox(uint64_t seed, uint32_t site, uint64_t block, uint32_t* out) {
  uint32_t x0 = static_cast<uint32_t>(block), x1 = static_cast<uint32_t>(block >> 32), x2 = site, x3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = uint64_t{kPhiloxMultiplier0} * x0, second = uint64_t{kPhiloxMultiplier1} * x2;
    x0 = static_cast<uint32_t>(second >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(second);
    x2 = static_cast<uint32_t>(first >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(first);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  out[0] = x0;
  out[1] = x1;
  out[2] = x2;
  out[3] = x3;
}

}  // namespace
}  // namespace td3_fast
