// Rows of logits to nodes, first kernel: a warp sums one tile, 16 granules of one row, and reads
// them once.
//
// Lanes 2g and 2g + 1 hold granule g. Bit 3 of a column says which of the two, bits 4 to 6 in which
// of its eight loads, bits 0 to 2 where in the load: so the sums over bits 4, 5, 6, 0, 1, 2 stay in
// the lane, bit 3 is one exchange, and four more join the granules.
#pragma once

#include "../shard_layout.h"
#include "columns.h"

namespace megatron_rl {

constexpr int kTileLevel = 4;  // 16 granules, 2,048 columns
constexpr int kLoads = 8;

struct TileSum {
  Node node;      // of the whole tile, where the shard holds all of it
  float maximum;  // the largest y of the shard's complete granules in it; NaN if one is
};

struct NodesTask {
  const void* logits;  // [rows, V] of the shard
  int64_t row_bytes;   // from one row to the next
  int64_t num_rows;
  int64_t first_row;  // of one grid
  const int64_t* labels;  // [rows]
  float temperature;
  ShardLayout shard;
  int64_t first_tile, num_tiles;  // those that hold a complete granule
  TileSum* tiles;                 // [rows, num_tiles], between the two kernels
  int32_t* words;                 // [rows, words_per_row], as shard_layout.h says
  int64_t words_per_row;
};

// Without `tiles`, `words` and what belongs to them.
inline NodesTask nodes_task(const void* logits, int64_t row_bytes, int64_t num_rows,
                            const int64_t* labels, float temperature, const ShardLayout& shard) {
  NodesTask task = {logits, row_bytes, num_rows, 0, labels, temperature, shard};
  const int64_t first = shard.first_granule, end = shard.end_granule;
  task.first_tile = first >> kTileLevel;
  task.num_tiles = first == end ? 0 : ((end - 1) >> kTileLevel) + 1 - task.first_tile;
  return task;
}

namespace {

template <class Scalar>
MEGATRON_RL_DEVICE const Scalar* row_of(const NodesTask& task, int64_t row) {
  const char* begin = static_cast<const char*>(task.logits) + row * task.row_bytes;
  return reinterpret_cast<const Scalar*>(begin);
}

// A lane's share of a tile, whose first column lies at `tile`. Of the tile's columns those of
// [begin, end) belong to complete granules of the shard.
template <class Warp, class Scalar>
MEGATRON_RL_DEVICE void load_tile(const Scalar* tile, int begin, int end, int lane,
                                  Columns<Scalar> (&x)[kLoads]) {
  const int first = kGranule * (lane / 2) + kColumns * (lane % 2);
  constexpr int kStep = kGranule / kLoads;
  const bool is_aligned = is_aligned_16(tile);
  if (is_aligned && begin == 0 && end == kGranule << kTileLevel) {
    MEGATRON_RL_UNROLL
    for (int i = 0; i < kLoads; ++i) x[i] = load_wide<Warp>(tile + first + kStep * i);
    return;
  }
  MEGATRON_RL_UNROLL
  for (int i = 0; i < kLoads; ++i) {
    const int column = first + kStep * i;
    if (is_aligned && begin <= column && column + kColumns <= end) {
      x[i] = load_wide<Warp>(tile + column);
    } else {
      x[i] = load_narrow(tile + column, begin - column, end - column);
    }
  }
}

template <class Float>
MEGATRON_RL_DEVICE Float add_eight(const Float (&x)[8]) {
  return add(add(add(x[0], x[1]), add(x[2], x[3])), add(add(x[4], x[5]), add(x[6], x[7])));
}

// A lane's half of a granule, against the granule's maximum; sum and weighted sum before the other
// half is added.
template <class Warp, bool kIsDivided, bool kHasEntropy, class Scalar>
MEGATRON_RL_DEVICE Node sum_columns(const Columns<Scalar> (&x)[kLoads], float maximum,
                                    float temperature) {
  const Reference<float> granule = reference(maximum);
  float sums[kColumns], weighted_sums[kColumns];
  MEGATRON_RL_UNROLL
  for (int column = 0; column < kColumns; ++column) {
    float e[kLoads], weighted[kLoads];
    MEGATRON_RL_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      float y = widen<Warp>(x[i], column);
      if constexpr (kIsDivided) y = divide(y, temperature);
      y = larger(granule.floor, y);
      e[i] = term(y, granule.offset);
      if constexpr (kHasEntropy) weighted[i] = weighted_term(e[i], y, granule.exponent);
    }
    sums[column] = add_eight(e);
    if constexpr (kHasEntropy) weighted_sums[column] = add_eight(weighted);
  }
  Node node = {static_cast<int32_t>(granule.exponent), add_eight(sums), 0.0f};
  if constexpr (kHasEntropy) node.weighted = add_eight(weighted_sums);
  return node;
}

template <bool kHasEntropy, class Warp, class Nodes>
MEGATRON_RL_DEVICE Nodes partner_node(Warp& warp, Nodes& nodes, int distance) {
  typename Warp::template PerLane<int32_t> exponent;
  typename Warp::template PerLane<float> sum, weighted;
  warp.each([&](int lane) {
    exponent[lane] = nodes[lane].exponent;
    sum[lane] = nodes[lane].sum;
    weighted[lane] = nodes[lane].weighted;
  });
  exponent = warp.partner(exponent, distance);
  sum = warp.partner(sum, distance);
  if constexpr (kHasEntropy) weighted = warp.partner(weighted, distance);
  Nodes others;
  warp.each([&](int lane) {
    others[lane] = {exponent[lane], sum[lane], kHasEntropy ? weighted[lane] : 0.0f};
  });
  return others;
}

// Of the nodes of lanes that differ in the bit of `distance`, the parent.
template <bool kHasEntropy, class Warp, class Nodes>
MEGATRON_RL_DEVICE void merge_lanes(Warp& warp, Nodes& nodes, int distance) {
  Nodes siblings = partner_node<kHasEntropy>(warp, nodes, distance);
  warp.each([&](int lane) {
    nodes[lane] = merge(nodes[lane], siblings[lane]);
    if constexpr (!kHasEntropy) nodes[lane].weighted = 0.0f;
  });
}

template <class Warp, class Floats>
MEGATRON_RL_DEVICE void largest_of_lanes(Warp& warp, Floats& maxima, int distance) {
  Floats others = warp.partner(maxima, distance);
  warp.each([&](int lane) { maxima[lane] = Warp::larger(maxima[lane], others[lane]); });
}

MEGATRON_RL_DEVICE void write_node(int32_t* words, Node node, bool has_entropy) {
  words[0] = node.exponent;
  words[1] = static_cast<int32_t>(to_bits(node.sum));
  if (has_entropy) words[2] = static_cast<int32_t>(to_bits(node.weighted));
}

// Where a row's words hold the node that starts at `granule`.
MEGATRON_RL_DEVICE int64_t node_position(const ShardLayout& shard, int64_t granule,
                                         bool has_entropy) {
  int64_t index = 0;
  for (int64_t at = shard.first_granule; at < granule; ++index) {
    at += int64_t{1} << node_level(at, shard.end_granule);
  }
  return kHeaderWords + index * (has_entropy ? 3 : 2);
}

// Whether the shard holds all of this node but not all of its parent.
MEGATRON_RL_DEVICE bool is_maximal(const ShardLayout& shard, int64_t granule, int level) {
  const int64_t parent = granule >> (level + 1) << (level + 1);
  const bool is_complete =
      shard.first_granule <= granule && granule + (int64_t{1} << level) <= shard.end_granule;
  return is_complete && (parent < shard.first_granule ||
                         parent + (int64_t{2} << level) > shard.end_granule);
}

template <class Warp, class Scalar, bool kIsDivided, bool kHasEntropy>
MEGATRON_RL_DEVICE void sum_tile(Warp& warp, const NodesTask& task, int64_t row,
                                 int64_t tile_index) {
  const int64_t first_granule = (task.first_tile + tile_index) << kTileLevel;
  const int64_t column = first_granule * kGranule;
  const ShardLayout& shard = task.shard;
  const int64_t begin = shard.first_granule * kGranule - column;
  const int64_t end = smaller(shard.end_granule * kGranule, shard.end) - column;
  constexpr int kTileColumns = kGranule << kTileLevel;
  const int first = begin < 0 ? 0 : static_cast<int>(begin);
  const int last = end < kTileColumns ? static_cast<int>(end) : kTileColumns;
  const Scalar* tile = row_of<Scalar>(task, row) + (column - shard.begin);
  int32_t* words = task.words + row * task.words_per_row;

  typename Warp::template PerLane<Columns<Scalar>[kLoads]> x;
  typename Warp::template PerLane<float> maximum;
  typename Warp::template PerLane<Node> node;
  warp.each([&](int lane) {
    load_tile<Warp>(tile, first, last, lane, x[lane]);
    maximum[lane] = largest_of<Warp>(x[lane]);
    // Division is monotone: the largest x has the largest y.
    if constexpr (kIsDivided) maximum[lane] = divide(maximum[lane], task.temperature);
  });
  largest_of_lanes(warp, maximum, 1);
  warp.each([&](int lane) {
    node[lane] =
        sum_columns<Warp, kIsDivided, kHasEntropy>(x[lane], maximum[lane], task.temperature);
  });
  auto half = partner_node<kHasEntropy>(warp, node, 1);
  warp.each([&](int lane) {
    node[lane].sum = add(node[lane].sum, half[lane].sum);
    if constexpr (kHasEntropy) node[lane].weighted = add(node[lane].weighted, half[lane].weighted);
    // A broken row is told by its maximum; -inf alone has no terms.
    if (!(maximum[lane] <= kLargestLogit) || maximum[lane] == -kInfinity) {
      node[lane] = {kEmptyExponent, 0.0f, 0.0f};
    }
  });
  for (int level = 0; level < kTileLevel; ++level) {
    warp.each([&](int lane) {
      const int64_t granule = first_granule + lane / 2;
      const bool is_first = (lane & ((2 << level) - 1)) == 0;
      if (last - first < kTileColumns && is_first && is_maximal(shard, granule, level)) {
        write_node(words + node_position(shard, granule, kHasEntropy), node[lane], kHasEntropy);
      }
    });
    merge_lanes<kHasEntropy>(warp, node, 2 << level);
    largest_of_lanes(warp, maximum, 2 << level);
  }
  warp.each([&](int lane) {
    if (lane == 0) task.tiles[row * task.num_tiles + tile_index] = {node[lane], maximum[lane]};
  });
}

}  // namespace
}  // namespace megatron_rl
