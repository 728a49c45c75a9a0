// Nearest interpolation along one axis, by torch's rule (F.interpolate, mode="nearest", of float32):
// source(dst) = min(floor(dst * scale), in - 1) with scale = in / out, all in float.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace transkd {

template <class Index>
struct NearestOf {
  Index in, out;  // coarse and fine size
  float scale, inverse;

  NearestOf() = default;
  TRANSKD_INLINE NearestOf(Index in_size, Index out_size)
      : in(in_size),
        out(out_size),
        scale(static_cast<float>(in_size) / static_cast<float>(out_size)),
        inverse(static_cast<float>(out_size) / static_cast<float>(in_size)) {}

  // The coarse index that a fine one reads.
  TRANSKD_INLINE Index source(Index fine) const {
    const Index index = static_cast<Index>(floorf(static_cast<float>(fine) * scale));
    return index < in - 1 ? index : in - 1;
  }

  // The window of a coarse index is [start(coarse), start(coarse + 1)): the fine ones that read it; it may be empty.
  TRANSKD_INLINE Index start(Index coarse) const {
    if (coarse <= 0) return 0;
    if (coarse >= in) return out;
    Index fine = static_cast<Index>(static_cast<float>(coarse) * inverse);
    if (fine > out) fine = out;
    // Rounding puts the guess one off, a few more where the sizes exceed what float counts exactly.
    while (fine > 0 && source(fine - 1) >= coarse) --fine;
    while (fine < out && source(fine) < coarse) ++fine;
    return fine;
  }

  // Whether source(fine) = fine / 2 for all of them, the ratio of neighbouring stages.
  inline bool halves() const {
    if (out != 2 * in && out != 2 * in - 1) return false;
    for (Index fine = 0; fine < out; ++fine) {
      if (source(fine) != fine / 2) return false;
    }
    return true;
  }
};

using Nearest = NearestOf<int64_t>;

}  // namespace transkd
