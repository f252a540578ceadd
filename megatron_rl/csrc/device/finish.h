// What all tensor-parallel ranks sent for a row, to its log-prob: a warp reads the nodes in global
// order, sums the granules that shards' edges cut, and finishes the tree's root in float64.
#pragma once

#include <new>

#include "../shard_layout.h"
#include "tile.h"

namespace megatron_rl {

constexpr int kMaxRanks = 256;

struct FinishTask {
  const int32_t* words;  // [ranks, rows, words_per_row]
  int64_t words_per_row, num_rows;
  const int64_t* labels;  // [rows]
  int64_t vocab_size;
  int num_ranks;
  bool has_entropy;
  int64_t edges[kMaxRanks + 1];
  float *logprobs, *entropy;  // [rows]; no entropy, no memory for it
  int32_t* exponent;          // of the root
  float *sum, *maximum;
  const bool* is_counted;  // [rows]; null: all of them
  int64_t* flag;           // of broken rows, ops/broken_rows.py; null: none is kept
};

namespace {

// A warp's shared memory.
struct FinishSpace {
  Tree tree;
  float cut[kGranule];  // the columns of a granule that a shard's edge cuts
};

// The node of the granule whose columns are in `columns` and the largest of them, in every lane.
// Lanes hold bits 0 to 3 of a column (the upper 16 lanes do what the lower do), so bits 4 to 6 are
// added within the lane.
template <class Warp, class Nodes, class Floats>
MEGATRON_RL_DEVICE void sum_granule(Warp& warp, const float* columns, bool has_entropy,
                                    Nodes& node, Floats& maximum) {
  Floats sum, weighted;
  constexpr int kStep = 16;
  warp.each([&](int lane) {
    maximum[lane] = columns[lane % kStep];
    for (int i = 1; i < 8; ++i) {
      maximum[lane] = Warp::larger(maximum[lane], columns[lane % kStep + kStep * i]);
    }
  });
  for (int distance = 1; distance < kStep; distance *= 2) {
    largest_of_lanes(warp, maximum, distance);
  }
  warp.each([&](int lane) {
    const Reference<float> granule = reference(maximum[lane]);
    float e[8], parts[8];
    MEGATRON_RL_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float y = larger(granule.floor, columns[lane % kStep + kStep * i]);
      e[i] = term(y, granule.offset);
      parts[i] = has_entropy ? weighted_term(e[i], y, granule.exponent) : 0.0f;
    }
    sum[lane] = add_eight(e);
    weighted[lane] = add_eight(parts);
  });
  for (int distance = 1; distance < kStep; distance *= 2) {
    auto other_sum = warp.partner(sum, distance);
    auto other_weighted = warp.partner(weighted, distance);
    warp.each([&](int lane) {
      sum[lane] = add(sum[lane], other_sum[lane]);
      weighted[lane] = add(weighted[lane], other_weighted[lane]);
    });
  }
  warp.each([&](int lane) {
    const bool is_sound = maximum[lane] <= kLargestLogit && maximum[lane] != -kInfinity;
    node[lane] = {kEmptyExponent, 0.0f, 0.0f};
    if (is_sound) {
      const auto exponent = static_cast<int32_t>(reference(maximum[lane]).exponent);
      node[lane] = {exponent, sum[lane], weighted[lane]};
    }
  });
}

// Reads a row as RowReader of token_logprobs.cpp does. The tree is lane 0's; the others wait.
template <class Warp>
class RowJoiner {
 public:
  MEGATRON_RL_DEVICE RowJoiner(Warp& warp, const FinishTask& task, FinishSpace& space)
      : warp_(warp), task_(task), space_(space) {
    warp_.each([&](int lane) {
      maximum_[lane] = -kInfinity;
      if (lane == 0) new (&space_.tree) Tree;
    });
    clear_cut();
  }

  MEGATRON_RL_DEVICE void read(int64_t row) {
    const int64_t label = task_.labels[row];
    for (int rank = 0; rank < task_.num_ranks; ++rank) {
      const ShardLayout shard =
          shard_layout(task_.edges[rank], task_.edges[rank + 1], task_.vocab_size);
      const int32_t* words = task_.words + (rank * task_.num_rows + row) * task_.words_per_row;
      note_maximum(number(words[0]));
      if (shard.begin <= label && label < shard.end) {
        label_logit_ = number(words[1]);
        has_label_ = true;
      }
      const int32_t* raw = words + kHeaderWords + num_nodes(shard) * words_per_node();
      push_columns(raw, shard.begin, shard.head_end);
      push_nodes(words + kHeaderWords, shard);
      push_columns(raw + (shard.head_end - shard.begin), shard.tail_begin, shard.end);
    }
    push_cut();
  }

