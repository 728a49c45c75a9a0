// Matrix products on one thread, for ops that cut their work into pieces themselves: each sum runs in a fixed order
// that depends on sizes only, and a product's result is still in the cache when the op goes on with it. torch's own
// products choose their order by the number of threads.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace transkd {
namespace gemm {

// A result is made in tiles of kTileRows x panel_width.
constexpr int64_t kTileRows = 8;
template <class T>
constexpr int64_t panel_width() {
  return 128 / sizeof(T);
}

// Number of elements of a matrix [k, n] in panels: [ceil(n / width), k, width], zero beyond n.
template <class T>
constexpr int64_t panels_size(int64_t k, int64_t n) {
  return (n + panel_width<T>() - 1) / panel_width<T>() * panel_width<T>() * k;
}
// Number of elements of a matrix [k, m] in strips: [ceil(m / kTileRows), k, kTileRows], zero beyond m.
constexpr int64_t strips_size(int64_t k, int64_t m) { return (m + kTileRows - 1) / kTileRows * kTileRows * k; }

// Memory that is needed next: a product fetches it on the way, little by little.
struct Ahead {
  const void* begin = nullptr;
  int64_t bytes = 0;
};

#define TRANSKD_GEMM(T)                                                                                       \
  /* from [k, n], rows ld apart, into panels; panel p goes to to + p * stride. */                             \
  void pack_panels(const T* from, int64_t ld, int64_t k, int64_t n, T* to, int64_t stride);                   \
  /* from [k, m], rows ld apart, into strips; strip s goes to to + s * stride. */                             \
  void pack_strips(const T* from, int64_t ld, int64_t k, int64_t m, T* to, int64_t stride);                   \
  /* to [columns, rows] = from [rows, columns] transposed; both have rows ld apart. */                        \
  void transpose(const T* from, int64_t from_ld, int64_t rows, int64_t columns, T* to, int64_t to_ld);        \
  /* c [m, n] = a [m, k] b, or += with add; a has rows lda apart, b is in panels. */                          \
  void multiply(const T* a, int64_t lda, int64_t m, int64_t k, const T* panels, int64_t n, T* c, int64_t ldc, \
                bool add, const Ahead& ahead = {});                                                           \
  /* c [m, n] = a^T b, or += with add; a [k, m] is in strips, b [k, n] in panels, so many elements apart. */  \
  void multiply_transposed(const T* strips, int64_t strip_stride, int64_t m, int64_t k, const T* panels,      \
                           int64_t panel_stride, int64_t n, T* c, int64_t ldc, bool add);
TRANSKD_GEMM(float)
TRANSKD_GEMM(double)
#undef TRANSKD_GEMM

}  // namespace gemm
}  // namespace transkd
