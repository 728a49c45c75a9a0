// The product of two tiles in shared memory, added up in the registers of a block: sum += A B.
//
// 16-bit factors, and fp32 ones with kTf32, are multiplied by tensor cores and added up in fp32; other fp32 and fp64
// ones by fused multiply-adds in their own type. Each warp has 32 rows and some columns of the sum. Which lane holds
// which element is the product's own affair: the sum goes to shared memory, and from there on.
#pragma once

#include <mma.h>

#include <cstring>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/storage.cuh"
#include "cuda/common/tile.h"

namespace transkd {

// Row-major: element (row, column) lies at row * leading + column. Column-major, which is the tile of a transposed
// matrix: at column * leading + row.
enum class Order { kRowMajor, kColumnMajor };

// A is [kRows, depth] and B [depth, kColumns], stored as S. kRows is a multiple of 32; warps share the columns evenly,
// 16 at least for each. All threads of the block call every function.
template <class S, Order kOrderA, Order kOrderB, bool kTf32 = false, int kRows = 64, int kColumns = 64,
          int kThreads = 256>
class TileProduct {
 public:
  using Sum = ComputeType<S>;
  static constexpr bool kTensorCores = sizeof(S) == 2 || kTf32;

  __device__ __forceinline__ TileProduct() { clear(); }

