// The geometry of hcl's pyramid: which levels count, with which weights, and how adaptive windows cut an axis.
#pragma once

#include <algorithm>
#include <cstdint>

namespace transkd {

constexpr int kLevels = 3;
constexpr int64_t kLevelSize[kLevels] = {4, 2, 1};
constexpr double kPublishedWeights[kLevels] = {0.5, 0.25, 0.125};
// Window borders of l = 4 and 2: floor and ceil of n/4, n/2, 3n/4, and the two ends.
constexpr int kMaxSegments = 7;
constexpr int kMaxCells = kMaxSegments * kMaxSegments;

// One pooling window on one axis: a run of whole segments, [first, last), and its length in pixels.
struct Window {
  int first = 0, last = 0;
  double length = 0;
};

// One axis, cut at every border of every window, so that each window is a run of whole segments.
struct Axis {
  int64_t size = 0;
  int segments = 0;
  int64_t edge[kMaxSegments + 1] = {};
  Window window[kLevels][kLevelSize[0]];
};

struct Pyramid {
  Axis rows, columns;
  bool used[kLevels] = {};
  double weight[kLevels] = {};  // already divided by the sum of all weights
  double pixel_weight = 0;      // likewise; the weight of the full-resolution term

  // level_weights: kLevels of them, the n-th for the n-th level that is used.
  Pyramid(int64_t height, int64_t width, const double* level_weights = kPublishedWeights) {
    double total = 1;
    for (int k = 0; k < kLevels; ++k) {
      used[k] = kLevelSize[k] < std::min(height, width);
      if (!used[k]) continue;
      weight[k] = *level_weights++;
      total += weight[k];
    }
    pixel_weight = 1 / total;
    for (double& w : weight) w /= total;
    rows = cut(height);
    columns = cut(width);
  }

  int cells() const { return rows.segments * columns.segments; }

 private:
  // F.adaptive_avg_pool's window i of l over an axis of n is [floor(i n / l), ceil((i + 1) n / l)).
  static int64_t begin_of(int64_t i, int64_t l, int64_t n) { return i * n / l; }
  static int64_t end_of(int64_t i, int64_t l, int64_t n) { return ((i + 1) * n + l - 1) / l; }

  Axis cut(int64_t n) const {
    int64_t borders[2 * (4 + 2 + 1) + 2] = {0, n};
    int count = 2;
    for (int k = 0; k < kLevels; ++k) {
      for (int64_t i = 0; used[k] && i < kLevelSize[k]; ++i) {
        borders[count++] = begin_of(i, kLevelSize[k], n);
        borders[count++] = end_of(i, kLevelSize[k], n);
      }
    }
    std::sort(borders, borders + count);
    const int64_t* past = std::unique(borders, borders + count);
    Axis axis;
    axis.size = n;
    axis.segments = static_cast<int>(past - borders) - 1;
    std::copy(const_cast<const int64_t*>(borders), past, axis.edge);
    for (int k = 0; k < kLevels; ++k) {
      for (int64_t i = 0; used[k] && i < kLevelSize[k]; ++i) {
        const int64_t begin = begin_of(i, kLevelSize[k], n), end = end_of(i, kLevelSize[k], n);
        axis.window[k][i].first =
            static_cast<int>(std::lower_bound(axis.edge, axis.edge + axis.segments, begin) - axis.edge);
        axis.window[k][i].last =
            static_cast<int>(std::lower_bound(axis.edge, axis.edge + axis.segments, end) - axis.edge);
        axis.window[k][i].length = static_cast<double>(end - begin);
      }
    }
    return axis;
  }
};

}  // namespace transkd
