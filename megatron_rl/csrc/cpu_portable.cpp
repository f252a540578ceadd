// The CPU kernels in plain C++, for any machine.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu_tile.h"

namespace megatron_rl {
namespace {

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) { return static_cast<float>(c10::Half(x.bits, c10::Half::from_bits())); }
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, BFloat16& to) { to.bits = c10::BFloat16(x).x; }
inline void narrow(float x, Half& to) { to.bits = c10::Half(x).x; }

struct Lanes {
  using Flag = bool;
  float at[kLanes];

  static bool any(bool flag) { return flag; }

  template <class Scalar>
  static Lanes load(const Scalar* from) {
    Lanes x;
    for (int i = 0; i < kLanes; ++i) x.at[i] = widen(from[i]);
    return x;
  }
};

template <class Function>
inline Lanes map(Function function) {
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result.at[i] = function(i);
  return result;
}

template <>
inline Lanes splat<Lanes>(float x) {
  return map([&](int) { return x; });
}

inline Lanes add(const Lanes& a, const Lanes& b) {
  return map([&](int i) { return add(a.at[i], b.at[i]); });
}

inline Lanes subtract(const Lanes& a, const Lanes& b) {
  return map([&](int i) { return subtract(a.at[i], b.at[i]); });
}

inline Lanes multiply(const Lanes& a, const Lanes& b) {
  return map([&](int i) { return multiply(a.at[i], b.at[i]); });
}

inline Lanes divide(const Lanes& a, const Lanes& b) {
  return map([&](int i) { return divide(a.at[i], b.at[i]); });
}

inline Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return map([&](int i) { return multiply_add(a.at[i], b.at[i], c.at[i]); });
}

inline Lanes larger(const Lanes& a, const Lanes& b) {
  return map([&](int i) { return larger(a.at[i], b.at[i]); });
}

inline Lanes scale_by_low_bits(const Lanes& f, const Lanes& t) {
  return map([&](int i) { return scale_by_low_bits(f.at[i], t.at[i]); });
}

inline Lanes zero_below(const Lanes& y, const Lanes& floor, const Lanes& x) {
  return map([&](int i) { return y.at[i] < floor.at[i] ? 0.0f : x.at[i]; });
}

inline void note_nan(bool& flag, const Lanes& a, const Lanes& b) {
  for (int i = 0; i < kLanes; ++i) flag |= a.at[i] != a.at[i] || b.at[i] != b.at[i];
}

template <class Scalar>
inline void store(const Lanes& x, Scalar* to) {
  for (int i = 0; i < kLanes; ++i) narrow(x.at[i], to[i]);
}

template <class Op>
inline Lanes fold(const Lanes (&rows)[kLanes], Op op) {
  return map([&](int g) {
    Lanes row = rows[g];
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) row.at[i] = op(row.at[2 * i], row.at[2 * i + 1]);
    }
    return row.at[0];
  });
}

}  // namespace

const CpuKernels kPortableKernels = kernels_of<Lanes>("portable");

}  // namespace megatron_rl
