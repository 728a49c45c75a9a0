// Bilinear interpolation along one axis, align_corners=False. Position and fraction come from integers, so no rounding
// moves a pixel to another source.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace transkd {

// What a fine pixel reads: (1 - fraction) of `first` and fraction of `second`, fraction = rest / (2 fine size) < 1.
template <class Index>
struct BilinearSource {
  Index first, second, rest;
};

template <class Index>
struct BilinearOf {
  Index in, out;  // source and fine size; 2 in out + in must not overflow

  // The source position is (2 fine + 1) in / (2 out) - 1/2, and not below 0.
  TRANSKD_INLINE BilinearSource<Index> source(Index fine) const {
    // Of axes of one size torch reads no neighbour, which could be infinite.
    if (in == out) return {fine, fine, 0};
    const Index numerator = (2 * fine + 1) * in - out;
    if (numerator <= 0) return {0, in > 1 ? Index(1) : Index(0), 0};
    const Index first = numerator / (2 * out);
    return {first, first + 1 < in ? first + 1 : first, numerator - first * (2 * out)};
  }

  template <class T>
  TRANSKD_INLINE T fraction(const BilinearSource<Index>& source) const {
    return static_cast<T>(source.rest) / static_cast<T>(2 * out);
  }

  // The fine pixels whose `first` is a source are [start(source), start(source + 1)); it may be empty.
  TRANSKD_INLINE Index start(Index source) const {
    if (source <= 0) return 0;
    if (source >= in) return out;
    const Index fine = ((2 * source + 1) * out - in + 2 * in - 1) / (2 * in);
    return fine < out ? fine : out;
  }
};

using Bilinear = BilinearOf<int64_t>;

}  // namespace transkd
