// Eight neighbouring columns of a row: what a lane of a GPU's warp loads and stores at once, 16 bytes
// of 16-bit logits and twice that of float32.
//
// The code of this folder is a template over `Warp`, 32 lanes that take every step together:
//
//   PerLane<T>, x[lane]      one T of each lane
//   each(f)                  f(lane) for every lane; on a GPU each thread calls it for its own
//   partner(x, distance)     lane i gets x of lane i ^ distance
//   barrier()                what a lane wrote to memory before it, all lanes can read behind it
//   load_16, store_16        16 bytes at an aligned address
//   widen_half, narrow_pair  16-bit floats
//   larger, larger_pair      NaN where one is NaN; of two 16-bit floats in a word
//   keep_smallest(to, value) value where it is smaller than what is there; other warps may do so too
//
// cuda/warp.h is one on a GPU, and tests/ops/lockstep.cpp one on the CPU: there each() is a loop over
// the lanes, so that the tests run this very code without a GPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../numerics.h"

#if defined(__CUDACC__)
#define MEGATRON_RL_DEVICE __device__ __forceinline__
#else
#define MEGATRON_RL_DEVICE inline
#endif

namespace megatron_rl {

constexpr int kLanes = 32;
constexpr int kColumns = 8;

struct alignas(16) Bits16 {
  uint32_t word[4];
};

template <class Scalar>
struct Columns {
  static constexpr int kNumWords = kColumns * static_cast<int>(sizeof(Scalar)) / 4;
  uint32_t word[kNumWords];
};

namespace {

template <class Warp, class Scalar>
MEGATRON_RL_DEVICE float widen(const Columns<Scalar>& columns, int i) {
  if constexpr (sizeof(Scalar) == sizeof(float)) {
    return from_bits(columns.word[i]);
  } else {
    const uint32_t pair = columns.word[i / 2];
    return Warp::widen_half(Scalar{}, i % 2 == 0 ? pair & 0xffffu : pair >> 16);
  }
}

// Rounded to the nearest, to even on a tie.
template <class Warp, class Scalar>
MEGATRON_RL_DEVICE Columns<Scalar> narrow(const float (&x)[kColumns]) {
  Columns<Scalar> columns;
  MEGATRON_RL_UNROLL
  for (int i = 0; i < Columns<Scalar>::kNumWords; ++i) {
    if constexpr (sizeof(Scalar) == sizeof(float)) {
      columns.word[i] = to_bits(x[i]);
    } else {
      columns.word[i] = Warp::narrow_pair(Scalar{}, x[2 * i], x[2 * i + 1]);
    }
  }
  return columns;
}

template <class Scalar>
MEGATRON_RL_DEVICE uint32_t minus_infinity() {
  if constexpr (std::is_same_v<Scalar, BFloat16>) return 0xff80u;
  if constexpr (std::is_same_v<Scalar, Half>) return 0xfc00u;
  return 0xff800000u;
}

MEGATRON_RL_DEVICE bool is_aligned_16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

template <class Warp, class Scalar>
MEGATRON_RL_DEVICE Columns<Scalar> load_wide(const Scalar* from) {
  Columns<Scalar> columns;
  MEGATRON_RL_UNROLL
  for (int i = 0; i < Columns<Scalar>::kNumWords / 4; ++i) {
    const Bits16 bits = Warp::load_16(reinterpret_cast<const char*>(from) + 16 * i);
    MEGATRON_RL_UNROLL
    for (int k = 0; k < 4; ++k) columns.word[4 * i + k] = bits.word[k];
  }
  return columns;
}

template <class Warp, class Scalar>
MEGATRON_RL_DEVICE void store_wide(const Columns<Scalar>& columns, Scalar* to) {
  MEGATRON_RL_UNROLL
  for (int i = 0; i < Columns<Scalar>::kNumWords / 4; ++i) {
    Bits16 bits;
    MEGATRON_RL_UNROLL
    for (int k = 0; k < 4; ++k) bits.word[k] = columns.word[4 * i + k];
    Warp::store_16(bits, reinterpret_cast<char*>(to) + 16 * i);
  }
}

// Columns [begin, end) of the eight at `from`, one by one; -inf for the others.
template <class Scalar>
MEGATRON_RL_DEVICE Columns<Scalar> load_narrow(const Scalar* from, int begin, int end) {
  Columns<Scalar> columns;
  MEGATRON_RL_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    const bool is_inside = begin <= i && i < end;
    if constexpr (sizeof(Scalar) == sizeof(float)) {
      columns.word[i] = is_inside ? to_bits(from[i]) : minus_infinity<Scalar>();
    } else {
      const uint32_t bits = is_inside ? from[i].bits : minus_infinity<Scalar>();
      columns.word[i / 2] = i % 2 == 0 ? bits : columns.word[i / 2] | bits << 16;
    }
  }
  return columns;
}

// The first `count` of the eight, one by one.
template <class Scalar>
MEGATRON_RL_DEVICE void store_narrow(const Columns<Scalar>& columns, Scalar* to, int count) {
  MEGATRON_RL_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    if (i >= count) continue;
    if constexpr (sizeof(Scalar) == sizeof(float)) {
      to[i] = from_bits(columns.word[i]);
    } else {
      to[i].bits = static_cast<uint16_t>(columns.word[i / 2] >> (i % 2 * 16));
    }
  }
}

// The largest of them; NaN if one is.
template <class Warp, class Scalar, int kCount>
MEGATRON_RL_DEVICE float largest_of(const Columns<Scalar> (&columns)[kCount]) {
  uint32_t pairs = columns[0].word[0];
  float maximum = from_bits(columns[0].word[0]);
  MEGATRON_RL_UNROLL
  for (int i = 0; i < kCount; ++i) {
    MEGATRON_RL_UNROLL
    for (int k = 0; k < Columns<Scalar>::kNumWords; ++k) {
      if constexpr (sizeof(Scalar) == sizeof(float)) {
        maximum = Warp::larger(maximum, from_bits(columns[i].word[k]));
      } else {
        pairs = Warp::larger_pair(Scalar{}, pairs, columns[i].word[k]);
      }
    }
  }
  if constexpr (sizeof(Scalar) == sizeof(float)) {
    return maximum;
  } else {
    return Warp::larger(Warp::widen_half(Scalar{}, pairs & 0xffffu),
                        Warp::widen_half(Scalar{}, pairs >> 16));
  }
}

}  // namespace
}  // namespace megatron_rl
