#include "large_memory.h"

#include <torch/library.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace megatron_rl {
namespace {

constexpr uintptr_t kHugePage = 2 << 20;
// Below it a few page faults cost less than asking.
constexpr int64_t kLargeBytes = 4 << 20;

// Only whole huge pages inside: no byte more becomes resident, and no neighbour changes. A kernel
// without them refuses, and the memory is as good as before.
void ask_for_huge_pages(const at::Tensor& memory) {
#if defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<uintptr_t>(memory.data_ptr());
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + memory.nbytes()) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

at::Tensor empty_like_logits(const at::Tensor& logits) {
  at::Tensor memory = at::empty(logits.sizes(), logits.options());
  const auto num_bytes = static_cast<int64_t>(memory.nbytes());
  if (memory.is_cpu() && num_bytes >= kLargeBytes) ask_for_huge_pages(memory);
  return memory;
}

TORCH_LIBRARY_FRAGMENT(megatron_rl, library) {
  library.def("empty_like_logits(Tensor logits) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_rl, CompositeExplicitAutograd, library) {
  library.impl("empty_like_logits", empty_like_logits);
}

}  // namespace megatron_rl
