// The CPU kernels in AVX2, FMA and F16C. As in cpu_avx512.cpp: compiled for it alone, no header of
// torch.
#pragma GCC target("avx2,fma,f16c")

#include "cpu_tile.h"

#if defined(MEGATRON_RL_X86_KERNELS)
#include <immintrin.h>

namespace megatron_rl {
namespace {

inline __m256 load_half(const float* from) { return _mm256_loadu_ps(from); }
inline __m256 load_half(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load_half(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

struct Lanes {
  using Flag = __m256;
  __m256 low, high;

  static bool any(__m256 flag) { return _mm256_movemask_ps(flag) != 0; }

  template <class Scalar>
  static Lanes load(const Scalar* from) {
    return {load_half(from), load_half(from + 8)};
  }
};

struct HalfLanes {  // a type of this namespace, so that Op finds the functions on it
  __m256 x;
};

template <>
inline Lanes splat<Lanes>(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}

inline HalfLanes add(HalfLanes a, HalfLanes b) { return {_mm256_add_ps(a.x, b.x)}; }
inline HalfLanes larger(HalfLanes a, HalfLanes b) { return {_mm256_max_ps(a.x, b.x)}; }

inline Lanes add(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

inline Lanes larger(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}

inline Lanes subtract(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}

inline Lanes multiply(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}

inline Lanes divide(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}

inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline __m256 scale_by_low_bits(__m256 f, __m256 t) {
  const __m256i shift = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(f), shift));
}

inline Lanes scale_by_low_bits(Lanes f, Lanes t) {
  return {scale_by_low_bits(f.low, t.low), scale_by_low_bits(f.high, t.high)};
}

inline Lanes zero_below(Lanes y, Lanes floor, Lanes x) {
  return {_mm256_and_ps(_mm256_cmp_ps(y.low, floor.low, _CMP_NLT_UQ), x.low),
          _mm256_and_ps(_mm256_cmp_ps(y.high, floor.high, _CMP_NLT_UQ), x.high)};
}

inline void note_nan(__m256& flag, Lanes a, Lanes b) {
  const __m256 low = _mm256_cmp_ps(a.low, b.low, _CMP_UNORD_Q);
  const __m256 high = _mm256_cmp_ps(a.high, b.high, _CMP_UNORD_Q);
  flag = _mm256_or_ps(flag, _mm256_or_ps(low, high));
}

inline void store_half(__m256 x, float* to) { _mm256_storeu_ps(to, x); }

inline void store_half(__m256 x, BFloat16* to) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounding = _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, rounding), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  // Each 128-bit lane packs to its own half: bring the two together.
  const __m256i packed = _mm256_packus_epi32(result, result);
  const __m128i joined =
      _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), joined);
}

inline void store_half(__m256 x, Half* to) {
  const __m128i bits = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
}

template <class Scalar>
inline void store(Lanes x, Scalar* to) {
  store_half(x.low, to);
  store_half(x.high, to + 8);
}

// Even and odd lanes of two vectors meet, within each 128-bit lane.
template <class Op>
inline HalfLanes fold_lanes(__m256 a, __m256 b, Op op) {
  return op(HalfLanes{_mm256_shuffle_ps(a, b, 0x88)}, HalfLanes{_mm256_shuffle_ps(a, b, 0xdd)});
}

inline __m256 swap_middle(HalfLanes a) {
  const __m256d pairs = _mm256_castps_pd(a.x);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, _MM_SHUFFLE(3, 1, 2, 0)));
}

template <class Op>
inline Lanes fold(const Lanes (&rows)[kLanes], Op op) {
  HalfLanes by_2[8];  // of two rows each: lane bits 0 and 1 are folded
  for (int i = 0; i < 8; ++i) {
    const HalfLanes first = fold_lanes(rows[2 * i].low, rows[2 * i].high, op);
    const HalfLanes second = fold_lanes(rows[2 * i + 1].low, rows[2 * i + 1].high, op);
    by_2[i] = fold_lanes(first.x, second.x, op);
  }
  HalfLanes by_4[4];  // bit 2 stood between the 128-bit lanes
  for (int i = 0; i < 4; ++i) {
    const __m256 first = by_2[2 * i].x, second = by_2[2 * i + 1].x;
    by_4[i] = op(HalfLanes{_mm256_permute2f128_ps(first, second, 0x20)},
                 HalfLanes{_mm256_permute2f128_ps(first, second, 0x31)});
  }
  // Bit 3. The rows come as 0 1 4 5 2 3 6 7.
  return {swap_middle(fold_lanes(by_4[0].x, by_4[1].x, op)),
          swap_middle(fold_lanes(by_4[2].x, by_4[3].x, op))};
}

}  // namespace

const CpuKernels kAvx2Kernels = kernels_of<Lanes>("avx2");

}  // namespace megatron_rl
#endif
