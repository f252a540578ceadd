// Rows of logits to nodes, second kernel: a warp joins the tiles of one row into the words that this
// rank sends, as shard_layout.h lays them out. Nodes smaller than a tile are there already.
#pragma once

#include "tile.h"

namespace megatron_rl {
namespace {

// The node of `count` tiles, a power of two, from `tiles` on; overwrites theirs.
template <bool kHasEntropy, class Warp>
MEGATRON_RL_DEVICE Node join_tiles(Warp& warp, TileSum* tiles, int64_t count) {
  typename Warp::template PerLane<Node> node;
  while (true) {
    const bool is_last = count <= kLanes;
    for (int64_t first = 0; first < count; first += kLanes) {
      warp.each([&](int lane) {
        // An absent sibling changes nothing.
        node[lane] = {kEmptyExponent, 0.0f, 0.0f};
        if (first + lane < count) node[lane] = tiles[first + lane].node;
      });
      for (int distance = 1; distance < kLanes; distance *= 2) {
        merge_lanes<kHasEntropy>(warp, node, distance);
      }
      // Behind what was read: the lanes of this step and of those before it are done.
      warp.each([&](int lane) {
        if (lane == 0) tiles[first / kLanes].node = node[lane];
      });
    }
    warp.barrier();
    if (is_last) return tiles[0].node;
    count /= kLanes;
  }
}

template <class Warp, class Scalar>
MEGATRON_RL_DEVICE float divided_logit(const Scalar* row, int64_t column, float temperature) {
  float x;
  if constexpr (sizeof(Scalar) == sizeof(float)) {
    x = row[column];
  } else {
    x = Warp::widen_half(Scalar{}, row[column].bits);
  }
  return temperature == 1.0f ? x : divide(x, temperature);
}

// The largest y of the row's complete granules, in every lane.
template <class Warp>
MEGATRON_RL_DEVICE auto row_maximum(Warp& warp, const TileSum* tiles, int64_t num_tiles) {
  typename Warp::template PerLane<float> maximum;
  warp.each([&](int lane) {
    maximum[lane] = -kInfinity;
    for (int64_t i = lane; i < num_tiles; i += kLanes) {
      maximum[lane] = Warp::larger(maximum[lane], tiles[i].maximum);
    }
  });
  for (int distance = 1; distance < kLanes; distance *= 2) {
    largest_of_lanes(warp, maximum, distance);
  }
  return maximum;
}

template <class Warp, class Scalar, bool kHasEntropy>
MEGATRON_RL_DEVICE void write_words(Warp& warp, const NodesTask& task, int64_t row) {
  const ShardLayout& shard = task.shard;
  const Scalar* logits = row_of<Scalar>(task, row);
  TileSum* tiles = task.tiles + row * task.num_tiles;
  int32_t* words = task.words + row * task.words_per_row;
  auto maximum = row_maximum(warp, tiles, task.num_tiles);
  const int64_t label = task.labels[row];
  const bool is_local = shard.begin <= label && label < shard.end;
  warp.each([&](int lane) {
    if (lane == 0) words[0] = static_cast<int32_t>(to_bits(maximum[lane]));
    if (lane == 1) {
      const int64_t column = label - shard.begin;
      const float y =
          is_local ? divided_logit<Warp>(logits, column, task.temperature) : 0.0f;
      words[1] = static_cast<int32_t>(to_bits(y));
    }
  });
  warp.barrier();  // the maxima are read before nodes are written over

  int64_t position = kHeaderWords;
  for (int64_t granule = shard.first_granule; granule < shard.end_granule;) {
    const int level = node_level(granule, shard.end_granule);
    if (level >= kTileLevel) {
      const int64_t first = (granule >> kTileLevel) - task.first_tile;
      const int64_t count = int64_t{1} << (level - kTileLevel);
      const Node node = join_tiles<kHasEntropy>(warp, tiles + first, count);
      warp.each([&](int lane) {
        if (lane == 0) write_node(words + position, node, kHasEntropy);
      });
    }
    position += kHasEntropy ? 3 : 2;
    granule += int64_t{1} << level;
  }
  warp.each([&](int lane) {
    const int64_t head = shard.head_end - shard.begin;
    for (int64_t i = lane; position + i < task.words_per_row; i += kLanes) {
      const int64_t column = i < head ? i : shard.tail_begin - shard.begin + i - head;
      const bool is_raw = i < shard.num_raw();
      const float y = is_raw ? divided_logit<Warp>(logits, column, task.temperature) : 0.0f;
      words[position + i] = static_cast<int32_t>(to_bits(y));
    }
  });
}

}  // namespace
}  // namespace megatron_rl
