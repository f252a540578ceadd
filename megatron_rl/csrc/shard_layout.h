// What one tensor-parallel rank sends for a row: the maximal complete nodes of its columns, and the
// raw columns of granules that a shard's edge cuts. Fixed by the edges of the shards alone, so that
// nothing but the numbers travels; ops/node_layout.py is the same in Python.
//
// A row is int32 words:
//   [0] the largest y (float; NaN if one is)    [1] the label's y (float; 0 if it is not here)
//   then N, S and, with entropy, B of each node, then each raw column's y (floats).
#pragma once

#include <cstdint>

#include "numerics.h"

namespace megatron_rl {

struct ShardLayout {
  int64_t begin, end;                  // its columns of the vocabulary, global, without padding
  int64_t first_granule, end_granule;  // its complete granules
  int64_t head_end, tail_begin;        // raw are [begin, head_end) and [tail_begin, end)

  MEGATRON_RL_INLINE int64_t num_raw() const { return head_end - begin + end - tail_begin; }
};

namespace {

constexpr int64_t kHeaderWords = 2;

MEGATRON_RL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The level of the largest aligned node that starts at `granule` and ends by `end_granule`.
MEGATRON_RL_INLINE int node_level(int64_t granule, int64_t end_granule) {
  int level = 0;
  for (int64_t size = 2; (granule & (size - 1)) == 0 && granule + size <= end_granule; size *= 2) {
    ++level;
  }
  return level;
}

MEGATRON_RL_INLINE int64_t num_nodes(const ShardLayout& layout) {
  int64_t count = 0;
  for (int64_t granule = layout.first_granule; granule < layout.end_granule; ++count) {
    granule += int64_t{1} << node_level(granule, layout.end_granule);
  }
  return count;
}

// Of the shard with global columns [first_column, end_column), padding included.
MEGATRON_RL_INLINE ShardLayout shard_layout(int64_t first_column, int64_t end_column,
                                            int64_t vocab_size) {
  ShardLayout layout;
  layout.begin = smaller(first_column, vocab_size);
  layout.end = smaller(end_column, vocab_size);
  const int64_t first = (layout.begin + kGranule - 1) / kGranule;
  // Columns behind the vocabulary are -inf: its last granule is complete.
  const int64_t end =
      layout.end == vocab_size ? (vocab_size + kGranule - 1) / kGranule : layout.end / kGranule;
  layout.first_granule = first;
  layout.end_granule = first > end ? first : end;
  layout.head_end = smaller(first * kGranule, layout.end);
  layout.tail_begin = smaller(layout.end_granule * kGranule, layout.end);
  return layout;
}

// Words of the longest row of any rank: every rank sends equally many.
inline int64_t words_per_row(const int64_t* edges, int64_t num_ranks, int64_t vocab_size,
                             bool has_entropy) {
  int64_t words = 0;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    const ShardLayout layout = shard_layout(edges[rank], edges[rank + 1], vocab_size);
    const int64_t count = num_nodes(layout) * (has_entropy ? 3 : 2) + layout.num_raw();
    words = count > words ? count : words;
  }
  return kHeaderWords + words;
}

}  // namespace
}  // namespace megatron_rl
