// The loops of seg_ce on CPU along the columns of one source row: interpolated to label columns, and gradients of label
// columns brought back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/common/registers.h"
#include "cpu/common/vector.h"

namespace transkd {
namespace seg_ce {
namespace {

constexpr int64_t kPad = 16;  // tiles are multiples of it wide: of the vectors of every instruction set

// Integers of the lanes' width, for classes and columns.
template <class T>
using Class = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// ---- Interpolation of one source row along its columns.

template <class T>
struct Expand {
  const T* from;  // [classes, stride], with kPad columns to spare, of which the first repeats the last one
  int64_t stride, classes;
  const Class<T>* first;  // [width], the columns to read
  const T* fraction;      // [width], the share of the next one
  int64_t next;           // 1, or 0 where a column has no other than itself
  int64_t width;
  bool finer;  // neighbouring label columns read the same or neighbouring columns
  bool copy;   // label columns are columns
  T* to;       // [classes, width]
};

template <int Bytes, class T>
TRANSKD_INLINE void expand_loop(const Expand<T>& row) {
  using V = Vector<T, Bytes>;
  typedef Class<T> Index __attribute__((vector_size(Bytes)));
  if (row.copy) {
    for (int64_t k = 0; k < row.classes; ++k) {
      std::copy_n(row.from + k * row.stride + row.first[0], row.width, row.to + k * row.width);
    }
    return;
  }
  for (int64_t x = 0; x < row.width; x += V::kSize) {
    V fraction, rest;
    fraction.load(row.fraction + x);
    rest.lanes = T(1) - fraction.lanes;
    if (row.finer) {
      Index index;
      std::memcpy(&index, row.first + x, Bytes);
      const int64_t base = row.first[x];
      index -= static_cast<Class<T>>(base);
      const T* from = row.from + base;
      T* to = row.to + x;
      for (int64_t k = 0; k < row.classes; ++k, from += row.stride, to += row.width) {
        V left, right;
        left.load(from);
        right.load(from + row.next);
        left.lanes =
            rest.lanes * __builtin_shuffle(left.lanes, index) + fraction.lanes * __builtin_shuffle(right.lanes, index);
        left.store(to);
      }
    } else {
      for (int64_t k = 0; k < row.classes; ++k) {
        T left[V::kSize], right[V::kSize];
        for (int i = 0; i < V::kSize; ++i) {
          const T* const from = row.from + k * row.stride + row.first[x + i];
          left[i] = from[0];
          right[i] = from[row.next];
        }
        V sum, other;
        sum.load(left);
        other.load(right);
        sum.lanes = rest.lanes * sum.lanes + fraction.lanes * other.lanes;
        sum.store(row.to + k * row.width + x);
      }
    }
  }
}

// ---- The transposed of it: gradients of label columns, added to those of the columns they read.

template <class T>
struct Collapse {
  const T* from;  // [classes, width]
  int64_t classes, width;
  const int64_t* start;   // [columns + 1], the label columns that read each column first
  int64_t columns, last;  // `last` is the one that has no next
  int64_t next;
  const T* fraction;
  T* to;  // of the first column
  int64_t class_stride, column_stride;
};

template <int kClasses, class T>
TRANSKD_INLINE void collapse_classes(const Collapse<T>& row, int64_t k) {
  const T* const from = row.from + k * row.width;
  T* const to = row.to + k * row.class_stride;
  T here[kClasses] = {};
  for (int64_t j = 0; j < row.columns; ++j) {
    T there[kClasses] = {};
    for (int64_t x = row.start[j]; x < row.start[j + 1]; ++x) {
      const T fraction = row.fraction[x], rest = 1 - fraction;
#pragma GCC unroll 4
      for (int i = 0; i < kClasses; ++i) {
        const T value = from[i * row.width + x];
        here[i] += rest * value;
        there[i] += fraction * value;
      }
    }
    const bool alone = row.next == 0 || j == row.last;
#pragma GCC unroll 4
    for (int i = 0; i < kClasses; ++i) {
      to[i * row.class_stride + j * row.column_stride] += alone ? here[i] + there[i] : here[i];
      here[i] = alone ? T(0) : there[i];
    }
  }
  if (row.columns <= row.last) {
    for (int i = 0; i < kClasses; ++i) to[i * row.class_stride + row.columns * row.column_stride] += here[i];
  }
}

template <int, class T>
TRANSKD_INLINE void collapse_loop(const Collapse<T>& row) {
  int64_t k = 0;
  for (; k + 4 <= row.classes; k += 4) collapse_classes<4>(row, k);
  for (; k < row.classes; ++k) collapse_classes<1>(row, k);
}

#define TRANSKD_SEG_CE_COLUMNS(T)                                       \
  TRANSKD_BY_REGISTERS(void, expand_row, const Expand<T>&, expand_loop) \
  TRANSKD_BY_REGISTERS(void, collapse_row, const Collapse<T>&, collapse_loop)
TRANSKD_SEG_CE_COLUMNS(float)
TRANSKD_SEG_CE_COLUMNS(double)
#undef TRANSKD_SEG_CE_COLUMNS

}  // namespace
}  // namespace seg_ce
}  // namespace transkd
