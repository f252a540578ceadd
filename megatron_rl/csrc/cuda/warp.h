// The warp of a GPU, as device/columns.h asks for it.
#pragma once

#include "../device/columns.h"

namespace megatron_rl {

class GpuWarp {
 public:
  template <class T>
  struct PerLane {
    T value;
    __device__ __forceinline__ T& operator[](int) { return value; }
  };

  template <class Function>
  __device__ __forceinline__ void each(Function function) {
    function(static_cast<int>(threadIdx.x % kLanes));
  }

  template <class T>
  __device__ __forceinline__ PerLane<T> partner(PerLane<T> x, int distance) {
    return {__shfl_xor_sync(0xffffffffu, x.value, distance)};
  }

  __device__ __forceinline__ void barrier() { __syncwarp(); }

  static __device__ __forceinline__ Bits16 load_16(const void* from) {
    const uint4 bits = __ldcs(static_cast<const uint4*>(from));  // read once: first to leave
    return {bits.x, bits.y, bits.z, bits.w};
  }

  static __device__ __forceinline__ void store_16(const Bits16& bits, void* to) {
    const uint4 words = make_uint4(bits.word[0], bits.word[1], bits.word[2], bits.word[3]);
    __stcs(static_cast<uint4*>(to), words);
  }

  static __device__ __forceinline__ void keep_smallest(int64_t* to, int64_t value) {
    atomicMin(reinterpret_cast<long long*>(to), static_cast<long long>(value));
  }

  static __device__ __forceinline__ float larger(float a, float b) {
    return megatron_rl::larger(a, b);
  }

  static __device__ __forceinline__ uint32_t larger_pair(BFloat16, uint32_t a, uint32_t b) {
    uint32_t result;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }

  static __device__ __forceinline__ uint32_t larger_pair(Half, uint32_t a, uint32_t b) {
    uint32_t result;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }

  static __device__ __forceinline__ float widen_half(BFloat16, uint32_t bits) {
    return __uint_as_float(bits << 16);
  }

  static __device__ __forceinline__ float widen_half(Half, uint32_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
    return x;
  }

  static __device__ __forceinline__ uint32_t narrow_pair(BFloat16, float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }

  static __device__ __forceinline__ uint32_t narrow_pair(Half, float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
};

}  // namespace megatron_rl
