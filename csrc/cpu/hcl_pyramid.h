// The geometry of hcl's pyramid: which levels count, with which weights, and how adaptive windows cut an axis.
#pragma once

#include <algorithm>
#include <cstdint>

namespace transkd {

constexpr int kLevels = 3;
constexpr int64_t kLevelSize[kLevels] = {4, 2, 1};
// Window borders of l = 4 and 2: floor and ceil of n/4, n/2, 3n/4, and the two ends.
constexpr int kMaxSegments = 7;
constexpr int kMaxCells = kMaxSegments * kMaxSegments;

// One axis, cut at every border of every window, so that each window is a run of whole segments.
struct Axis {
  int64_t size = 0;
  int segments = 0;
  int64_t edge[kMaxSegments + 1] = {};
  int segment_of_edge(int64_t position) const {
    return static_cast<int>(std::lower_bound(edge, edge + segments + 1, position) - edge);
  }
};

// F.adaptive_avg_pool's window i of l over an axis of n.
inline int64_t window_begin(int64_t i, int64_t l, int64_t n) { return i * n / l; }
inline int64_t window_end(int64_t i, int64_t l, int64_t n) { return ((i + 1) * n + l - 1) / l; }

struct Pyramid {
  Axis rows, columns;
  bool used[kLevels] = {};
  double weight[kLevels] = {};  // already divided by the sum of all weights
  double pixel_weight = 0;      // likewise; the weight of the full-resolution term

  Pyramid(int64_t height, int64_t width) {
    double total = 1, next = 0.5;
    for (int k = 0; k < kLevels; ++k) {
      used[k] = kLevelSize[k] < std::min(height, width);
      if (!used[k]) continue;
      weight[k] = next;
      total += next;
      next /= 2;  // the weight halves only for levels that are used
    }
    pixel_weight = 1 / total;
    for (double& w : weight) w /= total;
    rows = cut(height);
    columns = cut(width);
  }

  int cells() const { return rows.segments * columns.segments; }

 private:
  Axis cut(int64_t n) const {
    int64_t borders[2 * (4 + 2 + 1) + 2] = {0, n};
    int count = 2;
    for (int k = 0; k < kLevels; ++k) {
      for (int64_t i = 0; used[k] && i < kLevelSize[k]; ++i) {
        borders[count++] = window_begin(i, kLevelSize[k], n);
        borders[count++] = window_end(i, kLevelSize[k], n);
      }
    }
    std::sort(borders, borders + count);
    Axis axis;
    axis.size = n;
    axis.segments = static_cast<int>(std::unique(borders, borders + count) - borders) - 1;
    std::copy(borders, borders + axis.segments + 1, axis.edge);
    return axis;
  }
};

}  // namespace transkd
