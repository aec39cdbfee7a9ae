// Stores past the cache, for results that are too large for it. For the files that are compiled once per instruction
// set: all of it has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace s5eqx {
namespace {

// Whether vectors of so many bytes, at `p` and whole rows further on, are where such a store may go.
[[maybe_unused]] inline bool is_streamable(const void* p, int64_t row_bytes, int64_t vector_bytes) {
#if defined(__SSE2__)
  return vector_bytes >= 16 && (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(row_bytes)) % vector_bytes == 0;
#else
  return false;
#endif
}

template <typename V>
inline void stream(void* p, const V& v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) return _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) return _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#endif
  std::memcpy(p, &v, sizeof v);
}

// Before another thread is told that they are there.
[[maybe_unused]] inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace s5eqx
