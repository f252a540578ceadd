// Memory of the logits' size on a CPU.
#pragma once

#include <ATen/ATen.h>

namespace megatron_rl {

// Contiguous, with the shape, dtype and device of `logits`, and nothing written to it that counts. On a
// CPU the memory of the last one, from 4 to 512 MiB, is kept for the next once its tensors are gone: the
// page faults of fresh memory take several times as long as the gradient does. (Huge pages fault less,
// but a virtual machine that hands free ones back to its host waits for the host instead.)
at::Tensor empty_like_logits(const at::Tensor& logits);

}  // namespace megatron_rl
