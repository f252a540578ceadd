#include "large_memory.h"

#include <c10/util/strides.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>

namespace megatron_rl {
namespace {

constexpr size_t kLeastKept = 4 << 20, kMostKept = 512 << 20;  // bytes

// One piece of memory that its last tensor has left, or is still in use by.
class LastMemory {
 public:
  // Storage of at least so many bytes that no tensor uses.
  at::Storage take(const at::Tensor& logits, size_t num_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool is_free = storage_.has_value() && storage_->use_count() == 1;
    // What its last user did to it, in whichever thread, comes before what is done next.
    std::atomic_thread_fence(std::memory_order_acquire);
    // Not a far larger one: a small tensor must not hold a large one's memory.
    if (is_free && num_bytes <= storage_->nbytes() && storage_->nbytes() <= 2 * num_bytes) {
      return *storage_;
    }
    if (is_free) storage_.reset();  // before the new one: never both
    const auto count = static_cast<int64_t>(num_bytes);
    storage_ = at::empty({count}, logits.options().dtype(at::kByte)).storage();
    return *storage_;
  }

 private:
  std::mutex mutex_;
  std::optional<at::Storage> storage_;
};

// Never destroyed: at the end of the process its tensors may outlive it.
LastMemory& last_memory() {
  static auto* memory = new LastMemory;
  return *memory;
}

}  // namespace

at::Tensor empty_like_logits(const at::Tensor& logits) {
  const size_t num_bytes = logits.numel() * logits.element_size();
  if (!logits.is_cpu() || num_bytes < kLeastKept || num_bytes > kMostKept) {
    return at::empty(logits.sizes(), logits.options());
  }
  at::Tensor memory = at::empty({0}, logits.options());
  const at::Storage storage = last_memory().take(logits, num_bytes);
  return memory.set_(storage, 0, logits.sizes(), c10::contiguous_strides(logits.sizes()));
}

TORCH_LIBRARY_FRAGMENT(megatron_rl, library) {
  library.def("empty_like_logits(Tensor logits) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_rl, CompositeExplicitAutograd, library) {
  library.impl("empty_like_logits", empty_like_logits);
}

}  // namespace megatron_rl
