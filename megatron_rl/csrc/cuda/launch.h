// Starts the kernels of kernels.cu on a stream of the current device; no header of torch. The error
// is that of the launch.
#pragma once

#include <cuda_runtime_api.h>

#include "../device/finish.h"
#include "../device/gradient.h"
#include "../device/tile.h"

namespace megatron_rl {

// Two kernels: tiles, then words.
cudaError_t launch_nodes(const NodesTask& task, ScalarKind kind, bool has_entropy,
                         cudaStream_t stream);
cudaError_t launch_finish(const FinishTask& task, cudaStream_t stream);
cudaError_t launch_gradient(const GradientTask& task, ScalarKind kind, cudaStream_t stream);

}  // namespace megatron_rl
