// Vectors of the widest kind that the machine has, by the compiler's vector extension: no intrinsics, any architecture.

#pragma once

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vec __attribute__((vector_size(VL * 4)));
typedef float vec_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef uint32_t uvec __attribute__((vector_size(VL * 4)));
typedef uint16_t half_vec __attribute__((vector_size(VL * 2)));
typedef uint16_t half_vec_unaligned __attribute__((vector_size(VL * 2), aligned(2), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec_unaligned*>(p) = x; }

}  // namespace
