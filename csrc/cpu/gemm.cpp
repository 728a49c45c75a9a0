#include "cpu/common/gemm.h"

#include <algorithm>
#include <cstring>

#include "cpu/common/clones.h"
#include "cpu/common/vector.h"

namespace transkd {
namespace gemm {
namespace {

// Longer sums go through memory: a short chain of additions rounds less, and its part of a panel stays in the cache.
constexpr int64_t kChain = 256;

// How a tile is cut into what one instruction set's registers hold: rows x vectors of accumulators.
template <int Bytes, int Rows, int Vectors>
struct Registers {
  static constexpr int kBytes = Bytes, kRows = Rows, kVectors = Vectors;
};

// Which element of a meets row i of the tile and step k of the sum.
struct FromRows {
  int64_t ld;
  TRANSKD_INLINE int64_t row(int i) const { return i * ld; }
  static constexpr int64_t kStep = 1;
};
struct FromStrip {
  TRANSKD_INLINE int64_t row(int i) const { return i; }
  static constexpr int64_t kStep = kTileRows;
};

// rows x columns of c, at most a tile; the last row of a stands in for those beyond.
template <class T, class R, class From>
TRANSKD_INLINE void tile(const T* a, const From& from, int64_t rows, int64_t k, const T* panel, int64_t columns, T* c,
                         int64_t ldc, bool add) {
  using V = Vector<T, R::kBytes>;
  constexpr int kColumns = V::kSize * R::kVectors, kWidth = panel_width<T>();
  static_assert(kWidth % kColumns == 0 && kTileRows % R::kRows == 0);
  for (int top = 0; top < kTileRows && top < rows; top += R::kRows) {
    const T* row[R::kRows];
#pragma GCC unroll 8
    for (int i = 0; i < R::kRows; ++i) {
      row[i] = a + from.row(From::kStep == 1 ? static_cast<int>(std::min<int64_t>(top + i, rows - 1)) : top + i);
    }
    const int valid = static_cast<int>(std::min<int64_t>(R::kRows, rows - top));
    for (int left = 0; left < kWidth && left < columns; left += kColumns) {
      V sum[R::kRows][R::kVectors];
      const T* b = panel + left;
      for (int64_t step = 0; step < k; ++step, b += kWidth) {
        V part[R::kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < R::kVectors; ++j) part[j].load(b + j * V::kSize);
#pragma GCC unroll 8
        for (int i = 0; i < R::kRows; ++i) {
          const T factor = row[i][step * From::kStep];
#pragma GCC unroll 4
          for (int j = 0; j < R::kVectors; ++j) sum[i][j].lanes += factor * part[j].lanes;
        }
      }
      const auto put = [&](int i, T* to) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int j = 0; j < R::kVectors; ++j) {
          if (add) {
            V before;
            before.load(to + j * V::kSize);
            before.lanes += sum[i][j].lanes;
            before.store(to + j * V::kSize);
          } else {
            sum[i][j].store(to + j * V::kSize);
          }
        }
      };
      T* const to = c + top * ldc + left;
      if (columns - left >= kColumns && valid == R::kRows) {
#pragma GCC unroll 8
        for (int i = 0; i < R::kRows; ++i) put(i, to + i * ldc);
      } else {
        const int64_t width = std::min<int64_t>(kColumns, columns - left);
        T line[kColumns] = {};
#pragma GCC unroll 8
        for (int i = 0; i < R::kRows; ++i) {
          if (i < valid) {
            if (add) std::copy_n(to + i * ldc, width, line);
            put(i, line);
            std::copy_n(line, width, to + i * ldc);
          }
        }
      }
    }
  }
}

template <class T, class R>
TRANSKD_INLINE void multiply_with(const T* a, int64_t lda, int64_t m, int64_t k, const T* panels, int64_t n, T* c,
                                  int64_t ldc, bool add, const Ahead& ahead) {
  constexpr int64_t kWidth = panel_width<T>(), kLine = 64;
  const int64_t tiles = (k + kChain - 1) / kChain * ((n + kWidth - 1) / kWidth) * ((m + kTileRows - 1) / kTileRows);
  const int64_t lines = (ahead.bytes / kLine + tiles - 1) / tiles;
  const char* fetch = static_cast<const char*>(ahead.begin);
  const char* const fetched = fetch + ahead.bytes;
  for (int64_t start = 0; start < k; start += kChain) {
    const int64_t steps = std::min(kChain, k - start);
    for (int64_t j = 0; j < n; j += kWidth) {
      const T* const panel = panels + j * k + start * kWidth;
      for (int64_t i = 0; i < m; i += kTileRows) {
        for (int64_t line = 0; line < lines && fetch < fetched; ++line, fetch += kLine) __builtin_prefetch(fetch, 0, 2);
        tile<T, R>(a + i * lda + start, FromRows{lda}, std::min(kTileRows, m - i), steps, panel, n - j, c + i * ldc + j,
                   ldc, add || start > 0);
      }
    }
  }
}

template <class T, class R>
TRANSKD_INLINE void multiply_transposed_with(const T* strips, int64_t strip_stride, int64_t m, int64_t k,
                                             const T* panels, int64_t panel_stride, int64_t n, T* c, int64_t ldc,
                                             bool add) {
  constexpr int64_t kWidth = panel_width<T>();
  for (int64_t start = 0; start < k; start += kChain) {
    const int64_t steps = std::min(kChain, k - start);
    for (int64_t j = 0; j < n; j += kWidth) {
      const T* const panel = panels + j / kWidth * panel_stride + start * kWidth;
      for (int64_t i = 0; i < m; i += kTileRows) {
        tile<T, R>(strips + i / kTileRows * strip_stride + start * kTileRows, FromStrip{}, std::min(kTileRows, m - i),
                   steps, panel, n - j, c + i * ldc + j, ldc, add || start > 0);
      }
    }
  }
}

// from [rows, columns] into groups of kWidth columns, [groups, rows, kWidth].
template <int64_t kWidth, class T>
TRANSKD_INLINE void pack(const T* from, int64_t ld, int64_t rows, int64_t columns, T* to, int64_t stride) {
  for (int64_t j = 0; j < columns; j += kWidth, to += stride) {
    const int64_t width = std::min(kWidth, columns - j);
    for (int64_t r = 0; r < rows; ++r) {
      const T* const line = from + r * ld + j;
      T* const place = to + r * kWidth;
      if (width == kWidth) {
        std::memcpy(place, line, kWidth * sizeof(T));
      } else {
        for (int64_t i = 0; i < kWidth; ++i) place[i] = i < width ? line[i] : T(0);
      }
    }
  }
}

// A square of vectors: interleaving its upper with its lower half, as often as its side has binary digits, transposes.
template <class T>
TRANSKD_INLINE void transpose_square(const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  using V = Vector<T>;
  constexpr int kSide = V::kSize;
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(32)));
  Mask low, high;
  for (int i = 0; i < kSide; ++i) {
    low[i] = i / 2 + i % 2 * kSide;
    high[i] = low[i] + kSide / 2;
  }
  V square[kSide], next[kSide];
