// An optimiser step and its vector-Jacobian product, elementwise; built once per instruction set.
#pragma once

#include <cstdint>

#include "../adam_rates.h"

namespace td3_fast::cpu {

template <typename T>
struct Adam {
  // Parameters p and moments m and v of `count` elements, whose gradient is g, are moved by a step.
  void (*step)(const AdamRates<T>& rates, int64_t count, T* p, T* m, T* v, const T* g);

  // Cotangents of p, m and v after the step become those before it, that of p without its path through g;
  // to_g is written. No derivative flows through the root of a second moment that is 0.
  void (*adjoint)(const AdamRates<T>& rates,
                  int64_t count,
                  const T* p,
                  const T* m,
                  const T* v,
                  const T* g,
                  T* to_p,
                  T* to_m,
                  T* to_v,
                  T* to_g);
};

// That of the instruction set that tile.h has chosen.
template <typename T>
const Adam<T>& adam();

}  // namespace td3_fast::cpu
