// The CPU kernels, written once over `Lanes`, 16 floats of an instruction set:
//
//   splat<Lanes>, add, subtract, multiply, divide, multiply_add, larger, scale_by_low_bits
//   load(const Scalar*) -> Lanes, store(Lanes, Scalar*): 16 of them, rounded to nearest even
//   fold(Lanes[16], op): lane g of the result is op over the lanes of argument g, pairing lanes that
//     differ in index bit 0, then 1, 2, 3
//   note_nan(flag, a, b), Lanes::any(flag); zero_below(y, floor, x): x, but 0 where y < floor
//
// A granule is 8 Lanes, so column bits 4, 5 and 6 are added between vectors and the others by fold.
#pragma once

#include "cpu_kernels.h"

namespace megatron_rl {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kGranule / kLanes;

struct Add {
  template <class Float>
  Float operator()(Float a, Float b) const {
    return add(a, b);
  }
};

struct Larger {
  template <class Float>
  Float operator()(Float a, Float b) const {
    return larger(a, b);
  }
};

template <class Lanes, class Op>
inline Lanes across_vectors(const Lanes (&v)[kVectors], Op op) {
  return op(op(op(v[0], v[1]), op(v[2], v[3])), op(op(v[4], v[5]), op(v[6], v[7])));
}

// Four levels at once, measured against the largest exponent: scaling by a power of two is exact,
// so the sum has the bits of merging node by node.
inline Node merge_tile(const Tile& tile) {
  int32_t highest = tile.exponent[0];
  for (int g = 1; g < kTileGranules; ++g) {
    highest = tile.exponent[g] > highest ? tile.exponent[g] : highest;
  }
  float sum[kTileGranules];
  for (int g = 0; g < kTileGranules; ++g) {
    const int32_t k = highest - tile.exponent[g];
    const float scale = power_of_half(k < kDropped ? k : 0);
    sum[g] = k < kDropped ? multiply(tile.sum[g], scale) : 0.0f;
  }
  for (int width = kTileGranules / 2; width > 0; width /= 2) {
    for (int g = 0; g < width; ++g) sum[g] = add(sum[2 * g], sum[2 * g + 1]);
  }
  return {highest, sum[0], 0.0f};
}

// The weighted sums have no common reference: node by node.
inline Node merge_weighted_tile(const Tile& tile) {
  Node nodes[kTileGranules];
  for (int g = 0; g < kTileGranules; ++g) {
    nodes[g] = {tile.exponent[g], tile.sum[g], tile.weighted[g]};
  }
  for (int width = kTileGranules / 2; width > 0; width /= 2) {
    for (int g = 0; g < width; ++g) nodes[g] = merge(nodes[2 * g], nodes[2 * g + 1]);
  }
  return nodes[0];
}

// Empty granules get their node; a row that is broken is told by `maximum` alone.
inline void settle(Tile& tile, int num_granules, const float* maximum, const float* exponent,
                   bool is_nan) {
  float highest = -kInfinity;
  bool is_broken = is_nan;
  for (int g = 0; g < num_granules; ++g) {
    highest = maximum[g] > highest ? maximum[g] : highest;
    is_nan |= tile.sum[g] != tile.sum[g] && maximum[g] != kInfinity;
    is_broken |= !(maximum[g] <= kLargestLogit) || tile.sum[g] != tile.sum[g];
  }
  if (is_broken) {
    for (int g = 0; g < num_granules; ++g) tile.exponent[g] = 0, tile.sum[g] = tile.weighted[g] = 0;
    tile.maximum = is_nan ? std::numeric_limits<float>::quiet_NaN() : highest;
    tile.node = {0, 0.0f, 0.0f};
    return;
  }
  for (int g = 0; g < num_granules; ++g) {
    const bool is_empty = maximum[g] == -kInfinity;
    tile.exponent[g] = is_empty ? kEmptyExponent : static_cast<int32_t>(exponent[g]);
    tile.sum[g] = is_empty ? 0.0f : tile.sum[g];
    tile.weighted[g] = is_empty ? 0.0f : tile.weighted[g];
  }
  tile.maximum = highest;
}

template <class Lanes, class Scalar, bool kIsDivided, bool kHasEntropy>
void sum_granules(const Scalar* logits, int num_granules, Lanes temperature, Tile& tile) {
  typename Lanes::Flag nan_flag{};
  Lanes partial[kTileGranules];
  for (int g = 0; g < num_granules; ++g) {
    Lanes x[kVectors];
    for (int i = 0; i < kVectors; ++i) x[i] = Lanes::load(logits + kGranule * g + kLanes * i);
    if constexpr (sizeof(Scalar) == sizeof(float)) {  // narrower NaNs survive into the sum
      for (int i = 0; i < kVectors; i += 2) note_nan(nan_flag, x[i], x[i + 1]);
    }
    partial[g] = across_vectors(x, Larger());
  }
  for (int g = num_granules; g < kTileGranules; ++g) partial[g] = splat<Lanes>(-kInfinity);
  Lanes maximum = fold(partial, Larger());
  // Division is monotone: the largest x has the largest y.
  if constexpr (kIsDivided) maximum = divide(maximum, temperature);
  const Reference<Lanes> granule = reference(maximum);
  alignas(64) float maxima[kLanes], exponents[kLanes], offsets[kLanes], floors[kLanes];
  store(maximum, maxima);
  store(granule.exponent, exponents);
  store(granule.offset, offsets);
  store(granule.floor, floors);

  Lanes weighted[kHasEntropy ? kTileGranules : 1];
  for (int g = 0; g < num_granules; ++g) {
    const Lanes floor = splat<Lanes>(floors[g]), offset = splat<Lanes>(offsets[g]);
    Lanes e[kVectors], b[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      Lanes y = Lanes::load(logits + kGranule * g + kLanes * i);
      if constexpr (kIsDivided) y = divide(y, temperature);
      y = larger(floor, y);
      e[i] = term(y, offset);
      if constexpr (kHasEntropy) b[i] = weighted_term(e[i], y, splat<Lanes>(exponents[g]));
    }
    partial[g] = across_vectors(e, Add());
    if constexpr (kHasEntropy) weighted[g] = across_vectors(b, Add());
  }
  for (int g = num_granules; g < kTileGranules; ++g) {
    partial[g] = splat<Lanes>(0.0f);
    if constexpr (kHasEntropy) weighted[g] = splat<Lanes>(0.0f);
  }
  store(fold(partial, Add()), tile.sum);
  if constexpr (kHasEntropy) store(fold(weighted, Add()), tile.weighted);
  settle(tile, num_granules, maxima, exponents, Lanes::any(nan_flag));
}

template <class Lanes, class Scalar, bool kHasEntropy>
void granules(const void* logits, int num_granules, float temperature, Tile& tile) {
  const auto* x = static_cast<const Scalar*>(logits);
  const Lanes divisor = splat<Lanes>(temperature);
  if constexpr (!kHasEntropy) {
    for (float& weighted : tile.weighted) weighted = 0.0f;
  }
  if (temperature == 1.0f) {
    sum_granules<Lanes, Scalar, false, kHasEntropy>(x, num_granules, divisor, tile);
  } else {
    sum_granules<Lanes, Scalar, true, kHasEntropy>(x, num_granules, divisor, tile);
  }
  if (num_granules == kTileGranules) {
    tile.node = kHasEntropy ? merge_weighted_tile(tile) : merge_tile(tile);
  }
}

template <class Lanes, class Scalar, bool kIsDivided>
void write_gradient(const Scalar* logits, Scalar* gradient, int64_t num_columns,
                    const GradientRow& row) {
  const Lanes floor = splat<Lanes>(row.floor), offset = splat<Lanes>(row.offset);
  const Lanes inverse_sum = splat<Lanes>(row.inverse_sum), factor = splat<Lanes>(row.factor);
  const Lanes temperature = splat<Lanes>(row.temperature);
  const auto write = [&](const Scalar* from, Scalar* to) {
    Lanes y = Lanes::load(from);
    if constexpr (kIsDivided) y = divide(y, temperature);
    const Lanes e = zero_below(y, floor, term(larger(floor, y), offset));
    store(multiply(factor, multiply(e, inverse_sum)), to);
  };
  const int64_t whole = num_columns / kLanes * kLanes;
  for (int64_t column = 0; column < whole; column += kLanes) {
    write(logits + column, gradient + column);
  }
  if (whole < num_columns) {
    Scalar rest[kLanes] = {};
    for (int64_t i = whole; i < num_columns; ++i) rest[i - whole] = logits[i];
    write(rest, rest);
    for (int64_t i = whole; i < num_columns; ++i) gradient[i] = rest[i - whole];
  }
}

template <class Lanes, class Scalar>
void gradient(const void* logits, void* gradient, int64_t num_columns, const GradientRow& row) {
  const auto* x = static_cast<const Scalar*>(logits);
  auto* out = static_cast<Scalar*>(gradient);
  if (row.temperature == 1.0f) {
    write_gradient<Lanes, Scalar, false>(x, out, num_columns, row);
  } else {
    write_gradient<Lanes, Scalar, true>(x, out, num_columns, row);
  }
}

template <class Lanes, class Scalar>
void terms(const void* logits, int64_t num_columns, float temperature, float maximum, float* out) {
  const auto* x = static_cast<const Scalar*>(logits);
  const Reference<Lanes> row = reference(splat<Lanes>(maximum));
  const Lanes divisor = splat<Lanes>(temperature);
  const auto write = [&](const Scalar* from, float* to) {
    Lanes y = Lanes::load(from);
    if (temperature != 1.0f) y = divide(y, divisor);
    store(term(larger(row.floor, y), row.offset), to);
  };
  const int64_t whole = num_columns / kLanes * kLanes;
  for (int64_t column = 0; column < whole; column += kLanes) write(x + column, out + column);
  if (whole < num_columns) {
    Scalar rest[kLanes] = {};
    float rest_terms[kLanes];
    for (int64_t i = whole; i < num_columns; ++i) rest[i - whole] = x[i];
    write(rest, rest_terms);
    for (int64_t i = whole; i < num_columns; ++i) out[i] = rest_terms[i - whole];
  }
}

template <class Lanes>
constexpr CpuKernels kernels_of(const char* name) {
  return {name,
          {granules<Lanes, float, false>, granules<Lanes, BFloat16, false>,
           granules<Lanes, Half, false>},
          {granules<Lanes, float, true>, granules<Lanes, BFloat16, true>,
           granules<Lanes, Half, true>},
          {gradient<Lanes, float>, gradient<Lanes, BFloat16>, gradient<Lanes, Half>},
          {terms<Lanes, float>, terms<Lanes, BFloat16>, terms<Lanes, Half>}};
}

}  // namespace
}  // namespace megatron_rl
