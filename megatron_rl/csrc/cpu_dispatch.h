// Which CPU kernels this machine can run.
#pragma once

#include <string>
#include <vector>

#include "cpu_kernels.h"

namespace megatron_rl {

// The fastest first.
const std::vector<const CpuKernels*>& supported_kernels();

// Those of the given name, or the fastest for an empty one; nullptr if this machine has none such.
const CpuKernels* find_kernels(const std::string& name);

// Their names, and those of the given name; c10::Error if this machine has none such.
std::vector<std::string> instruction_sets();
const CpuKernels& kernels_named(const std::string& name);

}  // namespace megatron_rl
