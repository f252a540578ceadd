// The operators of ops/support.py on CPU tensors: how many columns of a row fall into each bin of
// their ordered keys, and how much probability; and the row with what lies outside its support at
// -inf. ops/support_reference.py is the same in torch.
//
// A key is an unsigned integer that orders as the logit does: the bits of a 16-bit logit, or of
// y = logit / temperature in float32, with the sign bit flipped, or all bits of a negative one.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <string>

#include "cpu_dispatch.h"
#include "cpu_rows.h"
#include "large_memory.h"

namespace megatron_rl {
namespace {

constexpr int64_t kTileColumns = 2048;
constexpr int64_t kBlock = 64;  // columns that are looked at together, most of which match nothing
constexpr int64_t kBins = 256;
constexpr double kMassUnit = 0x1p+40;

using Keys = std::array<uint32_t, kTileColumns>;

template <class Bits>
Bits ordered(Bits bits) {
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  if (bits == kSign) bits = 0;  // -0 equals 0
  return static_cast<Bits>(bits & kSign ? ~bits : bits | kSign);
}

void write_keys(const Row& row, int64_t begin, int64_t count, Keys& keys) {
  if (row.kind == kFloat32) {
    const auto* x = reinterpret_cast<const float*>(row.at(begin));
    if (row.temperature == 1.0f) {
      for (int64_t i = 0; i < count; ++i) keys[i] = ordered(to_bits(x[i]));
    } else {
      for (int64_t i = 0; i < count; ++i) keys[i] = ordered(to_bits(divide(x[i], row.temperature)));
    }
  } else {
    const auto* bits = reinterpret_cast<const uint16_t*>(row.at(begin));
    for (int64_t i = 0; i < count; ++i) keys[i] = ordered(bits[i]);
  }
}

// Keys that are looked for: `low` to `low + reach`.
struct Range {
  uint32_t low, reach;
  bool is_empty;

  bool has(uint32_t key) const { return key - low <= reach; }
};

Range range_of(int64_t low, int64_t high) {
  if (low > high) return {0, 0, true};
  return {static_cast<uint32_t>(low), static_cast<uint32_t>(high - low), false};
}

// round(e * 2^40), ties to even: adding 1.5 * 2^52 leaves no room for a fraction.
int64_t mass_of(float e) {
  const double scaled = static_cast<double>(e) * kMassUnit;
  return static_cast<int64_t>((scaled + 0x1.8p+52) - 0x1.8p+52);
}

void count_row(const Row& row, int64_t width, float maximum, const Range& range, int shift,
               const CpuKernels& kernels, int64_t* counts, int64_t* masses) {
  Keys keys;
  alignas(64) float terms[kTileColumns];
  for (int64_t begin = 0; begin < width; begin += kTileColumns) {
    const int64_t count = std::min(kTileColumns, width - begin);
    write_keys(row, begin, count, keys);
    bool has_terms = false;
    for (int64_t block = 0; block < count; block += kBlock) {
      const int64_t end = std::min(block + kBlock, count);
      uint32_t num_found = 0;
      for (int64_t i = block; i < end; ++i) num_found += range.has(keys[i]);
      if (num_found == 0) continue;
      if (masses != nullptr && !has_terms) {
        kernels.terms[row.kind](row.at(begin), count, row.temperature, maximum, terms);
        has_terms = true;
      }
      for (int64_t i = block; i < end; ++i) {
        if (!range.has(keys[i])) continue;
        const uint32_t bin = (keys[i] >> shift) & (kBins - 1);
        ++counts[bin];
        if (masses != nullptr) masses[bin] += mass_of(terms[i]);
      }
    }
  }
}

at::Tensor support_histogram(const at::Tensor& logits, const at::Tensor& maximum,
                             const at::Tensor& low, const at::Tensor& high, double temperature,
                             int64_t width, int64_t shift, bool has_masses,
                             c10::string_view instruction_set) {
  const CpuKernels& kernels = kernels_named(std::string(instruction_set));
  const ScalarKind kind = kind_of(logits);
  const int64_t num_rows = logits.size(0);
  TORCH_CHECK(0 <= width && width <= logits.size(1), "width: expected at most ", logits.size(1));
  const at::Tensor histogram = at::zeros({has_masses ? 2 : 1, num_rows, kBins}, at::kLong);
  const at::Tensor maxima = maximum.contiguous(), lows = low.contiguous(), highs = high.contiguous();
  int64_t* counts = histogram.data_ptr<int64_t>();
  int64_t* masses = has_masses ? counts + num_rows * kBins : nullptr;
  at::parallel_for(0, num_rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    for (int64_t i = begin; i < end; ++i) {
      const Range range = range_of(lows.data_ptr<int64_t>()[i], highs.data_ptr<int64_t>()[i]);
      if (range.is_empty) continue;
      const Row row = row_of(logits, i, kind, static_cast<float>(temperature));
      count_row(row, width, maxima.data_ptr<float>()[i], range, static_cast<int>(shift), kernels,
                counts + i * kBins, has_masses ? masses + i * kBins : nullptr);
    }
  });
  return histogram;
}

// Copies the columns above the edge, the label, and the first `quota` others on the edge.
template <class Scalar>
void keep_row(const Row& row, int64_t width, int64_t edge, int64_t quota, int64_t label,
              Scalar outside, const Row& out) {
  Keys keys;
  for (int64_t begin = 0; begin < width; begin += kTileColumns) {
    const int64_t count = std::min(kTileColumns, width - begin);
    const auto* x = reinterpret_cast<const Scalar*>(row.at(begin));
    auto* kept = reinterpret_cast<Scalar*>(out.at(begin));
    write_keys(row, begin, count, keys);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = keys[i];
      bool is_kept = key > edge || begin + i == label;
      if (key == edge && !is_kept && quota > 0) {
        is_kept = true;
        --quota;
      }
      kept[i] = is_kept ? x[i] : outside;
    }
  }
}

