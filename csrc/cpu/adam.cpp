// Adam on the CPU: one pass over the elements where a tensor library makes ten.

#include "adam.h"

#include <algorithm>

#include "../adam_arguments.h"
#include "adam_step.h"
#include "panels.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

// Elements by which tensors are cut, whole vectors, so that where they are cut changes no bits; and how many
// of these parts are worth a thread.
constexpr int64_t kElements = 2048, kWorthAThread = 8;

// run(zero, rates, first, count) for ranges of elements.
template <typename Run>
void for_elements(const Tensor& like,
                  at::ArrayRef<double> rates,
                  const OptionalTensor& size,
                  const Run& run) {
  const double step = size.has_value() ? size->item<double>() : rates[4];
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    const AdamRates<T> of_type = rounded_rates<T>(rates[0], rates[1], rates[2], rates[3], step);
    over_ranges(ceil_div(like.numel(), kElements), kWorthAThread, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kElements;
      run(zero, of_type, first, std::min(end * kElements, like.numel()) - first);
    });
  };
  like.scalar_type() == at::kDouble ? typed(double{}) : typed(float{});
}

}  // namespace

void adam_step_(const Tensor& parameter,
                const Tensor& first_moment,
                const Tensor& second_moment,
                const Tensor& gradient,
                at::ArrayRef<double> rates,
                const OptionalTensor& size) {
  check_adam({&parameter, &first_moment, &second_moment, &gradient}, rates, size);
  overwritten({&parameter, &first_moment, &second_moment});
  for_elements(parameter, rates, size, [&](auto zero, const auto& of_type, int64_t first, int64_t count) {
    using T = decltype(zero);
    adam<T>().step(of_type, count, parameter.mutable_data_ptr<T>() + first,
                   first_moment.mutable_data_ptr<T>() + first, second_moment.mutable_data_ptr<T>() + first,
                   gradient.const_data_ptr<T>() + first);
  });
}

void adam_step_from(const std::array<const Tensor*, 3>& state,
                    const std::array<const Tensor*, 3>& to,
                    const Tensor& gradient,
                    at::ArrayRef<double> rates) {
  check_adam({state[0], state[1], state[2], to[0], to[1], to[2], &gradient}, rates, {});
  for_elements(gradient, rates, {}, [&](auto zero, const auto& of_type, int64_t first, int64_t count) {
    using T = decltype(zero);
    // a piece at a time, so that it is copied to where it stays at hand
    for (int64_t at = first, left = count; left > 0; at += kElements, left -= kElements) {
      const int64_t here = std::min(left, kElements);
      T* of[3];
      for (int i = 0; i < 3; ++i) {
        of[i] = to[i]->mutable_data_ptr<T>() + at;
        std::copy_n(state[i]->const_data_ptr<T>() + at, here, of[i]);
      }
      adam<T>().step(of_type, here, of[0], of[1], of[2], gradient.const_data_ptr<T>() + at);
    }
  });
}

Tensor adam_adjoint_(const Tensor& parameter,
                     const Tensor& first_moment,
                     const Tensor& second_moment,
                     const Tensor& gradient,
                     const Tensor& to_parameter,
                     const Tensor& to_first_moment,
                     const Tensor& to_second_moment,
                     at::ArrayRef<double> rates,
                     const OptionalTensor& size) {
  check_adam({&parameter, &first_moment, &second_moment, &gradient, &to_parameter, &to_first_moment,
              &to_second_moment},
             rates, size);
  overwritten({&to_parameter, &to_first_moment, &to_second_moment});
  const Tensor to_gradient = gradient.new_empty(gradient.sizes());
  for_elements(parameter, rates, size, [&](auto zero, const auto& of_type, int64_t first, int64_t count) {
    using T = decltype(zero);
    adam<T>().adjoint(
        of_type, count, parameter.const_data_ptr<T>() + first, first_moment.const_data_ptr<T>() + first,
        second_moment.const_data_ptr<T>() + first, gradient.const_data_ptr<T>() + first,
        to_parameter.mutable_data_ptr<T>() + first, to_first_moment.mutable_data_ptr<T>() + first,
        to_second_moment.mutable_data_ptr<T>() + first, to_gradient.mutable_data_ptr<T>() + first);
  });
  return to_gradient;
}

}  // namespace td3_fast::cpu
