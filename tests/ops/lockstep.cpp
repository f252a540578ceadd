// A GPU's warp on the CPU, for test_device_code.py: the code of csrc/device/ with 32 lanes in a loop.
// Lanes run each phase forwards or backwards; where one lane of a phase needed what another one
// writes in it, the two would differ.
#include <cstring>
#include <vector>

#include "device/finish.h"
#include "device/gradient.h"
#include "device/words.h"

namespace megatron_rl {
namespace {

bool is_reversed = false;
int64_t num_wide_loads = 0;

class LockStepWarp {
 public:
  template <class T>
  struct PerLane {
    T at[kLanes];
    T& operator[](int lane) { return at[lane]; }
  };

  template <class Function>
  void each(Function function) {
    for (int i = 0; i < kLanes; ++i) function(is_reversed ? kLanes - 1 - i : i);
  }

  template <class T>
  PerLane<T> partner(const PerLane<T>& x, int distance) {
    PerLane<T> result;
    for (int lane = 0; lane < kLanes; ++lane) result.at[lane] = x.at[lane ^ distance];
    return result;
  }

  void barrier() {}

  static Bits16 load_16(const void* from) {
    check_aligned(from);
    ++num_wide_loads;
    Bits16 bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
  }

  static void store_16(const Bits16& bits, void* to) {
    check_aligned(to);
    std::memcpy(to, &bits, sizeof bits);
  }

  static void keep_smallest(int64_t* to, int64_t value) { *to = smaller(*to, value); }

  static float larger(float a, float b) { return a != a || a > b ? a : b; }

  template <class Scalar>
  static uint32_t larger_pair(Scalar, uint32_t a, uint32_t b) {
    const auto pick = [](uint32_t x, uint32_t y) {
      const float wide_x = widen_half(Scalar{}, x), wide_y = widen_half(Scalar{}, y);
      return wide_x != wide_x || wide_x > wide_y ? x : y;
    };
    return pick(a & 0xffffu, b & 0xffffu) | pick(a >> 16, b >> 16) << 16;
  }

  static float widen_half(BFloat16, uint32_t bits) { return from_bits(bits << 16); }
  static float widen_half(Half, uint32_t bits) {
    const auto half = static_cast<uint16_t>(bits);
    _Float16 x;
    std::memcpy(&x, &half, sizeof x);
    return static_cast<float>(x);
  }

  template <class Scalar>
  static uint32_t narrow_pair(Scalar, float low, float high) {
    return narrow(Scalar{}, low) | narrow(Scalar{}, high) << 16;
  }

 private:
  static void check_aligned(const void* address) {
    if (!is_aligned_16(address)) __builtin_trap();  // as a GPU would
  }

  static uint32_t narrow(BFloat16, float x) {
    const uint32_t bits = to_bits(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
  static uint32_t narrow(Half, float x) {
    const auto narrowed = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &narrowed, sizeof bits);
    return bits;
  }
};

template <class Scalar, bool kIsDivided, bool kHasEntropy>
void run_nodes(const NodesTask& task) {
  LockStepWarp warp;
  for (int64_t row = 0; row < task.num_rows; ++row) {
    for (int64_t tile = 0; tile < task.num_tiles; ++tile) {
      sum_tile<LockStepWarp, Scalar, kIsDivided, kHasEntropy>(warp, task, row, tile);
    }
    write_words<LockStepWarp, Scalar, kHasEntropy>(warp, task, row);
  }
}

template <class Scalar>
void run_nodes_of(const NodesTask& task, bool has_entropy) {
  if (task.temperature == 1.0f) {
    has_entropy ? run_nodes<Scalar, false, true>(task) : run_nodes<Scalar, false, false>(task);
  } else {
    has_entropy ? run_nodes<Scalar, true, true>(task) : run_nodes<Scalar, true, false>(task);
  }
}

template <class Scalar, bool kIsDivided>
void run_gradient(const GradientTask& task) {
  LockStepWarp warp;
  for (int64_t row = 0; row < task.num_rows; ++row) {
    for (int64_t tile = 0; tile < gradient_tiles(task); ++tile) {
      write_gradient_tile<LockStepWarp, Scalar, kIsDivided>(warp, task, row, tile);
    }
  }
}

template <class Scalar>
void run_gradient_of(const GradientTask& task) {
  task.temperature == 1.0f ? run_gradient<Scalar, false>(task) : run_gradient<Scalar, true>(task);
}

}  // namespace
}  // namespace megatron_rl

using namespace megatron_rl;

extern "C" {

void set_reversed(bool value) { is_reversed = value; }

// 16-byte loads so far: whether the wide path was taken.
int64_t wide_loads() { return num_wide_loads; }

void nodes(const void* logits, int kind, int64_t row_bytes, int64_t num_rows, const int64_t* labels,
           float temperature, int64_t first_column, int64_t end_column, int64_t vocab_size,
           bool has_entropy, int32_t* words, int64_t words_per_row) {
  const ShardLayout shard = shard_layout(first_column, end_column, vocab_size);
  NodesTask task = nodes_task(logits, row_bytes, num_rows, labels, temperature, shard);
  std::vector<TileSum> tiles(num_rows * task.num_tiles);
  task.tiles = tiles.data();
  task.words = words;
  task.words_per_row = words_per_row;
  if (kind == kFloat32) run_nodes_of<float>(task, has_entropy);
  if (kind == kBFloat16) run_nodes_of<BFloat16>(task, has_entropy);
  if (kind == kFloat16) run_nodes_of<Half>(task, has_entropy);
}

void finish(const int32_t* words, int64_t words_per_row, int64_t num_rows, const int64_t* labels,
            const int64_t* edges, int num_ranks, int64_t vocab_size, bool has_entropy,
            float* logprobs, float* entropy, int32_t* exponent, float* sum, float* maximum,
            const bool* is_counted, int64_t* flag) {
  FinishTask task = {words, words_per_row, num_rows, labels, vocab_size, num_ranks, has_entropy};
  std::memcpy(task.edges, edges, (num_ranks + 1) * sizeof *edges);
  task.logprobs = logprobs;
  task.entropy = entropy;
  task.exponent = exponent;
  task.sum = sum;
  task.maximum = maximum;
  task.is_counted = is_counted;
  task.flag = flag;
  LockStepWarp warp;
  FinishSpace space;
  for (int64_t row = 0; row < num_rows; ++row) finish_row(warp, task, row, space);
}

void gradient(const void* logits, int kind, int64_t logits_row_bytes, int64_t num_rows,
              int64_t num_columns, const int64_t* labels, const float* incoming,
              const int32_t* exponent, const float* sum, float temperature, int64_t first_column,
              int64_t vocab_size, void* gradient, int64_t gradient_row_bytes) {
  const int64_t width = smaller(num_columns, vocab_size - first_column);
  const GradientTask task = {logits,       gradient, logits_row_bytes, gradient_row_bytes,
                             num_rows,     num_columns, 0, width > 0 ? width : 0,
                             first_column, labels,   incoming,         exponent,
                             sum,          temperature};
  if (kind == kFloat32) run_gradient_of<float>(task);
  if (kind == kBFloat16) run_gradient_of<BFloat16>(task);
  if (kind == kFloat16) run_gradient_of<Half>(task);
}

}  // extern "C"
