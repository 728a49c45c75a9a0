// Runs csrc/cuda/common/tile_product.cuh in one block: sum [64, columns] = A B, in two calls of add().
// In: a, b as they lie in shared memory, dense; transposed_a, transposed_b, tf32, wide (64 x 128), columns.
#include "shim/cuda.h"
// The shim goes first.
#include "archive.h"
#include "cuda/common/tile_product.cuh"

namespace transkd {

CUDA_ON_CPU_DYNAMIC_SHARED(uint4, product_memory);

struct Tiles {
  const void *a, *b;
  void* sum;
  int rows, columns, depth, used_columns;
};

// Copies into padded rows.
template <class S>
__device__ void copy_in(const S* from, S* to, int rows, int width) {
  for (int i = threadIdx.x; i < rows * width; i += blockDim.x)
    to[i / width * leading_of<S>(width) + i % width] = from[i];
}

template <class S, Order kA, Order kB, bool kTf32, int kColumns>
__global__ void product_kernel(Tiles tiles) {
  constexpr int kRows = 64;
  using Product = TileProduct<S, kA, kB, kTf32, kRows, kColumns>;
  const int depth = tiles.depth, half = depth / 2;
  const bool row_a = kA == Order::kRowMajor, row_b = kB == Order::kRowMajor;
  const int leading_a = leading_of<S>(row_a ? depth : kRows), leading_b = leading_of<S>(row_b ? kColumns : depth);
  S* a = reinterpret_cast<S*>(product_memory);
  S* b = a + (row_a ? kRows : depth) * leading_a;
  copy_in(static_cast<const S*>(tiles.a), a, row_a ? kRows : depth, row_a ? depth : kRows);
  copy_in(static_cast<const S*>(tiles.b), b, row_b ? depth : kColumns, row_b ? kColumns : depth);
  __syncthreads();
  Product product;
  product.add(a, leading_a, b, leading_b, half, tiles.used_columns);
  product.add(a + (row_a ? half : half * leading_a), leading_a, b + (row_b ? half * leading_b : half), leading_b, half,
              tiles.used_columns);
  __syncthreads();
  using Sum = typename Product::Sum;
  Sum* sum = reinterpret_cast<Sum*>(product_memory);
  product.store(sum, leading_of<Sum>(kColumns));
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kColumns; i += blockDim.x) {
    static_cast<Sum*>(tiles.sum)[i] = sum[i / kColumns * leading_of<Sum>(kColumns) + i % kColumns];
  }
}

}  // namespace transkd

namespace {

using cuda_on_cpu::Archive;
using cuda_on_cpu::Array;
using cuda_on_cpu::Type;
using transkd::Order;

template <class S, bool kTf32, int kColumns>
Array multiply(const Archive& in) {
  const bool transposed_a = in.integer("transposed_a") != 0, transposed_b = in.integer("transposed_b") != 0;
  const Array &a = in.array("a"), &b = in.array("b");
  const int depth = static_cast<int>(a.shape()[transposed_a ? 0 : 1]);
  Array sum(std::is_same_v<S, double> ? Type::f64 : Type::f32, {64, kColumns});
  const transkd::Tiles tiles{
      a.data(), b.data(), sum.data(), 64, kColumns, depth, static_cast<int>(in.integer("columns"))};
  const auto launch = [&](auto order_a, auto order_b) {
    cuda_on_cpu::launch(dim3(1), dim3(256), 160 << 10, [&] {
      transkd::product_kernel<S, decltype(order_a)::value, decltype(order_b)::value, kTf32, kColumns>(tiles);
    });
  };
  const std::integral_constant<Order, Order::kRowMajor> row;
  const std::integral_constant<Order, Order::kColumnMajor> column;
  transposed_a ? (transposed_b ? launch(column, column) : launch(column, row))
               : (transposed_b ? launch(row, column) : launch(row, row));
  return sum;
}

template <int kColumns>
Array multiply_any(const Archive& in) {
  switch (in.array("a").type()) {
    case Type::f32:
      return in.integer("tf32") ? multiply<float, true, kColumns>(in) : multiply<float, false, kColumns>(in);
    case Type::f16:
      return multiply<__half, false, kColumns>(in);
    case Type::bf16:
      return multiply<__nv_bfloat16, false, kColumns>(in);
    case Type::f64:
      return multiply<double, false, kColumns>(in);
    default:
      throw std::runtime_error("expected floating tiles");
  }
}

}  // namespace

void cuda_on_cpu::drive(const Archive& in, Results& out) {
  out.add("sum", in.integer("wide") ? multiply_any<128>(in) : multiply_any<64>(in));
}