#pragma GCC unroll 8
  for (int i = 0; i < kSide; ++i) square[i].load(from + i * from_ld);
#pragma GCC unroll 4
  for (int side = kSide; side > 1; side /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kSide / 2; ++i) {
      next[2 * i].lanes = __builtin_shuffle(square[i].lanes, square[i + kSide / 2].lanes, low);
      next[2 * i + 1].lanes = __builtin_shuffle(square[i].lanes, square[i + kSide / 2].lanes, high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) square[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) square[i].store(to + i * to_ld);
}

template <class T>
TRANSKD_INLINE void transpose_with(const T* from, int64_t from_ld, int64_t rows, int64_t columns, T* to,
                                   int64_t to_ld) {
  constexpr int64_t kSide = Vector<T>::kSize;
  for (int64_t r = 0; r < rows; r += kSide) {
    for (int64_t c = 0; c < columns; c += kSide) {
      const int64_t height = std::min(kSide, rows - r), width = std::min(kSide, columns - c);
      if (height == kSide && width == kSide) {
        transpose_square(from + r * from_ld + c, from_ld, to + c * to_ld + r, to_ld);
      } else {
        for (int64_t j = 0; j < width; ++j) {
          for (int64_t i = 0; i < height; ++i) to[(c + j) * to_ld + r + i] = from[(r + i) * from_ld + c + j];
        }
      }
    }
  }
}

}  // namespace

