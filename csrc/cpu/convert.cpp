#include "cpu/common/clones.h"
#include "cpu/common/tensor.h"

namespace transkd {

TRANSKD_CLONES void widen(const BFloat16* __restrict from, float* __restrict row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = load(from[i]);
}

TRANSKD_CLONES void widen(const Half* __restrict from, float* __restrict row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = load(from[i]);
}

TRANSKD_CLONES void narrow(const float* __restrict row, BFloat16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(to + i, row[i]);
}

TRANSKD_CLONES void narrow(const float* __restrict row, Half* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(to + i, row[i]);
}

}  // namespace transkd
