// How tiles lie in shared memory, for the plans as well as for tile_product.cuh.
#pragma once

#include "common/host_device.h"

namespace transkd {

// Elements from one row of a tile to the next: 16 bytes more than a row has, so that rows begin in different banks, and
// aligned as tensor cores and 16-byte accesses ask for.
template <class S>
TRANSKD_HOST_DEVICE constexpr int leading_of(int width) {
  return width + 16 / static_cast<int>(sizeof(S));
}

// Depths of products are multiples of it; what is beyond the matrices is zero in both tiles.
constexpr int kDepthStep = 16;

}  // namespace transkd
