// The encoder for one instruction set; encoder_pass.h has its passes.

#include "encoder_backward.h"
#include "encoder_forward.h"

namespace td3_fast::cpu {
namespace {

template <typename T>
int64_t scratch_size(const EncoderSizes& sizes, bool tangents) {
  return tangents ? Pass<T, true>::scratch_size(sizes) : Pass<T, false>::scratch_size(sizes);
}
template <typename T, bool kTangents, bool kKeeps>
void forward(const EncoderCall<T>& call, int64_t first, int64_t count, void* scratch) {
  auto* pass = new (scratch) Pass<T, kTangents>(call, first, count, scratch, kKeeps);
  pass->forward();
  pass->write_outputs();
}
template <typename T, bool kTangents>
void backward(void* scratch, T* sums) {
  Pass<T, kTangents>::in(scratch)->backward(sums);
}
template <typename T>
constexpr Encoder<T> kEncoder = {kLanes<T>,
                                 scratch_size<T>,
                                 forward<T, false, false>,
                                 {forward<T, false, true>, backward<T, false>},
                                 {forward<T, true, true>, backward<T, true>}};

}  // namespace

extern const Encoder<float> TD3_FAST_CONCAT(float_encoder_, TD3_FAST_INSTRUCTION_SET);
extern const Encoder<double> TD3_FAST_CONCAT(double_encoder_, TD3_FAST_INSTRUCTION_SET);
const Encoder<float> TD3_FAST_CONCAT(float_encoder_, TD3_FAST_INSTRUCTION_SET) = kEncoder<float>;
const Encoder<double> TD3_FAST_CONCAT(double_encoder_, TD3_FAST_INSTRUCTION_SET) = kEncoder<double>;

}  // namespace td3_fast::cpu
