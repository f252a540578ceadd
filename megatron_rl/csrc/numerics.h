// The arithmetic of the aligned log-prob, shared by the CPU kernels and CUDA.
//
//   logprob = y[label] - log sum exp(y),   y = logits / temperature, over the true vocabulary
//
// A sum of exponentials is a node (N, S): S * 2^N. 128 columns of the global vocabulary make a
// granule, granules are merged pairwise in a binary tree whose shape depends on nothing but their
// global position, and the root is finished in float64. Every operation below is rounded once, to
// nearest, so whoever follows this order gets the same bits. ops/reference.py is the same in torch.
//
// No floating-point function of libm, no contraction, no denormal is flushed: see setup.py for the
// flags, and FloatEnvironment in token_logprobs.cpp. On a GPU the operations are the intrinsics that
// name their rounding, which no compiler contracts or flushes.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define MEGATRON_RL_INLINE __host__ __device__ __forceinline__
#else
#define MEGATRON_RL_INLINE inline
#endif

#if defined(__CUDA_ARCH__)
#define MEGATRON_RL_UNROLL _Pragma("unroll")
#else
#define MEGATRON_RL_UNROLL
#endif

namespace megatron_rl {

struct Node {
  int32_t exponent;  // N
  float sum;         // S: sum exp(y) = S * 2^N
  float weighted;    // B: sum of S's terms times (y - N ln 2); 0 where no entropy is asked for
};

// 16-bit logits by their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
enum ScalarKind { kFloat32, kBFloat16, kFloat16, kNumScalarKinds };

// What the gradient of one row needs:  p = exp(y) / sum exp(y),  -G p, and G (1 - p) at the label.
struct GradientRow {
  float temperature;
  float offset;       // C of the root
  float floor;        // below it p is 0
  float inverse_sum;  // 1 / S
  float factor;       // -G = -(incoming gradient / temperature)
};

// Internal linkage: each file compiles its own copy for its own instruction set, and the linker
// must not merge an AVX-512 copy into the code that runs where there is none.
namespace {

constexpr int kGranule = 128;                 // columns
constexpr int32_t kEmptyExponent = -(1 << 30);  // N of a node that holds only -inf; its S is 0
constexpr int kDropped = 64;                  // 2^-64 and less of a sibling is dropped
constexpr float kLargestLogit = 0x1p+21f;     // a row's maximum lies within plus or minus this
constexpr float kReach = 80.0f;               // below its maximum by more, a column counts as this
constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e430p-1f;
constexpr float kMagic = 0x1.8p+23f;  // adding it rounds to an integer, kept in the low bits
// exp(r) on |r| <= ln(2) / 2 is 1 + r + c2 r^2 + ... + c5 r^5.
constexpr float kC5 = 0x1.106174p-7f, kC4 = 0x1.572c64p-5f;
constexpr float kC3 = 0x1.5557b6p-3f, kC2 = 0x1.fffdf8p-2f;

// float32 operations by name, so that no compiler contracts them; vector types overload them.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float subtract(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
// The larger one; NaN where one of them is. x86 keeps b's bits there: they reach no result.
__device__ __forceinline__ float larger(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ uint32_t to_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
#else
MEGATRON_RL_INLINE float add(float a, float b) { return a + b; }
MEGATRON_RL_INLINE float subtract(float a, float b) { return a - b; }
MEGATRON_RL_INLINE float multiply(float a, float b) { return a * b; }
MEGATRON_RL_INLINE float divide(float a, float b) { return a / b; }
MEGATRON_RL_INLINE float multiply_add(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
// The larger one; b where one of them is NaN, as x86 does.
MEGATRON_RL_INLINE float larger(float a, float b) { return a > b ? a : b; }
MEGATRON_RL_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
MEGATRON_RL_INLINE float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
#endif

// f * 2^n, where adding kMagic left n in the low bits of t.
MEGATRON_RL_INLINE float scale_by_low_bits(float f, float t) {
  return from_bits(to_bits(f) + (to_bits(t) << 23));
}

template <class Float>
MEGATRON_RL_INLINE Float splat(float x);
template <>
MEGATRON_RL_INLINE float splat<float>(float x) {
  return x;
}

// 2^-k for k of 0 to 126.
MEGATRON_RL_INLINE float power_of_half(int32_t k) {
  return from_bits(static_cast<uint32_t>(127 - k) << 23);
}

// What the terms of a granule are measured against.
template <class Float>
struct Reference {
  Float exponent;  // N, an integer: the granule's maximum in units of ln 2
  Float offset;    // C, so that adding it to y * log2(e) leaves n - N in the low bits
  Float floor;     // smaller columns count as this one, so that no term is denormal
};

template <class Float>
MEGATRON_RL_INLINE Reference<Float> reference(Float maximum) {
  const Float raised = larger(splat<Float>(-kLargestLogit), maximum);
  const Float magic = splat<Float>(kMagic);
  const Float exponent = subtract(multiply_add(raised, splat<Float>(kLog2e), magic), magic);
  return {exponent, subtract(magic, exponent), subtract(raised, splat<Float>(kReach))};
}

// exp(y) * 2^-N, for y not below the reference's floor.
template <class Float>
MEGATRON_RL_INLINE Float term(Float y, Float offset) {
  const Float t = multiply_add(y, splat<Float>(kLog2e), offset);
  const Float n = subtract(t, offset);
  const Float r = multiply_add(n, splat<Float>(-kLn2), y);
  Float f = multiply_add(splat<Float>(kC5), r, splat<Float>(kC4));
  f = multiply_add(f, r, splat<Float>(kC3));
  f = multiply_add(f, r, splat<Float>(kC2));
  f = multiply_add(f, r, splat<Float>(1.0f));
  f = multiply_add(f, r, splat<Float>(1.0f));
  return scale_by_low_bits(f, t);
}

// A term times (y - N ln 2), for the entropy.
template <class Float>
MEGATRON_RL_INLINE Float weighted_term(Float e, Float y, Float exponent) {
  return multiply(e, multiply_add(exponent, splat<Float>(-kLn2), y));
}

MEGATRON_RL_INLINE Node merge(Node a, Node b) {
  const bool is_swapped = a.exponent < b.exponent;
  const Node high = is_swapped ? b : a;
  const Node low = is_swapped ? a : b;
  const int32_t k = high.exponent - low.exponent;
  const bool is_dropped = k >= kDropped;
  const float scale = power_of_half(is_dropped ? 0 : k);
  const float shift = multiply(static_cast<float>(k), kLn2);
  const float shifted = multiply_add(low.sum, -shift, low.weighted);
  const float sum = add(high.sum, multiply(low.sum, scale));
  const float weighted = add(high.weighted, multiply(shifted, scale));
  return {high.exponent, is_dropped ? high.sum : sum, is_dropped ? high.weighted : weighted};
}

// Complete nodes come in global order; siblings are merged as soon as both are there.
class Tree {
 public:
  // A node of level l holds the 2^l granules from `granule`, a multiple of 2^l.
  MEGATRON_RL_INLINE void push(int64_t granule, int level, Node node) {
    while (size_ > 0 && entries_[size_ - 1].level == level &&
           entries_[size_ - 1].granule >> (level + 1) == granule >> (level + 1)) {
      --size_;
      node = merge(entries_[size_].node, node);
      granule = entries_[size_].granule;
      ++level;
    }
    entries_[size_++] = {granule, level, node};
  }

  // The root once granules 0 to the last one are there: an absent sibling changes nothing.
  MEGATRON_RL_INLINE Node root() const {
    Node node = entries_[size_ - 1].node;
    for (int i = size_ - 2; i >= 0; --i) node = merge(entries_[i].node, node);
    return node;
  }

  MEGATRON_RL_INLINE int size() const { return size_; }
  MEGATRON_RL_INLINE Node node(int i) const { return entries_[i].node; }

 private:
  struct Entry {
    int64_t granule;
    int level;
    Node node;
  };
  Entry entries_[64];
  int size_ = 0;
};

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ uint64_t to_bits(double x) { return __double_as_longlong(x); }
__device__ __forceinline__ double from_bits64(uint64_t bits) { return __longlong_as_double(bits); }
#else
MEGATRON_RL_INLINE double add(double a, double b) { return a + b; }
MEGATRON_RL_INLINE double multiply(double a, double b) { return a * b; }
MEGATRON_RL_INLINE double divide(double a, double b) { return a / b; }
MEGATRON_RL_INLINE uint64_t to_bits(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
MEGATRON_RL_INLINE double from_bits64(uint64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
#endif

// Natural logarithm of a positive normal number: x = 2^k q, and log q by its atanh series.
MEGATRON_RL_INLINE double logarithm(double x) {
  const uint64_t bits = to_bits(x);
  int k = static_cast<int>(bits >> 52) - 1023;
  double q = from_bits64((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (q > 0x1.6a09e667f3bcdp+0) {  // sqrt(2)
    q = multiply(q, 0.5);
    ++k;
  }
  const double z = divide(add(q, -1.0), add(q, 1.0));
  const double w = multiply(z, z);
  double series = 1.0 / 19;
  MEGATRON_RL_UNROLL  // so that the compiler divides
  for (int i = 17; i >= 1; i -= 2) series = add(multiply(series, w), 1.0 / i);
  return add(multiply(static_cast<double>(k), 0x1.62e42fefa39efp-1),
             multiply(2.0, multiply(z, series)));
}

MEGATRON_RL_INLINE float finish_logprob(Node root, float label_logit) {
  const double log_sum_exp = add(
      multiply(static_cast<double>(root.exponent), static_cast<double>(kLn2)), logarithm(root.sum));
  const double logprob = add(static_cast<double>(label_logit), -log_sum_exp);
  return static_cast<float>(logprob < 0.0 ? logprob : 0.0);
}

MEGATRON_RL_INLINE float finish_entropy(Node root) {
  const double mean = divide(static_cast<double>(root.weighted), static_cast<double>(root.sum));
  const double entropy = add(logarithm(root.sum), -mean);
  return static_cast<float>(entropy > 0.0 ? entropy : 0.0);
}

MEGATRON_RL_INLINE GradientRow gradient_row(int32_t exponent, float sum, float incoming,
                                            float temperature) {
  const float offset = subtract(kMagic, static_cast<float>(exponent));
  const double floor =
      multiply(static_cast<double>(exponent - kDropped), static_cast<double>(kLn2));
  const float scaled = temperature == 1.0f ? incoming : divide(incoming, temperature);
  return {temperature, offset, static_cast<float>(floor), divide(1.0f, sum), -scaled};
}

MEGATRON_RL_INLINE float label_gradient(float y, const GradientRow& row) {
  const float e = y < row.floor ? 0.0f : term(y, row.offset);
  return multiply(-row.factor, subtract(1.0f, multiply(e, row.inverse_sum)));
}

}  // namespace
}  // namespace megatron_rl
