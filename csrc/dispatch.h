// Operators of this library by name, for those that call one another.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace td3_fast {

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace td3_fast