  __device__ __forceinline__ void clear() {
    if constexpr (kTensorCores) {
#pragma unroll
      for (int i = 0; i < kFragmentRows; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentColumns; ++j) nvcuda::wmma::fill_fragment(sums_.fragment[i][j], 0.0f);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) sums_.value[i][j] = 0;
      }
    }
  }

  // Tiles are aligned to 32 bytes, leading dimensions are those of leading_of(). Columns from `columns` on are not
  // needed: warps that have no others do nothing. A barrier must lie between writing the tiles and this.
  __device__ __forceinline__ void add(const S* a, int leading_a, const S* b, int leading_b, int depth,
                                      int columns = kColumns) {
    if (first_column() >= columns) return;
    if constexpr (kTensorCores) {
      add_fragments(a, leading_a, b, leading_b, depth);
    } else {
      add_values(a, leading_a, b, leading_b, depth);
    }
  }

  // Row-major, aligned to 32 bytes, the leading dimension that of leading_of(). A barrier must follow.
  __device__ __forceinline__ void store(Sum* to, int leading) const {
    if constexpr (kTensorCores) {
#pragma unroll
      for (int i = 0; i < kFragmentRows; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentColumns; ++j) {
          nvcuda::wmma::store_matrix_sync(to + (first_row() + 16 * i) * leading + first_column() + 16 * j,
                                          sums_.fragment[i][j], leading, nvcuda::wmma::mem_row_major);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) to[row(i) * leading + column(j)] = sums_.value[i][j];
      }
    }
  }

 private:
  static constexpr int kWarps = kThreads / static_cast<int>(kWarpSize);
  static constexpr int kWarpRows = 32, kWarpsInColumn = kRows / kWarpRows;
  static constexpr int kWarpColumns = kColumns / (kWarps / kWarpsInColumn);
  static_assert(kRows % kWarpRows == 0 && kWarps % kWarpsInColumn == 0 && kWarpColumns % 16 == 0 && kWarpColumns > 0,
                "a warp takes 32 rows and a multiple of 16 columns");
  static_assert(!kTf32 || std::is_same_v<S, float>, "TF32 is a way of multiplying fp32");

  static constexpr int kFragmentRows = kWarpRows / 16, kFragmentColumns = kWarpColumns / 16;
  static constexpr int kFragmentDepth = kTf32 ? 8 : 16;
  using Accumulator = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, kFragmentDepth, float>;
  using Factor = std::conditional_t<kTf32, nvcuda::wmma::precision::tf32, S>;
  template <Order kOrder>
  using LayoutOf = std::conditional_t<kOrder == Order::kRowMajor, nvcuda::wmma::row_major, nvcuda::wmma::col_major>;

  // Lanes of a warp: 8 in rows, 4 in columns.
  static constexpr int kLaneRows = 8, kLaneColumns = 4;
  static constexpr int kThreadRows = kWarpRows / kLaneRows, kThreadColumns = kWarpColumns / kLaneColumns;

  struct Fragments {
    Accumulator fragment[kFragmentRows][kFragmentColumns];
  };
  struct Values {
    Sum value[kThreadRows][kThreadColumns];
  };

  __device__ static int warp() { return threadIdx.x / kWarpSize; }
  __device__ static int first_row() { return warp() % kWarpsInColumn * kWarpRows; }
  __device__ static int first_column() { return warp() / kWarpsInColumn * kWarpColumns; }

  // Where the elements of a row lie side by side in memory, a thread has four neighbours, one access of 16 bytes. Where
  // those of the depth do, it has every eighth (fourth) row, so that lanes meet different banks.
  __device__ static int row(int i) {
    const int lane_row = static_cast<int>(threadIdx.x % kWarpSize) / kLaneColumns;
    return first_row() + (kOrderA == Order::kColumnMajor ? lane_row * kThreadRows + i : lane_row + i * kLaneRows);
  }
  __device__ static int column(int j) {
    const int lane_column = threadIdx.x % kLaneColumns;
    return first_column() + (kOrderB == Order::kRowMajor ? j / 4 * (4 * kLaneColumns) + lane_column * 4 + j % 4
                                                         : lane_column + j * kLaneColumns);
  }

  template <Order kOrder>
  __device__ static int place(int row, int column, int leading) {
    return kOrder == Order::kRowMajor ? row * leading + column : column * leading + row;
  }

  template <class Fragment>
  __device__ static void round_to_tf32(Fragment& fragment) {
    if constexpr (kTf32) {
#pragma unroll
      for (int e = 0; e < fragment.num_elements; ++e) fragment.x[e] = nvcuda::wmma::__float_to_tf32(fragment.x[e]);
    }
  }

  __device__ __forceinline__ void add_fragments(const S* a, int leading_a, const S* b, int leading_b, int depth) {
    using namespace nvcuda;
#pragma unroll(kTf32 ? 1 : 2)
    for (int k = 0; k < depth; k += kFragmentDepth) {
      wmma::fragment<wmma::matrix_a, 16, 16, kFragmentDepth, Factor, LayoutOf<kOrderA>> left[kFragmentRows];
#pragma unroll
      for (int i = 0; i < kFragmentRows; ++i) {
        wmma::load_matrix_sync(left[i], a + place<kOrderA>(first_row() + 16 * i, k, leading_a), leading_a);
        round_to_tf32(left[i]);
      }
#pragma unroll
      for (int j = 0; j < kFragmentColumns; ++j) {
        wmma::fragment<wmma::matrix_b, 16, 16, kFragmentDepth, Factor, LayoutOf<kOrderB>> right;
        wmma::load_matrix_sync(right, b + place<kOrderB>(k, first_column() + 16 * j, leading_b), leading_b);
        round_to_tf32(right);
#pragma unroll
        for (int i = 0; i < kFragmentRows; ++i) {
          wmma::mma_sync(sums_.fragment[i][j], left[i], right, sums_.fragment[i][j]);
        }
      }
    }
  }

  static constexpr int kVector = 16 / sizeof(S);

  __device__ static void read_vector(const S* from, S* to) {
    const uint4 word = *reinterpret_cast<const uint4*>(from);
    std::memcpy(static_cast<void*>(to), &word, sizeof(word));
  }

  __device__ __forceinline__ void add_values(const S* a, int leading_a, const S* b, int leading_b, int depth) {
#pragma unroll 1
    for (int k = 0; k < depth; k += kVector) {
      S left[kThreadRows][kVector], right[kThreadColumns][kVector];
      if constexpr (kOrderA == Order::kRowMajor) {
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) read_vector(a + row(i) * leading_a + k, left[i]);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
#pragma unroll
          for (int i = 0; i < kThreadRows; i += kVector) {
            S side_by_side[kVector];
            read_vector(a + (k + v) * leading_a + row(i), side_by_side);
#pragma unroll
            for (int e = 0; e < kVector; ++e) left[i + e][v] = side_by_side[e];
          }
        }
      }
      if constexpr (kOrderB == Order::kColumnMajor) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) read_vector(b + column(j) * leading_b + k, right[j]);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
#pragma unroll
          for (int j = 0; j < kThreadColumns; j += kVector) {
            S side_by_side[kVector];
            read_vector(b + (k + v) * leading_b + column(j), side_by_side);
#pragma unroll
            for (int e = 0; e < kVector; ++e) right[j + e][v] = side_by_side[e];
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
          for (int j = 0; j < kThreadColumns; ++j) sums_.value[i][j] += left[i][v] * right[j][v];
        }
      }
    }
  }

  std::conditional_t<kTensorCores, Fragments, Values> sums_;
};

}  // namespace transkd
