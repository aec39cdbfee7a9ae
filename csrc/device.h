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
// As many bytes of it as the launch asks for.
#define S5EQX_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

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

// TF32 is float32 with 10 bits of fraction.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kCompilesTf32 = false;
#else
constexpr bool kCompilesTf32 = true;
__device__ inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

// c += a b of (16, 8), (8, 8) and (16, 8) matrices, each spread over a warp as mma.m16n8k8 has it.
__device__ inline void multiply_tf32(float (&upper)[2], float (&lower)[2], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
#endif

// An attribute of the current device, asked once a device and never on a stream: a capture may be under way.
template <cudaDeviceAttr kAttribute>
int attribute(int otherwise) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
  if (device < kDevices && known[device] > 0) return known[device];
  if (cudaDeviceGetAttribute(&value, kAttribute, device) != cudaSuccess) return otherwise;
  if (device < kDevices) known[device] = value;
  return value;
}
inline int multiprocessors() { return attribute<cudaDevAttrMultiProcessorCount>(1); }

// Whether what the current device runs of a kernel holds its tensor core instructions. A new device may run old PTX.
template <typename Argument>
bool was_compiled_for_tf32(void (*kernel)(Argument)) {
  cudaFuncAttributes of{};
  return cudaFuncGetAttributes(&of, reinterpret_cast<const void*>(kernel)) == cudaSuccess && of.ptxVersion >= 80;
}

inline Status fill_ones(void* memory, int64_t bytes, Stream stream) {
  return cudaMemsetAsync(memory, 0xff, bytes, stream);
}

template <typename Argument>
Status launch(void (*kernel)(Argument), int64_t blocks, int threads, Stream stream, Argument argument,
              int shared_bytes = 0) {
  void* arguments[] = {&argument};
  const void* const function = reinterpret_cast<const void*>(kernel);
  constexpr int kUnasked = 48 << 10;
  if (shared_bytes > kUnasked) {
    const Status status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  return cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                          arguments, static_cast<size_t>(shared_bytes), stream);
}

}  // namespace s5eqx
#endif
