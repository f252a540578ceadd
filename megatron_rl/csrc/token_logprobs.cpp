// The operators of the aligned log-prob on CPU tensors: rows of logits to nodes, nodes of all
// tensor-parallel ranks to log-probs, and the gradient of the logits. Called by ops/logprobs.py,
// which checks shapes, labels and errors.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_dispatch.h"
#include "cpu_kernels.h"
#include "cpu_rows.h"
#include "numerics.h"
#include "shard_layout.h"

namespace megatron_rl {
namespace {

void push_tile(Tree& tree, int64_t granule, int num_granules, const Tile& tile) {
  if (num_granules == kTileGranules) {
    tree.push(granule, 4, tile.node);
    return;
  }
  for (int g = 0; g < num_granules; ++g) {
    tree.push(granule + g, 0, {tile.exponent[g], tile.sum[g], tile.weighted[g]});
  }
}

// The largest logit; NaN once one of them is.
float join_maximum(float a, float b) { return a != a || a > b ? a : b; }

// All complete granules of a row; returns its largest y there.
float push_granules(Tree& tree, const Row& row, const ShardLayout& layout,
                    const CpuKernels& kernels, bool has_entropy) {
  const auto& granules = has_entropy ? kernels.granules_with_entropy : kernels.granules;
  float maximum = -kInfinity;
  Tile tile;
  for (int64_t granule = layout.first_granule; granule < layout.end_granule;) {
    const int64_t tile_end = (granule / kTileGranules + 1) * kTileGranules;
    const int64_t whole_end = layout.end / kGranule;
    int count = static_cast<int>(std::min(tile_end, whole_end) - granule);
    const int64_t column = granule * kGranule;
    if (count > 0) {
      granules[row.kind](row.at(column - layout.begin), count, row.temperature, tile);
    } else {  // the vocabulary's last granule, which is not full
      float logits[kGranule];
      for (int64_t i = 0; i < kGranule; ++i) {
        logits[i] = column + i < layout.end ? row.logit(column + i - layout.begin) : -kInfinity;
      }
      count = 1;
      granules[kFloat32](logits, count, 1.0f, tile);
    }
    push_tile(tree, granule, count, tile);
    maximum = join_maximum(maximum, tile.maximum);
    granule += count;
  }
  return maximum;
}

int32_t word(float x) { return static_cast<int32_t>(to_bits(x)); }
float number(int32_t word) { return from_bits(static_cast<uint32_t>(word)); }

void write_row_nodes(int32_t* words, const Row& row, int64_t label, const ShardLayout& layout,
                     const CpuKernels& kernels, bool has_entropy) {
  Tree tree;
  const bool is_local = layout.begin <= label && label < layout.end;
  words[0] = word(push_granules(tree, row, layout, kernels, has_entropy));
  words[1] = is_local ? word(row.logit(label - layout.begin)) : 0;
  words += kHeaderWords;
  for (int i = 0; i < tree.size(); ++i) {
    *words++ = tree.node(i).exponent;
    *words++ = word(tree.node(i).sum);
    if (has_entropy) *words++ = word(tree.node(i).weighted);
  }
  for (int64_t column = layout.begin; column < layout.head_end; ++column) {
    *words++ = word(row.logit(column - layout.begin));
  }
  for (int64_t column = layout.tail_begin; column < layout.end; ++column) {
    *words++ = word(row.logit(column - layout.begin));
  }
}

at::Tensor token_logprobs_nodes(const at::Tensor& logits, const at::Tensor& labels,
                                double temperature, at::IntArrayRef edges, int64_t rank,
                                int64_t vocab_size, bool has_entropy,
                                c10::string_view instruction_set) {
  const CpuKernels& kernels = kernels_named(std::string(instruction_set));
  const ScalarKind kind = kind_of(logits);
  const ShardLayout layout = shard_layout(edges[rank], edges[rank + 1], vocab_size);
  TORCH_CHECK(logits.size(1) == edges[rank + 1] - edges[rank], "logits: expected the columns of ",
              "shard ", rank, ", ", edges[rank + 1] - edges[rank], ", got ", logits.size(1));
  const int64_t num_rows = logits.size(0), num_ranks = static_cast<int64_t>(edges.size()) - 1;
  const int64_t stride = words_per_row(edges.data(), num_ranks, vocab_size, has_entropy);
  at::Tensor nodes = at::zeros({num_rows, stride}, at::kInt);
  const at::Tensor ids = labels.contiguous();
  int32_t* words = nodes.data_ptr<int32_t>();
  const int64_t* label = ids.data_ptr<int64_t>();
  at::parallel_for(0, num_rows, rows_per_task(logits.size(1)), [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    for (int64_t i = begin; i < end; ++i) {
      const Row row = row_of(logits, i, kind, static_cast<float>(temperature));
      write_row_nodes(words + i * stride, row, label[i], layout, kernels, has_entropy);
    }
  });
  return nodes;
}

// Reads what every rank sent for a row, in global order, and puts the tree together.
class RowReader {
 public:
  RowReader(const std::vector<ShardLayout>& layouts, const CpuKernels& kernels, bool has_entropy)
      : layouts_(layouts), kernels_(kernels), has_entropy_(has_entropy) {
    cut_.resize(kGranule, -kInfinity);
  }

