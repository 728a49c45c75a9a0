// The inner loops of seg_ce on CPU, over tiles [classes, width]: a row of interpolated scores, or of their gradients,
// for some label columns. width is a multiple of kPad.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/common/exp.h"
#include "cpu/common/registers.h"
#include "cpu/common/vector.h"
#include "cpu/seg_ce_columns.h"

namespace transkd {
namespace seg_ce {
namespace {

constexpr int kRows = 4;  // label rows between the same two source rows that are taken together

// ---- Labels of one row.

template <class T, class Storage>
struct Labels {
  const Storage* labels;
  int64_t count, width;  // the columns from count on are filled up
  int64_t classes, ignore_index;
  const T* table;     // [classes + 1], weights of the classes, and 0
  Class<T>* targets;  // class, or `classes` where the pixel does not count
  T* weights;
  int64_t *labelled, *ignored;
};

template <int, class T, class Storage>
TRANSKD_INLINE void labels_loop(const Labels<T, Storage>& row) {
  int64_t labelled = 0, ignored = 0;
  for (int64_t x = 0; x < row.count; ++x) {
    const int64_t label = static_cast<int64_t>(row.labels[x]);
    const bool valid = static_cast<uint64_t>(label) < static_cast<uint64_t>(row.classes);
    const int64_t target = valid ? label : row.classes;
    labelled += valid;
    ignored += label == row.ignore_index;
    row.targets[x] = static_cast<Class<T>>(target);
    row.weights[x] = row.table[target];
  }
  for (int64_t x = row.count; x < row.width; ++x) {
    row.targets[x] = static_cast<Class<T>>(row.classes);
    row.weights[x] = 0;
  }
  *row.labelled += labelled;
  *row.ignored += ignored;
}

// ---- Label pixels between two source rows.

template <class T>
struct Pixels {
  const T *upper, *lower;  // [classes, width]
  int64_t classes, width;
  bool mix;  // else the upper row is the label row
  int rows;
  T fraction[kRows];                   // the lower row's share
  const Class<T>* targets[kRows];      // [width]; `classes` where a pixel does not count
  const T* weights[kRows];             // [width]
  T* values;                           // room for (classes + 1) kRows kPad
  T *upper_gradient, *lower_gradient;  // [classes, width], added to; or null
  double *loss, *total;
  int64_t* right;
};

template <bool kMix, class V>
TRANSKD_INLINE void mix_rows(const V& upper, const V& lower, typename V::Element fraction, V& value) {
  if constexpr (kMix) {
    value.lanes = (1 - fraction) * upper.lanes + fraction * lower.lanes;
  } else {
    value = upper;
  }
}

// The classes of the highest scores where one of the scores is NaN: the first NaN. `lower` is null where nothing is
// mixed.
template <class T>
void classes_with_nan(const T* upper, const T* lower, int64_t classes, int64_t width, T fraction, int lanes,
                      Class<T>* best) {
  for (int i = 0; i < lanes; ++i) {
    for (int64_t k = 0; k < classes; ++k) {
      const T high = upper[k * width + i];
      const T value = lower == nullptr ? high : (1 - fraction) * high + fraction * lower[k * width + i];
      if (value != value) {
        best[i] = static_cast<Class<T>>(k);
        break;
      }
    }
  }
}

template <int Bytes, int R, bool kMix, class T>
TRANSKD_INLINE void pixels_rows(const Pixels<T>& job) {
  using V = Vector<T, Bytes>;
  using Lanes = typename V::Lanes;
  typedef Class<T> Index __attribute__((vector_size(Bytes)));
  constexpr int kSize = V::kSize, kStep = R * kSize;
  const int64_t classes = job.classes, width = job.width;
  T* const values = job.values;
  V loss, total;
  Index right = {};
  for (int64_t x = 0; x < width; x += kSize) {
    V highest[R];
    Index best[R] = {};
    for (int r = 0; r < R; ++r) highest[r].lanes -= std::numeric_limits<T>::infinity();
    for (int64_t k = 0; k < classes; ++k) {
      V upper, lower;
      upper.load(job.upper + k * width + x);
      if constexpr (kMix) lower.load(job.lower + k * width + x);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V value;
        mix_rows<kMix>(upper, lower, job.fraction[r], value);
        value.store(values + k * kStep + r * kSize);
        const auto higher = value.lanes > highest[r].lanes;
        highest[r].lanes = higher ? value.lanes : highest[r].lanes;
        best[r] = higher ? Index{} + static_cast<Class<T>>(k) : best[r];
      }
    }
    V picked[R], sum[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V().store(values + classes * kStep + r * kSize);
      T at[kSize];
      for (int i = 0; i < kSize; ++i) at[i] = values[job.targets[r][x + i] * kStep + r * kSize + i];
      picked[r].load(at);
    }
    for (int64_t k = 0; k < classes; ++k) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V value;
        value.load(values + k * kStep + r * kSize);
        value.lanes -= highest[r].lanes;
        exponential(value);
        sum[r].lanes += value.lanes;
        value.store(values + k * kStep + r * kSize);
      }
    }
    V sums;
    for (int r = 0; r < R; ++r) sums.lanes += sum[r].lanes;
    if (const T all = sums.sum(); all != all) {
      for (int r = 0; r < R; ++r) {
        Class<T> classes_of[kSize];
        std::memcpy(classes_of, &best[r], Bytes);
        classes_with_nan(job.upper + x, kMix ? job.lower + x : nullptr, classes, width, job.fraction[r], kSize,
                         classes_of);
        std::memcpy(&best[r], classes_of, Bytes);
      }
    }
    V upper_scale[R], lower_scale[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V weight, log = sum[r];
      Index target;
      weight.load(job.weights[r] + x);
      std::memcpy(&target, job.targets[r] + x, Bytes);
      logarithm(log);
      const auto counts = target != static_cast<Class<T>>(classes);
      const Lanes term = weight.lanes * (log.lanes + (highest[r].lanes - picked[r].lanes));
      loss.lanes += counts ? term : Lanes{};
      total.lanes += weight.lanes;
      right -= (Index)(best[r] == target);
      // The softmax less 1 at the label, times the sum; what does not count has a place beyond the classes.
      T subtract[kSize];
      sum[r].store(subtract);
      for (int i = 0; i < kSize; ++i) values[job.targets[r][x + i] * kStep + r * kSize + i] -= subtract[i];
      const Lanes scale = weight.lanes / sum[r].lanes;
      if constexpr (kMix) {
        upper_scale[r].lanes = (1 - job.fraction[r]) * scale;
        lower_scale[r].lanes = job.fraction[r] * scale;
      } else {
        upper_scale[r].lanes = scale;
      }
    }
    if (job.upper_gradient == nullptr) continue;
    for (int64_t k = 0; k < classes; ++k) {
      V upper, lower;
      upper.load(job.upper_gradient + k * width + x);
      if constexpr (kMix) lower.load(job.lower_gradient + k * width + x);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V value;
        value.load(values + k * kStep + r * kSize);
        upper.lanes += upper_scale[r].lanes * value.lanes;
        if constexpr (kMix) lower.lanes += lower_scale[r].lanes * value.lanes;
      }
      upper.store(job.upper_gradient + k * width + x);
      if constexpr (kMix) lower.store(job.lower_gradient + k * width + x);
    }
  }
  *job.loss += static_cast<double>(loss.sum());
  *job.total += static_cast<double>(total.sum());
  Class<T> counted[kSize];
  std::memcpy(counted, &right, Bytes);
  for (const Class<T> count : counted) *job.right += count;
}