  MEGATRON_RL_DEVICE void write(int64_t row) {
    warp_.each([&](int lane) {
      if (lane != 0) return;
      const Node root = space_.tree.root();
      const float nan = from_bits(0x7fc00000u), maximum = maximum_[lane];
      // A label that no shard holds has no log-prob.
      const bool is_sound = -kLargestLogit <= maximum && maximum <= kLargestLogit;
      task_.exponent[row] = root.exponent;
      task_.sum[row] = root.sum;
      task_.maximum[row] = maximum;
      task_.logprobs[row] = is_sound && has_label_ ? finish_logprob(root, label_logit_) : nan;
      if (task_.has_entropy) task_.entropy[row] = is_sound ? finish_entropy(root) : nan;
      note_broken(row, is_sound);
    });
  }

 private:
  // The smallest number stays, whichever row comes first.
  MEGATRON_RL_DEVICE void note_broken(int64_t row, bool is_sound) {
    if (task_.flag == nullptr || (is_sound && has_label_)) return;
    if (task_.is_counted != nullptr && !task_.is_counted[row]) return;
    Warp::keep_smallest(task_.flag, 2 * row + (is_sound ? 0 : 1));
  }

  MEGATRON_RL_DEVICE static float number(int32_t word) {
    return from_bits(static_cast<uint32_t>(word));
  }

  MEGATRON_RL_DEVICE int words_per_node() const { return task_.has_entropy ? 3 : 2; }

  MEGATRON_RL_DEVICE void note_maximum(float y) {
    warp_.each([&](int lane) { maximum_[lane] = Warp::larger(maximum_[lane], y); });
  }

  MEGATRON_RL_DEVICE void push_nodes(const int32_t* words, const ShardLayout& shard) {
    if (shard.first_granule < shard.end_granule) push_cut();
    warp_.each([&](int lane) {
      if (lane != 0) return;
      for (int64_t granule = shard.first_granule; granule < shard.end_granule;) {
        const int level = node_level(granule, shard.end_granule);
        const float weighted = task_.has_entropy ? number(words[2]) : 0.0f;
        space_.tree.push(granule, level, {words[0], number(words[1]), weighted});
        words += words_per_node();
        granule += int64_t{1} << level;
      }
    });
  }

  // Raw columns [begin, end), all of one granule.
  MEGATRON_RL_DEVICE void push_columns(const int32_t* raw, int64_t begin, int64_t end) {
    if (begin == end) return;
    if (begin / kGranule != cut_granule_) push_cut();
    cut_granule_ = begin / kGranule;
    warp_.each([&](int lane) {
      for (int64_t i = lane; i < end - begin; i += kLanes) {
        space_.cut[begin % kGranule + i] = number(raw[i]);
      }
    });
  }

  MEGATRON_RL_DEVICE void push_cut() {
    if (cut_granule_ < 0) return;
    warp_.barrier();
    typename Warp::template PerLane<Node> node;
    typename Warp::template PerLane<float> largest;
    sum_granule(warp_, space_.cut, task_.has_entropy, node, largest);
    warp_.each([&](int lane) {
      if (lane == 0) space_.tree.push(cut_granule_, 0, node[lane]);
      maximum_[lane] = Warp::larger(maximum_[lane], largest[lane]);
    });
    warp_.barrier();
    clear_cut();
  }

  MEGATRON_RL_DEVICE void clear_cut() {
    cut_granule_ = -1;
    warp_.each([&](int lane) {
      for (int i = lane; i < kGranule; i += kLanes) space_.cut[i] = -kInfinity;
    });
    warp_.barrier();
  }

  Warp& warp_;
  const FinishTask& task_;
  FinishSpace& space_;
  typename Warp::template PerLane<float> maximum_;
  float label_logit_ = 0.0f;
  bool has_label_ = false;
  int64_t cut_granule_ = -1;
};

template <class Warp>
MEGATRON_RL_DEVICE void finish_row(Warp& warp, const FinishTask& task, int64_t row,
                                   FinishSpace& space) {
  RowJoiner<Warp> joiner(warp, task, space);
  joiner.read(row);
  joiner.write(row);
}

}  // namespace
}  // namespace megatron_rl
