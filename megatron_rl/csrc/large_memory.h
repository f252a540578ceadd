// Memory of the logits' size on a CPU.
#pragma once

#include <ATen/ATen.h>

namespace megatron_rl {

// Contiguous, with the shape, dtype and device of `logits`, and nothing written to it yet. On a CPU a
// large one asks the kernel for huge pages: in small ones, the page faults of the first write take
// longer than the gradient does.
at::Tensor empty_like_logits(const at::Tensor& logits);

}  // namespace megatron_rl
