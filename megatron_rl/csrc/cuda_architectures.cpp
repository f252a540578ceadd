// What the CUDA kernels of this build run on, as setup.py says it; empty where it has none.
#include <torch/library.h>

#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
#if defined(MEGATRON_RL_CUDA_ARCHITECTURES)
  std::istringstream words(MEGATRON_RL_CUDA_ARCHITECTURES);
  for (std::string name; words >> name;) names.push_back(name);
#endif
  return names;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_rl, library) {
  library.def("cuda_architectures() -> str[]", cuda_architectures);
}
