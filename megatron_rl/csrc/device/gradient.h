// The gradient of the logits: a warp writes 2,048 columns of one row, each lane its own eight at a
// time, so that it may write over the logits.
#pragma once

#include "../shard_layout.h"
#include "columns.h"

namespace megatron_rl {

constexpr int kGradientColumns = 2048;

struct GradientTask {
  const void* logits;  // [rows, V] of the shard
  void* gradient;      // the same; may be the logits
  int64_t logits_row_bytes, gradient_row_bytes;
  int64_t num_rows, num_columns;
  int64_t first_row;     // of one grid
  int64_t width;         // columns that belong to the vocabulary; +0 behind them
  int64_t first_column;  // global, of the shard's first one
  const int64_t* labels;
  const float* incoming;  // [rows]
  const int32_t* exponent;
  const float* sum;
  float temperature;
};

inline int64_t gradient_tiles(const GradientTask& task) {
  return (task.num_columns + kGradientColumns - 1) / kGradientColumns;
}

namespace {

template <class Warp, bool kIsDivided, class Scalar>
MEGATRON_RL_DEVICE Columns<Scalar> gradient_of(const Columns<Scalar>& x, const GradientRow& row,
                                               int64_t label, int64_t width) {
  float gradient[kColumns];
  MEGATRON_RL_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    float y = widen<Warp>(x, i);
    if constexpr (kIsDivided) y = divide(y, row.temperature);
    const float e = y < row.floor ? 0.0f : term(larger(row.floor, y), row.offset);
    const float p = multiply(e, row.inverse_sum);
    const float at_label = multiply(-row.factor, subtract(1.0f, p));
    gradient[i] = i == label ? at_label : multiply(row.factor, p);
    if (i >= width) gradient[i] = 0.0f;
  }
  return narrow<Warp, Scalar>(gradient);
}

template <class Warp, class Scalar, bool kIsDivided>
MEGATRON_RL_DEVICE void write_gradient_tile(Warp& warp, const GradientTask& task, int64_t row,
                                            int64_t tile) {
  const int64_t start = kGradientColumns * tile;
  const auto* logits = reinterpret_cast<const Scalar*>(static_cast<const char*>(task.logits) +
                                                       row * task.logits_row_bytes);
  auto* gradient =
      reinterpret_cast<Scalar*>(static_cast<char*>(task.gradient) + row * task.gradient_row_bytes);
  const float incoming = task.incoming[row];
  const int64_t width = incoming == 0.0f ? 0 : task.width;  // +0 where nothing comes in
  const int64_t label = task.labels[row] - task.first_column;
  const GradientRow constants =
      gradient_row(task.exponent[row], task.sum[row], incoming, task.temperature);
  const bool is_aligned = is_aligned_16(logits) && is_aligned_16(gradient);
  constexpr int kStep = kColumns * kLanes;
  constexpr int kBatch = sizeof(Scalar) == 4 ? 2 : 4;  // so many loads are under way at once
  warp.each([&](int lane) {
    for (int64_t first = start + kColumns * lane; first < start + kGradientColumns;
         first += kBatch * kStep) {
      Columns<Scalar> x[kBatch];
      MEGATRON_RL_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const int64_t column = first + kStep * i;
        const int64_t count = smaller(task.num_columns - column, kColumns);
        if (is_aligned && count == kColumns) {
          if (column < width) x[i] = load_wide<Warp>(logits + column);
        } else {
          x[i] = load_narrow(logits + column, 0, column < width ? static_cast<int>(count) : 0);
        }
      }
      MEGATRON_RL_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const int64_t column = first + kStep * i;
        const int64_t count = smaller(task.num_columns - column, kColumns);
        x[i] = column < width ? gradient_of<Warp, kIsDivided>(x[i], constants, label - column,
                                                              width - column)
                              : Columns<Scalar>{};
        if (is_aligned && count == kColumns) {
          store_wide<Warp>(x[i], gradient + column);
        } else {
          store_narrow(x[i], gradient + column, static_cast<int>(count));
        }
      }
    }
  });
}

}  // namespace
}  // namespace megatron_rl
