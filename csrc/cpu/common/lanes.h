// Loops over channels or columns written once for vectors of several widths: f of over_lanes() gets the type of the
// lanes at hand and computes with +, - and * on them.
#pragma once

#include <cstdint>

#include "cpu/common/vector.h"

namespace transkd {

// Some vectors side by side, as many as stay in registers with their sums and coefficients.
template <class V, int N>
struct Lanes {
  using T = typename V::Element;
  V part[N];

  TRANSKD_INLINE Lanes() = default;
  TRANSKD_INLINE explicit Lanes(const T* from) {
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) part[k].load(from + k * V::kSize);
  }
  TRANSKD_INLINE void store(T* to, bool past_cache = false) const {
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) part[k].store(to + k * V::kSize, past_cache);
  }
  // sums += these lanes, in memory.
  template <class Sum>
  TRANSKD_INLINE void add_to(Sum* sums) const {
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
      if constexpr (sizeof(Sum) == sizeof(T)) {
        V sum;
        sum.load(sums + k * V::kSize);
        sum.lanes += part[k].lanes;
        sum.store(sums + k * V::kSize);
      } else {
        T values[V::kSize];
        part[k].store(values);
        for (int i = 0; i < V::kSize; ++i) sums[k * V::kSize + i] += static_cast<Sum>(values[i]);
      }
    }
  }

#define TRANSKD_OPERATOR(op)                                                                                           \
  TRANSKD_INLINE friend Lanes operator op(const Lanes& a, const Lanes& b) {                                            \
    Lanes result;                                                                                                      \
    _Pragma("GCC unroll 4") for (int k = 0; k < N; ++k) { result.part[k].lanes = a.part[k].lanes op b.part[k].lanes; } \
    return result;                                                                                                     \
  }                                                                                                                    \
  TRANSKD_INLINE friend Lanes operator op(const Lanes& a, T b) {                                                       \
    Lanes result;                                                                                                      \
    _Pragma("GCC unroll 4") for (int k = 0; k < N; ++k) result.part[k].lanes = a.part[k].lanes op b;                   \
    return result;                                                                                                     \
  }
  TRANSKD_OPERATOR(+)
  TRANSKD_OPERATOR(-)
  TRANSKD_OPERATOR(*)
#undef TRANSKD_OPERATOR
};

template <class L>
struct Tag {
  using Type = L;
};

// Calls f(Tag<Lanes>, first element) for lanes that cover `count` elements: kVectors vectors at a time first, single
// elements at the end.
template <class T, int kVectors = 4, class F>
TRANSKD_INLINE void over_lanes(int64_t count, const F& f) {
  constexpr int kSize = Vector<T>::kSize;
  int64_t i = 0;
  for (; i + kVectors * kSize <= count; i += kVectors * kSize) f(Tag<Lanes<Vector<T>, kVectors>>(), i);
  for (; i + kSize <= count; i += kSize) f(Tag<Lanes<Vector<T>, 1>>(), i);
  for (; i < count; ++i) f(Tag<Lanes<Vector<T, sizeof(T)>, 1>>(), i);
}

// The sum of lanes of all widths.
template <class T>
struct Total {
  Vector<T> whole[2];  // two, so that additions do not wait for each other
  T single = 0;

  template <class V, int N>
  TRANSKD_INLINE void add(const Lanes<V, N>& lanes) {
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
      if constexpr (V::kSize == Vector<T>::kSize) {
        whole[k % 2].lanes += lanes.part[k].lanes;
      } else {
        single += lanes.part[k].sum();
      }
    }
  }
  TRANSKD_INLINE double sum() const {
    return static_cast<double>(whole[0].sum()) + static_cast<double>(whole[1].sum()) + static_cast<double>(single);
  }
};

}  // namespace transkd
