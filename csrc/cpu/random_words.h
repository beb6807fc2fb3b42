// Random words by blocks; built once per instruction set.
#pragma once

#include <cstdint>

namespace td3_fast::cpu {

// out (count, 4): the blocks first, ..., first + count - 1 of a site.
using RandomBlocks = void(uint64_t seed, uint32_t site, int64_t first, int64_t count, uint32_t* out);

// That of the instruction set that tile.h has chosen.
RandomBlocks* random_blocks();

}  // namespace td3_fast::cpu