at::Tensor support_keep(const at::Tensor& logits, const at::Tensor& edge, const at::Tensor& quota,
                        const at::Tensor& label_column, double temperature, int64_t width) {
  const ScalarKind kind = kind_of(logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  TORCH_CHECK(0 <= width && width <= num_columns, "width: expected at most ", num_columns);
  const at::Tensor kept = empty_like_logits(logits);
  kept.narrow(1, width, num_columns - width).fill_(-std::numeric_limits<double>::infinity());
  const at::Tensor edges = edge.contiguous(), quotas = quota.contiguous();
  const at::Tensor labels = label_column.contiguous();
  at::parallel_for(0, num_rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    for (int64_t i = begin; i < end; ++i) {
      const Row row = row_of(logits, i, kind, static_cast<float>(temperature));
      const Row out = row_of(kept, i, kind, 1.0f);
      const int64_t row_edge = edges.data_ptr<int64_t>()[i];
      const int64_t row_quota = quotas.data_ptr<int64_t>()[i];
      const int64_t label = labels.data_ptr<int64_t>()[i];
      if (kind == kFloat32) {
        keep_row<float>(row, width, row_edge, row_quota, label, -kInfinity, out);
      } else {
        const uint16_t outside = kind == kBFloat16 ? 0xff80 : 0xfc00;
        keep_row<uint16_t>(row, width, row_edge, row_quota, label, outside, out);
      }
    }
  });
  return kept;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_rl, library) {
  library.def(
      "support_histogram(Tensor logits, Tensor maximum, Tensor low, Tensor high, "
      "float temperature, int width, int shift, bool has_masses, str instruction_set='') "
      "-> Tensor");
  library.def(
      "support_keep(Tensor logits, Tensor edge, Tensor quota, Tensor label_column, "
      "float temperature, int width) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_rl, CPU, library) {
  library.impl("support_histogram", support_histogram);
  library.impl("support_keep", support_keep);
}

}  // namespace megatron_rl