// One function per instruction set, since each has its own tile; `of` names them.
#define TRANSKD_PRODUCTS(T, of, target, ...)                                                                        \
  target static void multiply_##of(const T* a, int64_t lda, int64_t m, int64_t k, const T* panels, int64_t n, T* c, \
                                   int64_t ldc, bool add, const Ahead& ahead) {                                     \
    multiply_with<T, __VA_ARGS__>(a, lda, m, k, panels, n, c, ldc, add, ahead);                                     \
  }                                                                                                                 \
  target static void transposed_##of(const T* strips, int64_t strip_stride, int64_t m, int64_t k, const T* panels,  \
                                     int64_t panel_stride, int64_t n, T* c, int64_t ldc, bool add) {                \
    multiply_transposed_with<T, __VA_ARGS__>(strips, strip_stride, m, k, panels, panel_stride, n, c, ldc, add);     \
  }

using Widest = Registers<64, 8, 2>;
using Wide = Registers<32, 4, 2>;
using Usual = Registers<16, 4, 2>;

TRANSKD_PRODUCTS(float, usual, , Usual)
TRANSKD_PRODUCTS(double, usual, , Usual)
#ifdef TRANSKD_HAS_CLONES
#define TRANSKD_TARGET(arch) __attribute__((target("arch=" arch)))
TRANSKD_PRODUCTS(float, v3, TRANSKD_TARGET("x86-64-v3"), Wide)
TRANSKD_PRODUCTS(double, v3, TRANSKD_TARGET("x86-64-v3"), Wide)
TRANSKD_PRODUCTS(float, v4, TRANSKD_TARGET("x86-64-v4"), Widest)
TRANSKD_PRODUCTS(double, v4, TRANSKD_TARGET("x86-64-v4"), Widest)
#undef TRANSKD_TARGET

static int level() {
  static const int here = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 0;
  }();
  return here;
}
#define TRANSKD_CHOOSE(function, ...)                \
  return level() == 4   ? function##_v4(__VA_ARGS__) \
         : level() == 3 ? function##_v3(__VA_ARGS__) \
                        : function##_usual(__VA_ARGS__)
#else
#define TRANSKD_CHOOSE(function, ...) return function##_usual(__VA_ARGS__)
#endif

#define TRANSKD_GEMM(T)                                                                                                \
  void multiply(const T* a, int64_t lda, int64_t m, int64_t k, const T* panels, int64_t n, T* c, int64_t ldc,          \
                bool add, const Ahead& ahead) {                                                                        \
    TRANSKD_CHOOSE(multiply, a, lda, m, k, panels, n, c, ldc, add, ahead);                                             \
  }                                                                                                                    \
  void multiply_transposed(const T* strips, int64_t strip_stride, int64_t m, int64_t k, const T* panels,               \
                           int64_t panel_stride, int64_t n, T* c, int64_t ldc, bool add) {                             \
    TRANSKD_CHOOSE(transposed, strips, strip_stride, m, k, panels, panel_stride, n, c, ldc, add);                      \
  }                                                                                                                    \
  TRANSKD_CLONES void pack_panels(const T* from, int64_t ld, int64_t k, int64_t n, T* to, int64_t stride) {            \
    pack<panel_width<T>()>(from, ld, k, n, to, stride);                                                                \
  }                                                                                                                    \
  TRANSKD_CLONES void pack_strips(const T* from, int64_t ld, int64_t k, int64_t m, T* to, int64_t stride) {            \
    pack<kTileRows>(from, ld, k, m, to, stride);                                                                       \
  }                                                                                                                    \
  TRANSKD_CLONES void transpose(const T* from, int64_t from_ld, int64_t rows, int64_t columns, T* to, int64_t to_ld) { \
    transpose_with(from, from_ld, rows, columns, to, to_ld);                                                           \
  }
TRANSKD_GEMM(float)
TRANSKD_GEMM(double)
#undef TRANSKD_GEMM

}  // namespace gemm
}  // namespace transkd