template <int Bytes, class T>
TRANSKD_INLINE void pixels_loop(const Pixels<T>& job) {
  if (!job.mix) return pixels_rows<Bytes, 1, false>(job);
  if (job.rows == 4) return pixels_rows<Bytes, 4, true>(job);
  if (job.rows == 2) return pixels_rows<Bytes, 2, true>(job);
  pixels_rows<Bytes, 1, true>(job);
}

// ---- The classes of the highest scores of one label row.

template <class T>
struct Best {
  const T *upper, *lower;
  int64_t classes, width;
  bool mix;
  T fraction;
  int64_t count;  // of the width
  int64_t* to;
};

template <int Bytes, bool kMix, class T>
TRANSKD_INLINE void best_row(const Best<T>& row) {
  using V = Vector<T, Bytes>;
  typedef Class<T> Index __attribute__((vector_size(Bytes)));
  constexpr int64_t kSize = V::kSize;
  for (int64_t x = 0; x < row.count; x += kSize) {
    const T *upper = row.upper + x, *lower = kMix ? row.lower + x : nullptr;
    V highest, poison;  // which a NaN or an infinite score makes NaN
    Index best = {};
    highest.lanes -= std::numeric_limits<T>::infinity();
    for (int64_t k = 0; k < row.classes; ++k) {
      V high, low, value;
      high.load(upper + k * row.width);
      if constexpr (kMix) low.load(lower + k * row.width);
      mix_rows<kMix>(high, low, row.fraction, value);
      const auto higher = value.lanes > highest.lanes;
      highest.lanes = higher ? value.lanes : highest.lanes;
      best = higher ? Index{} + static_cast<Class<T>>(k) : best;
      poison.lanes += value.lanes * 0;
    }
    Class<T> values[kSize];
    std::memcpy(values, &best, Bytes);
    if (const T all = poison.sum(); all != all) {
      classes_with_nan(upper, lower, row.classes, row.width, row.fraction, kSize, values);
    }
    const int64_t count = std::min(kSize, row.count - x);
    for (int64_t i = 0; i < count; ++i) row.to[x + i] = values[i];
  }
}

