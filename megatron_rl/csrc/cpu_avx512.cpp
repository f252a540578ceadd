// The CPU kernels in AVX-512. Only this file is compiled for it; token_logprobs.cpp looks at the CPU
// before it calls them. No header of torch here: their inline functions would be compiled for
// AVX-512 too, and the linker could take those copies for the whole extension.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

#include "cpu_tile.h"

#if defined(MEGATRON_RL_X86_KERNELS)
#include <immintrin.h>

namespace megatron_rl {
namespace {

struct Lanes {
  using Flag = __mmask16;
  __m512 x;

  static bool any(__mmask16 flag) { return flag != 0; }

  static Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Lanes load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Lanes load(const Half* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
};

template <>
inline Lanes splat<Lanes>(float x) {
  return {_mm512_set1_ps(x)};
}

inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Lanes divide(Lanes a, Lanes b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.x, b.x)}; }

inline Lanes scale_by_low_bits(Lanes f, Lanes t) {
  const __m512i shift = _mm512_slli_epi32(_mm512_castps_si512(t.x), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(f.x), shift))};
}

inline Lanes zero_below(Lanes y, Lanes floor, Lanes x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y.x, floor.x, _CMP_NLT_UQ), x.x)};
}

inline void note_nan(__mmask16& flag, Lanes a, Lanes b) {
  flag |= _mm512_cmp_ps_mask(a.x, b.x, _CMP_UNORD_Q);
}

inline void store(Lanes x, float* to) { _mm512_storeu_ps(to, x.x); }

// By hand: the conversion of AVX512-BF16 flushes denormals.
inline void store(Lanes x, BFloat16* to) {
  const __m512i bits = _mm512_castps_si512(x.x);
  const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounding = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, rounding), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.x, x.x, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
}

inline void store(Lanes x, Half* to) {
  const __m256i bits = _mm512_cvtps_ph(x.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}

// Even and odd lanes of a pair of vectors meet within each quarter, then even and odd quarters do.
template <class Op>
inline Lanes fold_lanes(Lanes a, Lanes b, Op op) {
  return op(Lanes{_mm512_shuffle_ps(a.x, b.x, 0x88)}, Lanes{_mm512_shuffle_ps(a.x, b.x, 0xdd)});
}

template <class Op>
inline Lanes fold_quarters(Lanes a, Lanes b, Op op) {
  return op(Lanes{_mm512_shuffle_f32x4(a.x, b.x, 0x88)},
            Lanes{_mm512_shuffle_f32x4(a.x, b.x, 0xdd)});
}

template <class Op>
inline Lanes fold(const Lanes (&rows)[kLanes], Op op) {
  Lanes by_1[8], by_2[4], by_4[2];
  for (int i = 0; i < 8; ++i) by_1[i] = fold_lanes(rows[2 * i], rows[2 * i + 1], op);
  for (int i = 0; i < 4; ++i) by_2[i] = fold_lanes(by_1[2 * i], by_1[2 * i + 1], op);
  for (int i = 0; i < 2; ++i) by_4[i] = fold_quarters(by_2[2 * i], by_2[2 * i + 1], op);
  return fold_quarters(by_4[0], by_4[1], op);
}

}  // namespace

const CpuKernels kAvx512Kernels = kernels_of<Lanes>("avx512");

}  // namespace megatron_rl
#endif
