// The inner loops of cwd on CPU; s, t and out are the compute type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/common/exp.h"
#include "cpu/common/registers.h"
#include "cpu/common/vector.h"

namespace transkd {
namespace cwd {
namespace {

// What a part of a softmax gives: raw maxima, sums of e = exp((x - maximum) / temperature), and the sum of
// e_t ((t - its maximum) - (s - its maximum)), not yet divided by the temperature.
enum Partial { kStudentPeak, kStudentSum, kTeacherPeak, kTeacherSum, kCross, kPartials };

constexpr int64_t kPad = 16;  // columns of a tile are a multiple of it: of the vectors of every width

template <class V>
TRANSKD_INLINE void raise(V& peak, const V& x) {
  peak.lanes = x.lanes > peak.lanes ? x.lanes : peak.lanes;
}

// What is subtracted from the entries: where all of them are -inf, their e are to be 0.
template <class V>
TRANSKD_INLINE void set_shift(const V& peak, V& shift) {
  shift.lanes = peak.lanes == -std::numeric_limits<typename V::Element>::infinity() ? typename V::Lanes{} : peak.lanes;
}

// Adds one vector's entries; s and t are lost.
template <class V>
TRANSKD_INLINE void add_entries(V& s, V& t, const V& s_shift, const V& t_shift, typename V::Element scale, V& s_sum,
                                V& t_sum, V& cross) {
  s.lanes -= s_shift.lanes;
  t.lanes -= t_shift.lanes;
  const typename V::Lanes difference = t.lanes - s.lanes;
  s.lanes *= scale;
  t.lanes *= scale;
  exponential(s);
  exponential(t);
  s_sum.lanes += s.lanes;
  t_sum.lanes += t.lanes;
  // The difference may be infinite where e_t is 0.
  const typename V::Lanes term = t.lanes * difference;
  cross.lanes += t.lanes > 0 ? term : typename V::Lanes{};
}

// ---- A run of contiguous entries of one softmax.

template <class T>
struct Run {
  const T *s, *t;
  int64_t count;
  T scale;  // 1 / temperature
  double* partials;
  int64_t stride;  // between the kPartials numbers
};

// The entries from `from` on that fill no vector, and -inf beside them.
template <class V>
TRANSKD_INLINE void load_tail(const typename V::Element* from, int64_t count, V& x) {
  using T = typename V::Element;
  T padded[V::kSize];
  for (int i = 0; i < V::kSize; ++i) padded[i] = i < count ? from[i] : -std::numeric_limits<T>::infinity();
  x.load(padded);
}

template <class V>
TRANSKD_INLINE typename V::Element peak_of(const V& x) {
  typename V::Element values[V::kSize];
  x.store(values);
  for (int width = V::kSize / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) values[k] = values[k] > values[k + width] ? values[k] : values[k + width];
  }
  return values[0];
}

template <int Bytes, class T>
TRANSKD_INLINE void run_loop(const Run<T>& run) {
  using V = Vector<T, Bytes>;
  const int64_t whole = run.count / V::kSize * V::kSize, tail = run.count - whole;
  V s, t, s_peak, t_peak;
  s_peak.lanes -= std::numeric_limits<T>::infinity();
  t_peak = s_peak;
  for (int64_t i = 0; i < whole; i += V::kSize) {
    s.load(run.s + i);
    t.load(run.t + i);
    raise(s_peak, s);
    raise(t_peak, t);
  }
  if (tail > 0) {
    load_tail(run.s + whole, tail, s);
    load_tail(run.t + whole, tail, t);
    raise(s_peak, s);
    raise(t_peak, t);
  }
  const T s_most = peak_of(s_peak), t_most = peak_of(t_peak);
  s_peak.lanes = typename V::Lanes{} + s_most;
  t_peak.lanes = typename V::Lanes{} + t_most;
  V s_shift, t_shift, s_sum, t_sum, cross;
  set_shift(s_peak, s_shift);
  set_shift(t_peak, t_shift);
  for (int64_t i = 0; i < whole; i += V::kSize) {
    s.load(run.s + i);
    t.load(run.t + i);
    add_entries(s, t, s_shift, t_shift, run.scale, s_sum, t_sum, cross);
  }
  if (tail > 0) {
    load_tail(run.s + whole, tail, s);
    load_tail(run.t + whole, tail, t);
    add_entries(s, t, s_shift, t_shift, run.scale, s_sum, t_sum, cross);
  }
  const T partials[kPartials] = {s_most, s_sum.sum(), t_most, t_sum.sum(), cross.sum()};
  for (int k = 0; k < kPartials; ++k) run.partials[k * run.stride] = static_cast<double>(partials[k]);
}

// ---- A tile of entries, one softmax per column.

template <class T>
struct Tile {
  const T *s, *t;  // [rows, width], rows row_step apart
  int64_t rows, width, row_step;
  T scale;
  bool first;   // nothing is in the sums yet
  T* partials;  // [kPartials, width]
};

template <int Bytes, class T>
TRANSKD_INLINE void tile_loop(const Tile<T>& tile) {
  using V = Vector<T, Bytes>;
  const int64_t width = tile.width, step = tile.row_step;
  for (int64_t c = 0; c < width; c += V::kSize) {
    V s, t, s_old, t_old, s_shift, t_shift, s_sum, t_sum, cross;
    T* const partials = tile.partials + c;
    if (tile.first) {
      s_old.lanes -= std::numeric_limits<T>::infinity();
      t_old = s_old;
    } else {
      s_old.load(partials + kStudentPeak * width);
      t_old.load(partials + kTeacherPeak * width);
    }
    V s_peak = s_old, t_peak = t_old;
    for (int64_t i = c; i < tile.rows * step; i += step) {
      s.load(tile.s + i);
      t.load(tile.t + i);
      raise(s_peak, s);
      raise(t_peak, t);
    }
    set_shift(s_peak, s_shift);
    set_shift(t_peak, t_shift);
    if (!tile.first) {
      s_sum.load(partials + kStudentSum * width);
      t_sum.load(partials + kTeacherSum * width);
      cross.load(partials + kCross * width);
      s_old.lanes -= s_shift.lanes;
      t_old.lanes -= t_shift.lanes;
      const typename V::Lanes moved = t_old.lanes - s_old.lanes;
      s_old.lanes *= tile.scale;
      t_old.lanes *= tile.scale;
      exponential(s_old);
      exponential(t_old);
      const typename V::Lanes shifted = t_old.lanes * (cross.lanes + t_sum.lanes * moved);
      cross.lanes = t_old.lanes > 0 ? shifted : typename V::Lanes{};
      s_sum.lanes *= s_old.lanes;
      t_sum.lanes *= t_old.lanes;
    }
    for (int64_t i = c; i < tile.rows * step; i += step) {
      s.load(tile.s + i);
      t.load(tile.t + i);
      add_entries(s, t, s_shift, t_shift, tile.scale, s_sum, t_sum, cross);
    }
    s_peak.store(partials + kStudentPeak * width);
    s_sum.store(partials + kStudentSum * width);
    t_peak.store(partials + kTeacherPeak * width);
    t_sum.store(partials + kTeacherSum * width);
    cross.store(partials + kCross * width);
  }
}

// ---- The parts of some softmaxes together.

template <class T>
struct Merge {
  const double* partials;  // [parts, kPartials, ...]
  int64_t parts, part_stride, stride;
  int64_t count;  // softmaxes
  double scale;
  T* statistics;  // [4, ...]
  int64_t statistics_stride;
};

// The statistics; returns the sum of the divergences.
template <int Bytes, class T>
TRANSKD_INLINE double merge_loop(const Merge<T>& merge) {
  using V = Vector<double, Bytes>;
  using Lanes = typename V::Lanes;
  V total;
  for (int64_t first = 0; first < merge.count; first += V::kSize) {
    const int64_t count = std::min<int64_t>(V::kSize, merge.count - first);
    const auto load = [&](int64_t part, Partial which, V & x) __attribute__((always_inline)) {
      const double* const from = merge.partials + part * merge.part_stride + which * merge.stride + first;
      if (count == V::kSize) return x.load(from);
      double padded[V::kSize];  // beside the last softmax, ones of a single entry: their divergence is 0
      const double fill = which == kStudentSum || which == kTeacherSum ? 1 : 0;
      for (int i = 0; i < V::kSize; ++i) padded[i] = i < count ? from[i] : fill;
      x.load(padded);
    };
    V s_most, t_most;
    s_most.lanes -= std::numeric_limits<double>::infinity();
    t_most = s_most;
    for (int64_t p = 0; p < merge.parts; ++p) {
      V s_peak, t_peak;
      load(p, kStudentPeak, s_peak);
      load(p, kTeacherPeak, t_peak);
      raise(s_most, s_peak);
      raise(t_most, t_peak);
    }
    V s_sum, t_sum, cross;
    for (int64_t p = 0; p < merge.parts; ++p) {
      V s, t, s_part, t_part, cross_part;
      load(p, kStudentPeak, s);
      load(p, kTeacherPeak, t);
      load(p, kStudentSum, s_part);
      load(p, kTeacherSum, t_part);
      load(p, kCross, cross_part);
      s.lanes -= s_most.lanes;
      t.lanes -= t_most.lanes;
      const Lanes moved = t.lanes - s.lanes;
      s.lanes *= merge.scale;
      t.lanes *= merge.scale;
      exponential(s);
      exponential(t);
      s_sum.lanes += s.lanes * s_part.lanes;
      t_sum.lanes += t.lanes * t_part.lanes;
      const Lanes term = t.lanes * (cross_part.lanes + t_part.lanes * moved);
      cross.lanes += t.lanes > 0 ? term : Lanes{};
    }
    V s_log = s_sum, t_log = t_sum;
    logarithm(s_log);
    logarithm(t_log);
    total.lanes += cross.lanes / t_sum.lanes * merge.scale - t_log.lanes + s_log.lanes;
    double values[kPartials - 1][V::kSize];
    s_most.store(values[0]);
    s_log.store(values[1]);
    t_most.store(values[2]);
    t_log.store(values[3]);
    for (int k = 0; k < kPartials - 1; ++k) {
      T* const to = merge.statistics + k * merge.statistics_stride + first;
      for (int i = 0; i < count; ++i) to[i] = static_cast<T>(values[k][i]);
    }
  }
  return total.sum();
}

// ---- Backward: out = factor (p_s - p_t).

template <class T>
struct Gradient {
  const T *s, *t;
  T* out;
  int64_t rows, count;  // rows of so many contiguous entries, dense
  const T* statistics;  // of the first row or the first column
  int64_t stride;       // between the four
  bool strided;         // statistics go with the columns
  T scale, factor;
  bool stream;
};

template <class V>
TRANSKD_INLINE void gradient_of(V& s, V& t, const V (&statistics)[4], typename V::Element scale,
                                typename V::Element factor) {
  s.lanes = (s.lanes - statistics[0].lanes) * scale - statistics[1].lanes;
  t.lanes = (t.lanes - statistics[2].lanes) * scale - statistics[3].lanes;
  exponential(s);
  exponential(t);
  s.lanes = factor * (s.lanes - t.lanes);
}

template <int Bytes, bool kStrided, class T>
TRANSKD_INLINE void gradient_rows(const Gradient<T>& job) {
  using V = Vector<T, Bytes>;
  const int64_t whole = job.count / V::kSize * V::kSize, tail = job.count - whole;
  // Copies: what is stored may be anything, for all that the compiler knows, these numbers too.
  const T scale = job.scale, factor = job.factor;
  const bool stream = job.stream;
  const T* statistics_of[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) statistics_of[k] = job.statistics + k * job.stride;
  for (int64_t r = 0; r < job.rows; ++r) {
    const T* const s_row = job.s + r * job.count;
    const T* const t_row = job.t + r * job.count;
    T* const out = job.out + r * job.count;
    V s, t, statistics[4];
    if constexpr (!kStrided) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) statistics[k].lanes = typename V::Lanes{} + statistics_of[k][r];
    }
    for (int64_t i = 0; i < whole; i += V::kSize) {
      if constexpr (kStrided) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) statistics[k].load(statistics_of[k] + i);
      }
      s.load(s_row + i);
      t.load(t_row + i);
      gradient_of(s, t, statistics, scale, factor);
      s.store(out + i, stream);
    }
    if (tail > 0) {
      if constexpr (kStrided) {
        for (int k = 0; k < 4; ++k) load_tail(statistics_of[k] + whole, tail, statistics[k]);
      }
      load_tail(s_row + whole, tail, s);
      load_tail(t_row + whole, tail, t);
      gradient_of(s, t, statistics, scale, factor);
      T values[V::kSize];
      s.store(values);
      for (int64_t i = 0; i < tail; ++i) out[whole + i] = values[i];
    }
  }
}

template <int Bytes, class T>
TRANSKD_INLINE void gradient_loop(const Gradient<T>& job) {
  if (job.strided) {
    gradient_rows<Bytes, true>(job);
  } else {
    gradient_rows<Bytes, false>(job);
  }
}

#define TRANSKD_CWD_LOOPS(T)                                             \
  TRANSKD_BY_REGISTERS(void, add_run, const Run<T>&, run_loop)           \
  TRANSKD_BY_REGISTERS(void, add_tile, const Tile<T>&, tile_loop)        \
  TRANSKD_BY_REGISTERS(double, merge_parts, const Merge<T>&, merge_loop) \
  TRANSKD_BY_REGISTERS(void, make_gradient, const Gradient<T>&, gradient_loop)
TRANSKD_CWD_LOOPS(float)
TRANSKD_CWD_LOOPS(double)
#undef TRANSKD_CWD_LOOPS

}  // namespace
}  // namespace cwd
}  // namespace transkd
