// What every instruction set provides: sums over up to 16 granules, and the gradient of a row.
#pragma once

#include <cstdint>

#include "numerics.h"

namespace megatron_rl {

constexpr int kTileGranules = 16;  // 2,048 columns: 4 KB of BF16, read twice from the L1 cache

struct Tile {
  alignas(64) int32_t exponent[kTileGranules];
  alignas(64) float sum[kTileGranules];
  alignas(64) float weighted[kTileGranules];
  float maximum;  // the largest y; NaN if one is
  // Of a full tile: its granules merged, if the tile starts at a multiple of 16 granules.
  Node node;
};

struct CpuKernels {
  const char* name;
  // Of `num_granules` whole granules (1 to 16) that start at `logits`.
  using Granules = void (*)(const void* logits, int num_granules, float temperature, Tile& tile);
  Granules granules[kNumScalarKinds];
  Granules granules_with_entropy[kNumScalarKinds];
  // factor * p of every column; `gradient` may be `logits`.
  using Gradient = void (*)(const void* logits, void* gradient, int64_t num_columns,
                            const GradientRow& row);
  Gradient gradient[kNumScalarKinds];
  // exp(y) * 2^-N of every column, N being the exponent of the row's maximum.
  using Terms = void (*)(const void* logits, int64_t num_columns, float temperature, float maximum,
                         float* terms);
  Terms terms[kNumScalarKinds];
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEGATRON_RL_X86_KERNELS
extern const CpuKernels kAvx2Kernels;    // AVX2, FMA, F16C
extern const CpuKernels kAvx512Kernels;  // AVX-512 F, BW, VL, DQ
#endif

}  // namespace megatron_rl