  // `words` of rank 0; rank r's lie r * rank_stride behind.
  void read(const int32_t* words, int64_t rank_stride, int64_t label) {
    for (const ShardLayout& layout : layouts_) {
      maximum_ = join_maximum(maximum_, number(words[0]));
      if (layout.begin <= label && label < layout.end) label_logit_ = number(words[1]);
      const int32_t* node = words + kHeaderWords;
      const int64_t count = num_nodes(layout);
      const int32_t* raw = node + count * (has_entropy_ ? 3 : 2);
      for (int64_t column = layout.begin; column < layout.head_end; ++column) {
        push_column(column, number(*raw++));
      }
      for (int64_t granule = layout.first_granule; granule < layout.end_granule;) {
        const int level = node_level(granule, layout.end_granule);
        const float weighted = has_entropy_ ? number(node[2]) : 0.0f;
        push_cut_granule();
        tree_.push(granule, level, {node[0], number(node[1]), weighted});
        node += has_entropy_ ? 3 : 2;
        granule += int64_t{1} << level;
      }
      for (int64_t column = layout.tail_begin; column < layout.end; ++column) {
        push_column(column, number(*raw++));
      }
      words += rank_stride;
    }
    push_cut_granule();
  }

  Node root() const { return tree_.root(); }
  float maximum() const { return maximum_; }
  float label_logit() const { return label_logit_; }

 private:
  void push_column(int64_t column, float y) {
    if (column / kGranule != cut_granule_) push_cut_granule();
    cut_granule_ = column / kGranule;
    cut_[column % kGranule] = y;
  }

  void push_cut_granule() {
    if (cut_granule_ < 0) return;
    Tile tile;
    const auto& granules = has_entropy_ ? kernels_.granules_with_entropy : kernels_.granules;
    granules[kFloat32](cut_.data(), 1, 1.0f, tile);
    tree_.push(cut_granule_, 0, {tile.exponent[0], tile.sum[0], tile.weighted[0]});
    maximum_ = join_maximum(maximum_, tile.maximum);
    std::fill(cut_.begin(), cut_.end(), -kInfinity);
    cut_granule_ = -1;
  }

