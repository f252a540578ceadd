#include "cpu_dispatch.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

namespace megatron_rl {
namespace {

std::vector<const CpuKernels*> look_at_cpu() {
  std::vector<const CpuKernels*> kernels;
#if defined(MEGATRON_RL_X86_KERNELS)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx2 && has_avx512) kernels.push_back(&kAvx512Kernels);
  if (has_avx2) kernels.push_back(&kAvx2Kernels);
#endif
  kernels.push_back(&kPortableKernels);
  return kernels;
}

}  // namespace

const std::vector<const CpuKernels*>& supported_kernels() {
  static const std::vector<const CpuKernels*> kernels = look_at_cpu();
  return kernels;
}

const CpuKernels* find_kernels(const std::string& name) {
  for (const CpuKernels* kernels : supported_kernels()) {
    if (name.empty() || name == kernels->name) return kernels;
  }
  return nullptr;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : supported_kernels()) names.emplace_back(kernels->name);
  return names;
}

const CpuKernels& kernels_named(const std::string& name) {
  const CpuKernels* kernels = find_kernels(name);
  TORCH_CHECK(kernels != nullptr, "instruction_set: expected one of ",
              c10::Join(", ", instruction_sets()), ", got ", name);
  return *kernels;
}

}  // namespace megatron_rl
