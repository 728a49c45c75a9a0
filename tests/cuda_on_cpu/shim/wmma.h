// nvcuda::wmma with half, bfloat16 or TF32 factors: fragments spread over the 32 lanes of a warp, as on a GPU.
//
// Which element of a tile lies in which lane's x[i] is unspecified in CUDA; here it is scattered, so that only code
// that treats all elements alike, or goes through memory, works. What CUDA asks of pointers and leading dimensions is
// checked, and that all lanes of the warp come with the same ones.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.h"

namespace cuda_on_cpu {

// A tile's element in row-major order that lane `lane` holds as x[i]; `size` is a power of two.
constexpr unsigned element_of(unsigned lane, unsigned i, unsigned size) {
  return ((i * 32 + lane) * 37 + size / 2 + 11) & (size - 1);
}

unsigned wmma_lane();
void check_tile(const char* name, const void* tile, unsigned leading, size_t element_bytes, int layout, Site site);

// d = a b + c, where each lane brings its elements of a (m x k), b (k x n) and c (m x n) and gets its elements of d.
struct Multiplication {
  unsigned m, n, k;
  const float *a, *b, *c;
};
void multiply(const Multiplication& lane_part, float* d, Site site);

}  // namespace cuda_on_cpu

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

namespace precision {
struct tf32;
}  // namespace precision

// To 10 bits of mantissa, ties away from zero. NaNs and infinities stay what they are.
inline float __float_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

template <class Use, int m, int n, int k, class T, class Layout = void>
class fragment {
  static constexpr bool kIsAccumulator = std::is_same_v<Use, accumulator>;
  static constexpr bool kIsTf32 = std::is_same_v<T, precision::tf32>;
  static_assert(k == 8 ? m == 16 && n == 16 && (kIsTf32 || kIsAccumulator) : !kIsTf32,
                "TF32 factors have the shape 16x16x8, and no others have");
  static_assert(k == 8 || (m == 16 && n == 16 && k == 16) || (m == 32 && n == 8 && k == 16) ||
                    (m == 8 && n == 32 && k == 16),
                "the shim has the shapes 16x16x16, 32x8x16 and 8x32x16");
  static_assert(kIsAccumulator ? std::is_same_v<T, float> || std::is_same_v<T, __half>
                               : std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16> || kIsTf32,
                "the shim has half, bfloat16 and TF32 factors, float and half accumulators");
  static_assert(kIsAccumulator == std::is_void_v<Layout>, "factors have a layout, accumulators have none");

 public:
  static constexpr int kRows = std::is_same_v<Use, matrix_b> ? k : m;
  static constexpr int kColumns = std::is_same_v<Use, matrix_a> ? k : n;
  static constexpr int num_elements = kRows * kColumns / warpSize;
  using element_type = T;
  using storage_element_type = std::conditional_t<kIsTf32, float, T>;

  // NaNs, so that a fragment that was neither loaded nor filled shows.
  fragment() { std::memset(static_cast<void*>(x), 0xff, sizeof x); }

  storage_element_type x[num_elements];
};

namespace detail {

inline size_t offset(unsigned element, unsigned columns, unsigned leading, layout_t layout) {
  const size_t row = element / columns, column = element % columns;
  return layout == mem_row_major ? row * leading + column : column * leading + row;
}

template <class Fragment, class T>
void load(const char* name, Fragment& fragment, const T* tile, unsigned leading, layout_t layout,
          cuda_on_cpu::Site site) {
  cuda_on_cpu::check_tile(name, tile, leading, sizeof(T), layout, site);
  const unsigned lane = cuda_on_cpu::wmma_lane();
  for (unsigned i = 0; i < Fragment::num_elements; ++i) {
    const unsigned element = cuda_on_cpu::element_of(lane, i, Fragment::kRows * Fragment::kColumns);
    fragment.x[i] = tile[offset(element, Fragment::kColumns, leading, layout)];
  }
}

// The bits that TF32 lacks are cut off, as the hardware does where __float_to_tf32 was forgotten.
template <class Fragment>
void to_floats(const Fragment& fragment, float* values) {
  for (int i = 0; i < Fragment::num_elements; ++i) {
    values[i] = static_cast<float>(fragment.x[i]);
    if constexpr (std::is_same_v<typename Fragment::element_type, precision::tf32>) {
      uint32_t bits;
      std::memcpy(&bits, values + i, sizeof bits);
      bits &= ~0x1fffu;
      std::memcpy(values + i, &bits, sizeof bits);
    }
  }
}

}  // namespace detail

template <class Fragment, class T>
void fill_fragment(Fragment& fragment, const T& value) {
  for (auto& element : fragment.x) element = static_cast<typename Fragment::storage_element_type>(value);
}

template <class Use, int m, int n, int k, class T, class Layout>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& to,
                      const typename fragment<Use, m, n, k, T, Layout>::storage_element_type* tile, unsigned leading,
                      cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  static_assert(!std::is_same_v<Use, accumulator>, "an accumulator is loaded with a layout_t");
  detail::load("load_matrix_sync", to, tile, leading, std::is_same_v<Layout, row_major> ? mem_row_major : mem_col_major,
               site);
}

template <int m, int n, int k, class T>
void load_matrix_sync(fragment<accumulator, m, n, k, T>& to, const T* tile, unsigned leading, layout_t layout,
                      cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  detail::load("load_matrix_sync", to, tile, leading, layout, site);
}

template <int m, int n, int k, class T>
void store_matrix_sync(T* tile, const fragment<accumulator, m, n, k, T>& from, unsigned leading, layout_t layout,
                       cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::check_tile("store_matrix_sync", tile, leading, sizeof(T), layout, site);
  const unsigned lane = cuda_on_cpu::wmma_lane();
  for (unsigned i = 0; i < from.num_elements; ++i) {
    tile[detail::offset(cuda_on_cpu::element_of(lane, i, m * n), n, leading, layout)] = from.x[i];
  }
}

// Products and sums in fp32; a half result is rounded once per call.
template <int m, int n, int k, class T, class LayoutA, class LayoutB, class D, class C>
void mma_sync(fragment<accumulator, m, n, k, D>& d, const fragment<matrix_a, m, n, k, T, LayoutA>& a,
              const fragment<matrix_b, m, n, k, T, LayoutB>& b, const fragment<accumulator, m, n, k, C>& c,
              cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  static_assert(std::is_same_v<T, __half> || (std::is_same_v<D, float> && std::is_same_v<C, float>),
                "bfloat16 factors have float accumulators");
  float a_values[a.num_elements], b_values[b.num_elements], c_values[c.num_elements], d_values[d.num_elements];
  detail::to_floats(a, a_values);
  detail::to_floats(b, b_values);
  detail::to_floats(c, c_values);
  cuda_on_cpu::multiply({m, n, k, a_values, b_values, c_values}, d_values, site);
  for (int i = 0; i < d.num_elements; ++i) d.x[i] = static_cast<D>(d_values[i]);
}

}  // namespace wmma
}  // namespace nvcuda
