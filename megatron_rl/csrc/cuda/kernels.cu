// The kernels of a GPU: device/ with a warp's own lanes, four warps a block. One warp, one piece of
// work; no block waits for another and nothing is added atomically (the flag of broken rows is a
// minimum of integers), so the bits do not depend on the launch.
#include "../device/words.h"
#include "launch.h"
#include "warp.h"

namespace megatron_rl {
namespace {

constexpr int kWarpsPerBlock = 4, kBlock = kWarpsPerBlock * kLanes;
constexpr int64_t kMostRows = 65535;  // of a grid

__device__ __forceinline__ int64_t warp_index() {
  return int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kLanes;
}

template <class Scalar, bool kIsDivided, bool kHasEntropy>
__global__ void __launch_bounds__(kBlock) tile_kernel(const __grid_constant__ NodesTask task) {
  GpuWarp warp;
  if (warp_index() < task.num_tiles) {
    const int64_t row = task.first_row + blockIdx.y;
    sum_tile<GpuWarp, Scalar, kIsDivided, kHasEntropy>(warp, task, row, warp_index());
  }
}

template <class Scalar, bool kHasEntropy>
__global__ void __launch_bounds__(kBlock) words_kernel(const __grid_constant__ NodesTask task) {
  GpuWarp warp;
  if (warp_index() < task.num_rows) {
    write_words<GpuWarp, Scalar, kHasEntropy>(warp, task, warp_index());
  }
}

__global__ void __launch_bounds__(kBlock) finish_kernel(const __grid_constant__ FinishTask task) {
  // Raw, because the tree has a constructor, which shared memory does not run.
  __shared__ alignas(FinishSpace) unsigned char spaces[kWarpsPerBlock][sizeof(FinishSpace)];
  GpuWarp warp;
  if (warp_index() < task.num_rows) {
    auto& space = *reinterpret_cast<FinishSpace*>(spaces[threadIdx.x / kLanes]);
    finish_row(warp, task, warp_index(), space);
  }
}

template <class Scalar, bool kIsDivided>
__global__ void __launch_bounds__(kBlock)
    gradient_kernel(const __grid_constant__ GradientTask task) {
  GpuWarp warp;
  if (warp_index() * kGradientColumns < task.num_columns) {
    const int64_t row = task.first_row + blockIdx.y;
    write_gradient_tile<GpuWarp, Scalar, kIsDivided>(warp, task, row, warp_index());
  }
}

unsigned num_blocks(int64_t num_warps) {
  return static_cast<unsigned>((num_warps + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

// A warp for each row.
template <class Task>
cudaError_t launch_rows(void (*kernel)(Task), const Task& task, cudaStream_t stream) {
  if (task.num_rows > 0) kernel<<<num_blocks(task.num_rows), kBlock, 0, stream>>>(task);
  return cudaGetLastError();
}

// `num_tiles` warps for each row.
template <class Task>
cudaError_t launch_tiles(void (*kernel)(Task), Task task, int64_t num_tiles, cudaStream_t stream) {
  for (; num_tiles > 0 && task.first_row < task.num_rows; task.first_row += kMostRows) {
    const int64_t num_rows = smaller(task.num_rows - task.first_row, kMostRows);
    const dim3 grid(num_blocks(num_tiles), static_cast<unsigned>(num_rows));
    kernel<<<grid, kBlock, 0, stream>>>(task);
  }
  return cudaGetLastError();
}

template <class Scalar, bool kHasEntropy>
cudaError_t launch_nodes_of(const NodesTask& task, cudaStream_t stream) {
  const bool is_divided = task.temperature != 1.0f;
  const auto kernel = is_divided ? tile_kernel<Scalar, true, kHasEntropy>
                                 : tile_kernel<Scalar, false, kHasEntropy>;
  const cudaError_t error = launch_tiles(kernel, task, task.num_tiles, stream);
  if (error != cudaSuccess) return error;
  return launch_rows(words_kernel<Scalar, kHasEntropy>, task, stream);
}

template <class Scalar>
cudaError_t launch_gradient_of(const GradientTask& task, cudaStream_t stream) {
  const bool is_divided = task.temperature != 1.0f;
  const auto kernel = is_divided ? gradient_kernel<Scalar, true> : gradient_kernel<Scalar, false>;
  return launch_tiles(kernel, task, gradient_tiles(task), stream);
}

}  // namespace

cudaError_t launch_nodes(const NodesTask& task, ScalarKind kind, bool has_entropy,
                         cudaStream_t stream) {
  switch (kind) {
    case kFloat32:
      return has_entropy ? launch_nodes_of<float, true>(task, stream)
                         : launch_nodes_of<float, false>(task, stream);
    case kBFloat16:
      return has_entropy ? launch_nodes_of<BFloat16, true>(task, stream)
                         : launch_nodes_of<BFloat16, false>(task, stream);
    case kFloat16:
      return has_entropy ? launch_nodes_of<Half, true>(task, stream)
                         : launch_nodes_of<Half, false>(task, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_finish(const FinishTask& task, cudaStream_t stream) {
  return launch_rows(finish_kernel, task, stream);
}

cudaError_t launch_gradient(const GradientTask& task, ScalarKind kind, cudaStream_t stream) {
  switch (kind) {
    case kFloat32:
      return launch_gradient_of<float>(task, stream);
    case kBFloat16:
      return launch_gradient_of<BFloat16>(task, stream);
    case kFloat16:
      return launch_gradient_of<Half>(task, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace megatron_rl
