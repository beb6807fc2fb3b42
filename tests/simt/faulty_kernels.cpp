// Kernels with one fault each, which the shim must find.

#include "device.cuh"

namespace td3_fast::cuda {
namespace {

void neighbour(float* out, bool waits) {
  float* values = shared_memory<float>();
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (waits) block_barrier();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

void copied(float* out, const float* from, bool waits) {
  float* values = shared_memory<float>();
  simt::copy_async(values + threadIdx.x, from + threadIdx.x, 4, 4);
  simt::commit_copies();
  if (waits) simt::wait_copies(0);
  out[threadIdx.x] = values[threadIdx.x];
}

void divergent_barrier(float* out) {
  if (threadIdx.x < 40) block_barrier();
  out[threadIdx.x] = 0;
}

void divergent_lanes(float* out) {
  out[threadIdx.x] = threadIdx.x % 2 != 0 ? shuffle_xor(1.0f, 1) : static_cast<float>(ballot(true));
}

void beyond_shared(float* out) {
  out[threadIdx.x] = shared_memory<float>()[threadIdx.x + 1];
}

void beyond_global(float* out, const float* from) {
  out[threadIdx.x] = from[threadIdx.x + 1];
}

}  // namespace

// out and from: 64 floats; null, or what was found.
extern "C" const char* simt_faulty(int which, float* out, const float* from) {
  const auto run = [](auto kernel, auto... parameters) {
    return launch<decltype(parameters)...>(kernel, dim3(1), 64, 64 * sizeof(float), nullptr, parameters...);
  };
  switch (which) {
    case 0:
      return run(neighbour, out, true);
    case 1:
      return run(neighbour, out, false);
    case 2:
      return run(copied, out, from, true);
    case 3:
      return run(copied, out, from, false);
    case 4:
      return run(divergent_barrier, out);
    case 5:
      return run(divergent_lanes, out);
    case 6:
      return run(beyond_shared, out);
    default:
      return run(beyond_global, out, from);
  }
}

}  // namespace td3_fast::cuda
