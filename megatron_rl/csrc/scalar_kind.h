// The type of logits, as the device code names it.
#pragma once

#include <ATen/ATen.h>

#include "numerics.h"

namespace megatron_rl {

inline ScalarKind scalar_kind_of(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK(false, "logits: expected float32, bfloat16 or float16, got ", logits.dtype());
  }
}

}  // namespace megatron_rl