  const std::vector<ShardLayout>& layouts_;
  const CpuKernels& kernels_;
  const bool has_entropy_;
  std::vector<float> cut_;
  int64_t cut_granule_ = -1;
  Tree tree_;
  float maximum_ = -kInfinity;
  float label_logit_ = std::numeric_limits<float>::quiet_NaN();
};

using Finished = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Finished token_logprobs_finish(const at::Tensor& nodes, const at::Tensor& labels,
                               at::IntArrayRef edges, int64_t vocab_size, bool has_entropy,
                               c10::string_view instruction_set,
                               const std::optional<at::Tensor>&,
                               const std::optional<at::Tensor>& flag) {
  TORCH_CHECK(!flag, "flag: expected none on a CPU, where the caller looks at the maxima at once");
  const CpuKernels& kernels = kernels_named(std::string(instruction_set));
  const int64_t num_ranks = static_cast<int64_t>(edges.size()) - 1, num_rows = labels.size(0);
  const int64_t stride = words_per_row(edges.data(), num_ranks, vocab_size, has_entropy);
  TORCH_CHECK(nodes.is_contiguous() && nodes.scalar_type() == at::kInt &&
                  nodes.sizes() == at::IntArrayRef({num_ranks, num_rows, stride}),
              "nodes: expected [", num_ranks, ", ", num_rows, ", ", stride, "] int32, got ",
              nodes.sizes());
  std::vector<ShardLayout> layouts;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    layouts.push_back(shard_layout(edges[rank], edges[rank + 1], vocab_size));
  }
  const at::Tensor logprobs = at::empty({num_rows}, at::kFloat);
  const at::Tensor entropy = at::empty({has_entropy ? num_rows : 0}, at::kFloat);
  const at::Tensor exponent = at::empty({num_rows}, at::kInt);
  const at::Tensor sum = at::empty({num_rows}, at::kFloat);
  const at::Tensor maximum = at::empty({num_rows}, at::kFloat);
  const at::Tensor ids = labels.contiguous();
  const int32_t* words = nodes.data_ptr<int32_t>();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  at::parallel_for(0, num_rows, 64, [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    for (int64_t i = begin; i < end; ++i) {
      RowReader row(layouts, kernels, has_entropy);
      row.read(words + i * stride, num_rows * stride, ids.data_ptr<int64_t>()[i]);
      const Node root = row.root();
      const float largest = row.maximum();
      const bool is_sound = -kLargestLogit <= largest && largest <= kLargestLogit;
      exponent.data_ptr<int32_t>()[i] = root.exponent;
      sum.data_ptr<float>()[i] = root.sum;
      maximum.data_ptr<float>()[i] = largest;
      logprobs.data_ptr<float>()[i] = is_sound ? finish_logprob(root, row.label_logit()) : nan;
      if (has_entropy) entropy.data_ptr<float>()[i] = is_sound ? finish_entropy(root) : nan;
    }
  });
  return {logprobs, entropy, exponent, sum, maximum};
}

void token_logprobs_gradient(const at::Tensor& logits, const at::Tensor& labels,
                             const at::Tensor& incoming, const at::Tensor& exponent,
                             const at::Tensor& sum, double temperature, int64_t first_column,
                             int64_t vocab_size, const at::Tensor& gradient,
                             c10::string_view instruction_set) {
  const CpuKernels& kernels = kernels_named(std::string(instruction_set));
  const ScalarKind kind = kind_of(logits);
  TORCH_CHECK(kind_of(gradient) == kind && gradient.sizes() == logits.sizes(),
              "gradient: expected the logits' dtype and shape");
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  const int64_t end_column = std::min(first_column + num_columns, vocab_size);
  const int64_t width = std::max<int64_t>(0, end_column - first_column);
  const at::Tensor ids = labels.contiguous(), grads = incoming.contiguous();
  at::parallel_for(0, num_rows, rows_per_task(num_columns), [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    for (int64_t i = begin; i < end; ++i) {
      const float grad = grads.data_ptr<float>()[i];
      const Row row = row_of(logits, i, kind, static_cast<float>(temperature));
      const Row out = row_of(gradient, i, kind, 1.0f);
      const int64_t written = grad == 0.0f ? 0 : width;  // +0 where nothing comes in
      const size_t num_zero_bytes = out.at(num_columns) - out.at(written);
      if (written > 0) {
        const GradientRow task =
            gradient_row(exponent.data_ptr<int32_t>()[i], sum.data_ptr<float>()[i], grad,
                         static_cast<float>(temperature));
        const int64_t column = ids.data_ptr<int64_t>()[i] - first_column;
        const bool is_local = 0 <= column && column < width;
        // Before the row is written, which may be in place.
        const float at_label = is_local ? label_gradient(row.logit(column), task) : 0.0f;
        kernels.gradient[kind](row.begin, out.begin, written, task);
        if (is_local) out.set(column, at_label);
      }
      std::memset(out.at(written), 0, num_zero_bytes);
    }
  });
}

}  // namespace

TORCH_LIBRARY(megatron_rl, library) {
  library.def("instruction_sets() -> str[]", instruction_sets);
  library.def(
      "token_logprobs_nodes(Tensor logits, Tensor labels, float temperature, int[] edges, "
      "int rank, int vocab_size, bool has_entropy, str instruction_set='') -> Tensor");
  library.def(
      "token_logprobs_finish(Tensor nodes, Tensor labels, int[] edges, int vocab_size, "
      "bool has_entropy, str instruction_set='', Tensor? is_counted=None, "
      "Tensor(a!)? flag=None) -> (Tensor logprobs, Tensor entropy, "
      "Tensor exponent, Tensor sum, Tensor maximum)");
  library.def(
      "token_logprobs_gradient(Tensor logits, Tensor labels, Tensor incoming, Tensor exponent, "
      "Tensor sum, float temperature, int first_column, int vocab_size, Tensor(a!) gradient, "
      "str instruction_set='') -> ()");
}

TORCH_LIBRARY_IMPL(megatron_rl, CPU, library) {
  library.impl("token_logprobs_nodes", token_logprobs_nodes);
  library.impl("token_logprobs_finish", token_logprobs_finish);
  library.impl("token_logprobs_gradient", token_logprobs_gradient);
}

}  // namespace megatron_rl

// `import megatron_rl._C` loads the library, which registers the operators; it has nothing else.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
