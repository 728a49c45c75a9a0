// Runs one of kernels_for_tests.cuh, by name.
#include <functional>
#include <map>
#include <string>

#include "archive.h"
#include "kernels_for_tests.cuh"
#include "shim/cuda.h"

namespace shim_kernels {
CUDA_ON_CPU_DYNAMIC_SHARED(float, dynamic);
}

namespace {

using namespace shim_kernels;
using namespace nvcuda;
using cuda_on_cpu::Archive;
using cuda_on_cpu::Array;
using cuda_on_cpu::launch;
using cuda_on_cpu::Results;
using cuda_on_cpu::Type;

struct Case {
  const Archive& in;
  Results& out;
  dim3 grid, block;
  size_t dynamic_bytes;
  int n;
  Array y;

  const float* x() const { return in.array("x").as<float>(); }
  Array zeros(Type type, std::vector<int64_t> shape) const {
    Array array(type, std::move(shape));
    array.fill_bytes(0);
    return array;
  }
  // A kernel that computes y.
  template <class Kernel>
  void run(const Kernel& kernel) {
    launch(grid, block, dynamic_bytes, kernel);
    out.add("y", std::move(y));
  }
};

template <Fault kFault>
void run_last_block(Case& c) {
  Array partial = Array::like(c.in.array("x")), counter = c.zeros(Type::i32, {1});
  if (kFault == Fault::kOrder) c.y.fill_bytes(0);
  c.run([&] { last_block_sum<kFault>(c.x(), partial.as<float>(), counter.as<unsigned>(), c.y.as<float>()); });
}

void run_early_fences(Case& c) {
  Array partial = Array::like(c.in.array("x")), counter = c.zeros(Type::i32, {1});
  c.run([&] { last_block_sum_with_early_fences(c.x(), partial.as<float>(), counter.as<unsigned>(), c.y.as<float>()); });
}

template <int m, int n, int k, class T, class LayoutA, class LayoutB, class Sum>
void run_product(Case& c) {
  const int rows = c.in.integer("rows"), columns = c.in.integer("columns"), depth = c.in.integer("depth");
  const auto layout = c.in.integer("row_major") ? wmma::mem_row_major : wmma::mem_col_major;
  const Array &a = c.in.array("a"), &b = c.in.array("b"), &start = c.in.array("c");
  Array d = Array::like(start);
  launch(dim3(columns / n, rows / m), dim3(32), 0, [&] {
    matrix_product<m, n, k, T, LayoutA, LayoutB, Sum>(a.as<T>(), b.as<T>(), start.as<Sum>(), d.as<Sum>(), rows, columns,
                                                      depth, c.in.integer("padding"), layout);
  });
  c.out.add("d", std::move(d));
}

template <class T>
void run_shuffles(Case& c) {
  const Array& x = c.in.array("values");
  Array out(x.type(), {4, x.count()});
  launch(1, x.count(), 0, [&] { shuffles<T>(x.as<T>(), out.as<T>(), c.in.integer("operand"), c.in.integer("width")); });
  c.out.add("out", std::move(out));
}

void run_places(Case& c) {
  Array out(Type::i32, {int64_t{c.grid.x} * c.grid.y * c.grid.z, int64_t{c.block.x} * c.block.y * c.block.z, 6});
  launch(c.grid, c.block, 0, [&] { places(out.as<int>()); });
  c.out.add("out", std::move(out));
}

void run_votes(Case& c) {
  const Array& x = c.in.array("values");
  Array out(Type::i32, {x.count(), 8});
  launch(1, x.count(), 0, [&] { votes(x.as<int>(), out.as<int>()); });
  c.out.add("out", std::move(out));
}

void run_atomics(Case& c) {
  Totals totals{};
  launch(c.grid, c.block, 0, [&] { atomics(&totals); });
  const double values[] = {totals.real,
                           totals.precise,
                           static_cast<double>(totals.sum),
                           static_cast<double>(totals.large),
                           static_cast<double>(totals.minimum),
                           static_cast<double>(totals.maximum),
                           static_cast<double>(totals.orred),
                           static_cast<double>(totals.wrapped),
                           static_cast<double>(totals.count_down),
                           static_cast<double>(totals.exchanged),
                           static_cast<double>(totals.compared != 0)};
  Array out(Type::f64, {11});
  std::copy(std::begin(values), std::end(values), out.as<double>());
  c.out.add("out", std::move(out));
}

void run_arithmetic(Case& c) {
  const Array& x = c.in.array("x");
  Array out(Type::f32, {x.count(), 12});
  launch(1, x.count(), 0, [&] { arithmetic(c.x(), out.as<float>()); });
  c.out.add("out", std::move(out));
}

void run_orders(Case& c) {
  Array counter = c.zeros(Type::i32, {1}), blocks(Type::i32, {c.grid.x}), threads(Type::i32, {c.grid.x, 2, c.block.x});
  launch(c.grid, c.block, 0, [&] { orders(counter.as<int>(), blocks.as<int>(), threads.as<int>()); });
  c.out.add("blocks", std::move(blocks));
  c.out.add("threads", std::move(threads));
}

void run_add_one(Case& c) {
  c.y.fill_bytes(0);
  for (int repeat = 0; repeat < 3; ++repeat) launch(c.grid, 1, 0, [&] { add_one(c.y.as<float>()); });
  c.out.add("y", std::move(c.y));
}

void run_keywords(Case& c) {
  c.run([&] { keywords<float>(c.x(), c.y.as<float>(), {0.5f, c.n}); });
}

void run_half_warps(Case& c) {
  c.run([&] { half_warps(c.x(), c.y.as<float>()); });
}

using Run = void (*)(Case&);

template <bool kBroken>
void add_twins(std::map<std::string, Run>& cases) {
  const std::string suffix = kBroken ? "/broken" : "";
#define CASE(kernel, ...) cases[#kernel + suffix] = [](Case& c) { c.run([&] { kernel<kBroken>(__VA_ARGS__); }); }
  CASE(read_past_end, c.x(), c.y.as<float>(), c.n);
  CASE(write_past_end, c.x(), c.y.as<float>(), c.n);
  CASE(vector_copy, c.x(), c.y.as<float>(), c.n);
  CASE(pack_copy, c.in.array("x").as<__half>(), c.y.as<__half>(), c.n);
  CASE(reverse_dynamic, c.x(), c.y.as<float>());
  CASE(reverse_static, c.x(), c.y.as<float>());
  CASE(rotate_block, c.x(), c.y.as<float>());
  CASE(rotate_twice, c.x(), c.y.as<float>());
  CASE(rotate_warp, c.x(), c.y.as<float>());
  CASE(rotate_warp_after_shuffle, c.x(), c.y.as<float>());
  CASE(rotate_half_warp, c.x(), c.y.as<float>());
  CASE(barrier_in_branch, c.y.as<float>());
  CASE(barrier_after_return, c.y.as<float>(), c.n);
  CASE(shuffle_outside_mask, c.x(), c.y.as<float>());
  CASE(shuffle_without_own_lane, c.x(), c.y.as<float>());
  CASE(shuffle_with_missing_lanes, c.x(), c.y.as<float>());
  CASE(shuffle_with_returned_lanes, c.x(), c.y.as<float>(), c.n);
  CASE(shuffle_with_odd_width, c.x(), c.y.as<float>());
  CASE(last_warp_sum, c.x(), c.y.as<float>());
  CASE(shift_blocks, c.x(), c.y.as<float>());
#undef CASE
  cases["accumulate_static" + suffix] = [](Case& c) {
    c.run([&] { accumulate<kBroken, false>(c.x(), c.y.as<float>()); });
  };
  cases["accumulate_dynamic" + suffix] = [](Case& c) {
    c.run([&] { accumulate<kBroken, true>(c.x(), c.y.as<float>()); });
  };
}

template <TileFault kFault>
void run_tile(Case& c) {
  c.run([&] { tile_copy<kFault>(c.x(), c.y.as<float>()); });
}

std::map<std::string, Run> all_cases() {
  using wmma::col_major;
  using wmma::row_major;
  std::map<std::string, Run> cases = {
      {"places", run_places},
      {"keywords", run_keywords},
      {"shuffles/4", run_shuffles<float>},
      {"shuffles/8", run_shuffles<double>},
      {"half_warps", run_half_warps},
      {"votes", run_votes},
      {"atomics", run_atomics},
      {"arithmetic", run_arithmetic},
      {"orders", run_orders},
      {"add_one", run_add_one},
      {"last_block_sum", run_last_block<Fault::kNone>},
      {"last_block_sum/early fences", run_early_fences},
      {"last_block_sum/no fence before", run_last_block<Fault::kNoFenceBefore>},
      {"last_block_sum/no fence after", run_last_block<Fault::kNoFenceAfter>},
      {"last_block_sum/no barrier", run_last_block<Fault::kNoBarrier>},
      {"last_block_sum/order", run_last_block<Fault::kOrder>},
      {"matrix/16x16x16/f16/row/row/f32", run_product<16, 16, 16, __half, row_major, row_major, float>},
      {"matrix/16x16x16/f16/col/row/f16", run_product<16, 16, 16, __half, col_major, row_major, __half>},
      {"matrix/32x8x16/bf16/col/col/f32", run_product<32, 8, 16, __nv_bfloat16, col_major, col_major, float>},
      {"matrix/8x32x16/bf16/row/row/f32", run_product<8, 32, 16, __nv_bfloat16, row_major, row_major, float>},
      {"tile_copy", run_tile<TileFault::kNone>},
      {"tile_copy/pointer", run_tile<TileFault::kPointer>},
      {"tile_copy/leading", run_tile<TileFault::kLeading>},
      {"tile_copy/different pointers", run_tile<TileFault::kDifferentPointers>},
      {"tile_copy/missing lanes", run_tile<TileFault::kMissingLanes>},
      {"tile_copy/not filled", run_tile<TileFault::kNotFilled>},
  };
  add_twins<false>(cases);
  add_twins<true>(cases);
  return cases;
}

dim3 size(const Archive& in, const std::string& name) {
  if (!in.has(name)) return dim3(1);
  const std::vector<int64_t> sizes = in.integers(name);
  return dim3(sizes.at(0), sizes.at(1), sizes.at(2));
}

}  // namespace

void cuda_on_cpu::drive(const Archive& in, Results& out) {
  const bool has_x = in.has("x");
  const std::vector<int64_t> shape = in.has("y_shape") ? in.integers("y_shape")
                                     : has_x           ? in.array("x").shape()
                                                       : std::vector<int64_t>{size(in, "block").x};
  Case c{in,
         out,
         size(in, "grid"),
         size(in, "block"),
         in.has("dynamic_bytes") ? static_cast<size_t>(in.integer("dynamic_bytes")) : 0,
         in.has("n") ? static_cast<int>(in.integer("n")) : 0,
         Array(has_x ? in.array("x").type() : Type::f32, shape)};
  all_cases().at(in.text("kernel"))(c);
}
