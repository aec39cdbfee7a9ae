// What the kernels ask of a device beyond C++. The tests put a host in its place (tests/cuda_host/host_device.h) and
// run the same kernels there.
#pragma once

#if defined(S5EQX_HOST_DEVICE)
#include "host_device.h"
#else
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace s5eqx {

using Stream = cudaStream_t;
using Status = cudaError_t;

#if defined(__CUDACC__)
// Shared memory of one block; `type` is trivial.
#define S5EQX_SHARED(type, name) __shared__ type name

// One word that is data and signal at once needs no fence: whoever sees the word, sees all of it.
__device__ inline uint64_t load_relaxed(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void store_relaxed(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__device__ inline uint64_t fetch_add(uint64_t* word, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(word), static_cast<unsigned long long>(value));
}

__device__ inline void pause() { __nanosleep(20); }

__device__ inline float fused(float x, float y, float z) { return __fmaf_rn(x, y, z); }
__device__ inline double fused(double x, double y, double z) { return __fma_rn(x, y, z); }

__device__ inline uint64_t bits_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
__device__ inline double double_of(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }

template <typename T>
__device__ inline T shuffle_up(T x, unsigned lanes) {
  return __shfl_up_sync(0xffffffffu, x, lanes);
}
template <typename T>
__device__ inline T shuffle_down(T x, unsigned lanes) {
  return __shfl_down_sync(0xffffffffu, x, lanes);
}
__device__ inline uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
#endif

// Multiprocessors of the current device, asked once a device and never on a stream: a capture may be under way.
inline int multiprocessors() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (device < kDevices && known[device] > 0) return known[device];
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  if (device < kDevices) known[device] = count;
  return count;
}

inline Status fill_ones(void* memory, int64_t bytes, Stream stream) {
  return cudaMemsetAsync(memory, 0xff, bytes, stream);
}

template <typename Argument>
Status launch(void (*kernel)(Argument), int64_t blocks, int threads, Stream stream, Argument argument) {
  void* arguments[] = {&argument};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(threads)), arguments, 0, stream);
}

}  // namespace s5eqx
#endif
