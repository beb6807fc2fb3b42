// Numbers below the smallest normal one, which x86 works through in microcode, some hundred times as slowly.
#pragma once

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace td3_fast::cpu {

// While this lives, this thread takes them for zero, as operands and as results. They are what a sharp
// summary has many of: probabilities of items that a position all but rules out, and their products.
// Elsewhere than on x86 it does nothing: other processors lose nothing on them.
class SubnormalsAsZero {
 public:
  SubnormalsAsZero(const SubnormalsAsZero&) = delete;
  SubnormalsAsZero& operator=(const SubnormalsAsZero&) = delete;
#ifdef __SSE2__
  SubnormalsAsZero() : found_(_mm_getcsr()) { _mm_setcsr(found_ | kResults | kOperands); }
  ~SubnormalsAsZero() { _mm_setcsr(found_); }

 private:
  static constexpr unsigned kResults = 0x8000, kOperands = 0x0040;
  unsigned found_;
#else
  SubnormalsAsZero() {}
#endif
};

}  // namespace td3_fast::cpu
