// The operators of token_logprobs.cpp on CUDA tensors: they check what they are given, allocate, and
// start the kernels on the current stream of the tensors' device. Nothing here waits for the GPU.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../scalar_kind.h"
#include "launch.h"

namespace megatron_rl {
namespace {

constexpr int64_t kScratchBytes = 32 << 20;  // for the tiles of so many rows at a time

ScalarKind kind_of(const at::Tensor& logits) {
  TORCH_CHECK(logits.is_cuda() && logits.dim() == 2 &&
                  (logits.stride(1) == 1 || logits.size(1) <= 1),
              "logits: expected [N, V] on a CUDA device with columns side by side");
  return scalar_kind_of(logits);
}

int64_t row_bytes(const at::Tensor& logits) { return logits.stride(0) * logits.element_size(); }

// [N] of the given type on the device, side by side.
at::Tensor rows_of(const at::Tensor& values, const char* name, int64_t num_rows, at::Device device,
                   at::ScalarType type) {
  TORCH_CHECK(values.device() == device && values.scalar_type() == type && values.dim() == 1 &&
                  values.size(0) == num_rows,
              name, ": expected [", num_rows, "] ", type, " on ", device, ", got ", values.sizes(),
              " ", values.scalar_type(), " on ", values.device());
  return values.contiguous();
}

cudaStream_t stream_of(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}

at::Tensor nodes_cuda(const at::Tensor& logits, const at::Tensor& labels, double temperature,
                      at::IntArrayRef edges, int64_t rank, int64_t vocab_size, bool has_entropy,
                      c10::string_view) {
  const c10::DeviceGuard guard(logits.device());
  const ScalarKind kind = kind_of(logits);
  const int64_t num_rows = logits.size(0), num_ranks = static_cast<int64_t>(edges.size()) - 1;
  TORCH_CHECK(0 <= rank && rank < num_ranks && logits.size(1) == edges[rank + 1] - edges[rank],
              "logits: expected the columns of shard ", rank, " of ", edges, ", got ",
              logits.size(1));
  const ShardLayout shard = shard_layout(edges[rank], edges[rank + 1], vocab_size);
  const int64_t stride = words_per_row(edges.data(), num_ranks, vocab_size, has_entropy);
  const at::Tensor ids = rows_of(labels, "labels", num_rows, logits.device(), at::kLong);
  const at::Tensor words = at::empty({num_rows, stride}, logits.options().dtype(at::kInt));
  NodesTask task = nodes_task(logits.const_data_ptr(), row_bytes(logits), num_rows,
                              ids.const_data_ptr<int64_t>(), static_cast<float>(temperature), shard);
  task.words_per_row = stride;
  const int64_t row_scratch = std::max<int64_t>(1, task.num_tiles * sizeof(TileSum));
  const int64_t step = std::max<int64_t>(1, std::min(num_rows, kScratchBytes / row_scratch));
  const at::Tensor tiles = at::empty({step * row_scratch}, logits.options().dtype(at::kByte));
  task.tiles = static_cast<TileSum*>(tiles.mutable_data_ptr());
  for (int64_t first = 0; first < num_rows; first += step) {
    task.logits = static_cast<const char*>(logits.const_data_ptr()) + first * task.row_bytes;
    task.labels = ids.const_data_ptr<int64_t>() + first;
    task.words = words.mutable_data_ptr<int32_t>() + first * stride;
    task.num_rows = std::min(step, num_rows - first);
    C10_CUDA_CHECK(launch_nodes(task, kind, has_entropy, stream_of(logits)));
  }
  return words;
}

using Finished = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Finished finish_cuda(const at::Tensor& nodes, const at::Tensor& labels, at::IntArrayRef edges,
                     int64_t vocab_size, bool has_entropy, c10::string_view,
                     const std::optional<at::Tensor>& is_counted,
                     const std::optional<at::Tensor>& flag) {
  const c10::DeviceGuard guard(nodes.device());
  const int64_t num_ranks = static_cast<int64_t>(edges.size()) - 1, num_rows = labels.size(0);
  TORCH_CHECK(num_ranks <= kMaxRanks, "edges: expected at most ", kMaxRanks, " shards, got ",
              num_ranks);
  const int64_t stride = words_per_row(edges.data(), num_ranks, vocab_size, has_entropy);
  TORCH_CHECK(nodes.is_contiguous() && nodes.scalar_type() == at::kInt &&
                  nodes.sizes() == at::IntArrayRef({num_ranks, num_rows, stride}),
              "nodes: expected [", num_ranks, ", ", num_rows, ", ", stride, "] int32, got ",
              nodes.sizes());
  const at::Tensor ids = rows_of(labels, "labels", num_rows, nodes.device(), at::kLong);
  const auto floats = nodes.options().dtype(at::kFloat);
  const at::Tensor logprobs = at::empty({num_rows}, floats);
  const at::Tensor entropy = at::empty({has_entropy ? num_rows : 0}, floats);
  const at::Tensor exponent = at::empty({num_rows}, nodes.options());
  const at::Tensor sum = at::empty({num_rows}, floats), maximum = at::empty({num_rows}, floats);
  FinishTask task = {nodes.const_data_ptr<int32_t>(), stride, num_rows,
                     ids.const_data_ptr<int64_t>(), vocab_size, static_cast<int>(num_ranks),
                     has_entropy};
  std::copy(edges.begin(), edges.end(), task.edges);
  task.logprobs = logprobs.mutable_data_ptr<float>();
  task.entropy = has_entropy ? entropy.mutable_data_ptr<float>() : nullptr;
  task.exponent = exponent.mutable_data_ptr<int32_t>();
  task.sum = sum.mutable_data_ptr<float>();
  task.maximum = maximum.mutable_data_ptr<float>();
  at::Tensor counted;
  if (is_counted) {
    counted = rows_of(*is_counted, "is_counted", num_rows, nodes.device(), at::kBool);
    task.is_counted = counted.const_data_ptr<bool>();
  }
  if (flag) {
    const at::Tensor first = rows_of(*flag, "flag", 1, nodes.device(), at::kLong);
    task.flag = first.mutable_data_ptr<int64_t>();
  }
  C10_CUDA_CHECK(launch_finish(task, stream_of(nodes)));
  return {logprobs, entropy, exponent, sum, maximum};
}

void gradient_cuda(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& incoming,
                   const at::Tensor& exponent, const at::Tensor& sum, double temperature,
                   int64_t first_column, int64_t vocab_size, const at::Tensor& gradient,
                   c10::string_view) {
  const c10::DeviceGuard guard(logits.device());
  const ScalarKind kind = kind_of(logits);
  TORCH_CHECK(kind_of(gradient) == kind && gradient.sizes() == logits.sizes() &&
                  gradient.device() == logits.device(),
              "gradient: expected the logits' dtype, shape and device");
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  const at::Device device = logits.device();
  const at::Tensor ids = rows_of(labels, "labels", num_rows, device, at::kLong);
  const at::Tensor grads = rows_of(incoming, "incoming", num_rows, device, at::kFloat);
  const at::Tensor exponents = rows_of(exponent, "exponent", num_rows, device, at::kInt);
  const at::Tensor sums = rows_of(sum, "sum", num_rows, device, at::kFloat);
  GradientTask task = {};
  task.logits = logits.const_data_ptr();
  task.gradient = gradient.mutable_data_ptr();
  task.logits_row_bytes = row_bytes(logits);
  task.gradient_row_bytes = row_bytes(gradient);
  task.num_rows = num_rows;
  task.num_columns = num_columns;
  task.width = std::max<int64_t>(0, std::min(num_columns, vocab_size - first_column));
  task.first_column = first_column;
  task.labels = ids.const_data_ptr<int64_t>();
  task.incoming = grads.const_data_ptr<float>();
  task.exponent = exponents.const_data_ptr<int32_t>();
  task.sum = sums.const_data_ptr<float>();
  task.temperature = static_cast<float>(temperature);
  C10_CUDA_CHECK(launch_gradient(task, kind, stream_of(logits)));
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_rl, CUDA, library) {
  library.impl("token_logprobs_nodes", nodes_cuda);
  library.impl("token_logprobs_finish", finish_cuda);
  library.impl("token_logprobs_gradient", gradient_cuda);
}

}  // namespace megatron_rl
