// Rows of logits in memory, and what every loop over them on a CPU needs.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cfenv>
#include <cstring>

#include "cpu_kernels.h"
#include "numerics.h"
#include "scalar_kind.h"

#if defined(MEGATRON_RL_X86_KERNELS)
#include <immintrin.h>
#endif

namespace megatron_rl {
namespace {

constexpr int64_t kColumnsPerTask = 1 << 15;  // fewer are not worth another thread

// Nearest rounding, denormals kept, as long as it lives: torch.set_flush_denormal and whatever
// else a thread carries must not change a bit.
class FloatEnvironment {
 public:
#if defined(MEGATRON_RL_X86_KERNELS)
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
};

inline ScalarKind kind_of(const at::Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1),
              "logits: expected [N, V] with columns side by side");
  return scalar_kind_of(logits);
}

// One row of logits, addressed by column within the shard.
struct Row {
  char* begin;
  ScalarKind kind;
  float temperature;

  char* at(int64_t column) const { return begin + column * (kind == kFloat32 ? 4 : 2); }

  float logit(int64_t column) const {
    float x;
    if (kind == kFloat32) {
      std::memcpy(&x, at(column), sizeof x);
    } else {
      uint16_t bits;
      std::memcpy(&bits, at(column), sizeof bits);
      x = kind == kBFloat16 ? from_bits(static_cast<uint32_t>(bits) << 16)
                            : static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
    }
    return temperature == 1.0f ? x : divide(x, temperature);
  }

  void set(int64_t column, float x) const {
    if (kind == kFloat32) {
      std::memcpy(at(column), &x, sizeof x);
    } else {
      const uint16_t bits = kind == kBFloat16 ? c10::BFloat16(x).x : c10::Half(x).x;
      std::memcpy(at(column), &bits, sizeof bits);
    }
  }
};

inline Row row_of(const at::Tensor& logits, int64_t row, ScalarKind kind, float temperature) {
  char* begin = static_cast<char*>(logits.data_ptr());
  return {begin + row * logits.stride(0) * logits.element_size(), kind, temperature};
}

inline int64_t rows_per_task(int64_t num_columns) {
  return std::max<int64_t>(1, kColumnsPerTask / std::max<int64_t>(1, num_columns));
}

}  // namespace
}  // namespace megatron_rl