template <int Bytes, class T>
TRANSKD_INLINE void best_loop(const Best<T>& row) {
  if (row.mix) {
    best_row<Bytes, true>(row);
  } else {
    best_row<Bytes, false>(row);
  }
}

// ---- Backward: to = factor * from.

template <class T>
struct Scale {
  const T* from;
  int64_t count;
  T factor;
  T* to;
};

template <int, class T>
TRANSKD_INLINE void scale_loop(const Scale<T>& run) {
  for (int64_t i = 0; i < run.count; ++i) run.to[i] = run.factor * run.from[i];
}

#define TRANSKD_COMMA ,
#define TRANSKD_SEG_CE_LABELS(T, Storage) \
  TRANSKD_BY_REGISTERS(void, read_labels, const Labels<T TRANSKD_COMMA Storage>&, labels_loop)
#define TRANSKD_SEG_CE_LOOPS(T)                                         \
  TRANSKD_SEG_CE_LABELS(T, uint8_t)                                     \
  TRANSKD_SEG_CE_LABELS(T, int16_t)                                     \
  TRANSKD_SEG_CE_LABELS(T, int32_t)                                     \
  TRANSKD_SEG_CE_LABELS(T, int64_t)                                     \
  TRANSKD_BY_REGISTERS(void, add_pixels, const Pixels<T>&, pixels_loop) \
  TRANSKD_BY_REGISTERS(void, choose_classes, const Best<T>&, best_loop) \
  TRANSKD_BY_REGISTERS(void, scale, const Scale<T>&, scale_loop)
TRANSKD_SEG_CE_LOOPS(float)
TRANSKD_SEG_CE_LOOPS(double)
#undef TRANSKD_SEG_CE_LOOPS
#undef TRANSKD_SEG_CE_LABELS
#undef TRANSKD_COMMA

}  // namespace
}  // namespace seg_ce
}  // namespace transkd
