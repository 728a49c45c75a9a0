// hcl on CUDA: sums of d = student - teacher over the pyramid's cells, and the gradient alpha d + table[cell].
// hcl_plan.h says how a call is cut into blocks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/storage.cuh"
#include "cuda/hcl_plan.h"

namespace transkd {
namespace hcl {

// Accesses that a thread has under way at a time, per map: with four blocks on a multiprocessor, enough bytes to cover
// the latency of memory, and no spills.
template <int V, class T>
constexpr int kUnroll = V > 1 ? 2 : 32 / sizeof(T);

template <class T>
__device__ __forceinline__ uint32_t stage_of(const Launch<T>& launch, uint32_t block) {
  uint32_t m = 0;
  while (m + 1 < launch.stages && block >= launch.stage[m + 1].first_block) ++m;
  return m;
}

// What one block works on.
template <class T, bool kChannelsLast>
struct Part {
  uint32_t index;  // of the stage in the launch
  const Stage<T>& stage;
  uint32_t group, strip;
  uint32_t first_cell, cells;    // in stage.order
  uint32_t first_plane, planes;  // plane = sample * channels + channel
  int64_t offset;                // of the group's first element in the maps

  __device__ Part(const Launch<T>& launch, uint32_t block)
      : index(stage_of(launch, block)), stage(launch.stage[index]) {
    const Stage<T>& s = stage;
    const uint32_t parts = s.cell_parts * s.strips;
    uint32_t rest = block - s.first_block;
    const uint32_t inner = rest % s.inner_groups;
    rest /= s.inner_groups;
    const uint32_t outer = rest / parts, part = rest % parts;
    group = outer * s.inner_groups + inner;
    strip = part % s.strips;
    const uint32_t cell_part = part / s.strips;
    first_cell = s.cells * cell_part / s.cell_parts;
    cells = s.cells * (cell_part + 1) / s.cell_parts - first_cell;
    if constexpr (kChannelsLast) {
      const uint32_t channel = inner * s.group_planes;
      first_plane = outer * s.channels + channel;
      planes = min(s.group_planes, s.channels - channel);
      offset = static_cast<int64_t>(outer) * s.channels * s.pixels + channel;
    } else {
      first_plane = outer * s.group_planes;
      planes = min(s.group_planes, s.planes - first_plane);
      offset = first_plane * s.pixels;
    }
  }
};

// The vectors of one piece of a cell, row by row, that one thread takes: every stride-th. Positions count pixels of the
// plane, which fit into 32 bits.
class Walk {
 public:
  // Vectors lie `step` pixels apart in a row of row_vectors of them, rows `row_step` pixels apart.
  __device__ Walk(uint32_t first, uint32_t end, uint32_t stride, uint32_t row_vectors, uint32_t origin,
                  uint32_t row_step, uint32_t step)
      : index_(first),
        end_(end),
        stride_(stride),
        column_(first % row_vectors),
        row_vectors_(row_vectors),
        column_stride_(stride % row_vectors),
        pixel_(origin + first / row_vectors * row_step + column_ * step),
        jump_(stride / row_vectors * row_step + column_stride_ * step),
        wrap_(row_step - row_vectors * step) {}

  __device__ bool valid() const { return index_ < end_; }
  __device__ uint32_t pixel() const { return pixel_; }
  __device__ void next() {
    index_ += stride_;
    column_ += column_stride_;
    pixel_ += jump_;
    if (column_ >= row_vectors_) {
      column_ -= row_vectors_;
      pixel_ += wrap_;
    }
  }

 private:
  uint32_t index_, end_, stride_, column_, row_vectors_, column_stride_, pixel_, jump_, wrap_;
};

// One piece of one cell, as one thread sees it.
struct Piece {
  uint32_t slot;   // its place among the block's pieces of a plane
  uint32_t cell;   // the cell's number in the table
  uint32_t plane;  // in the group: the piece's plane (NCHW), the first of the thread's planes (channels-last)
  bool collects;   // whether this thread stores what the piece's threads summed
  int64_t origin;  // where the plane begins in the maps
  Walk walk;       // ends at once where the thread has nothing to do
};

// Calls visit(piece) for the block's pieces. All threads of a warp make the same number of calls.
template <int V, bool kChannelsLast, class T, class Visit>
__device__ __forceinline__ void for_each_piece(const Part<T, kChannelsLast>& part, Visit visit) {
  const Stage<T>& stage = part.stage;
  const uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t lanes = stage.lanes, teams = kWarpSize / lanes, team = lane / lanes, member = lane % lanes;
  const uint32_t slots = part.cells * stage.cuts;
  // NCHW: each team of `lanes` threads has a piece. Channels-last: the warp has one; members are side by side in
  // channels, teams in pixels.
  const uint32_t pieces = kChannelsLast ? slots : slots * part.planes;
  const uint32_t at_once = kChannelsLast ? 1 : teams;
  for (uint32_t base = warp * at_once; base < pieces; base += kThreads / kWarpSize * at_once) {
    const uint32_t index = kChannelsLast ? base : min(base + team, pieces - 1);
    const uint32_t slot = kChannelsLast ? index : index % slots;
    const uint32_t plane = kChannelsLast ? member * V : index / slots;
    const bool active = kChannelsLast ? plane < part.planes : base + team < pieces;

    const uint32_t cell = stage.order[part.first_cell + slot / stage.cuts];
    const uint32_t i = cell / stage.column_segments, j = cell % stage.column_segments;
    const uint32_t top = stage.edge_row[i], left = stage.edge_column[j];
    const uint32_t step = kChannelsLast ? 1 : V;
    const uint32_t row_vectors = (stage.edge_column[j + 1] - left) / step;
    const uint32_t vectors = (stage.edge_row[i + 1] - top) * row_vectors;
    const uint32_t cuts = stage.strips * stage.cuts, cut = part.strip * stage.cuts + slot % stage.cuts;
    const uint32_t share = vectors / cuts, more = vectors % cuts;
    const uint32_t first = cut * share + min(cut, more) + (kChannelsLast ? team : member);
    const uint32_t end = active ? (cut + 1) * share + min(cut + 1, more) : 0;
    visit(Piece{
        slot, cell, plane, active && (kChannelsLast ? team : member) == 0,
        part.offset + (kChannelsLast ? plane : plane * stage.pixels),
        Walk(first, end, kChannelsLast ? teams : lanes, row_vectors, top * stage.width + left, stage.width, step)});
  }
}

// Where a pixel lies after the beginning of its plane.
template <bool kChannelsLast, class T>
__device__ __forceinline__ int64_t offset_of(const Stage<T>& stage, uint32_t pixel) {
  return kChannelsLast ? static_cast<int64_t>(pixel) * stage.channels : pixel;
}

// partials [strips, kSums, cells, group_planes] -> cell_sums [kSums, cells, group_planes] in shared memory. One block
// does it while the others may have ended, so it is the latency that counts: many loads are under way at a time.
template <int kSums, bool kChannelsLast, class T>
__device__ void sum_strips(const Part<T, kChannelsLast>& part, const T* partials, T* cell_sums) {
  const Stage<T>& stage = part.stage;
  constexpr uint32_t kTogether = 4;
  const uint32_t count = kSums * stage.cells * part.planes, strip_sums = kSums * stage.cells * stage.group_planes;
  for (uint32_t base = threadIdx.x; base < count; base += kTogether * kThreads) {
    uint32_t at[kTogether];
    T sum[kTogether] = {};
#pragma unroll
    for (uint32_t e = 0; e < kTogether; ++e) {
      const uint32_t k = min(base + e * kThreads, count - 1);
      at[e] = k / part.planes * stage.group_planes + k % part.planes;
    }
    const T* from = partials;
#pragma unroll 4
    for (uint32_t strip = 0; strip < stage.strips; ++strip, from += strip_sums) {
#pragma unroll
      for (uint32_t e = 0; e < kTogether; ++e) sum[e] += __ldcg(from + at[e]);
    }
#pragma unroll
    for (uint32_t e = 0; e < kTogether; ++e) {
      if (base + e * kThreads < count) cell_sums[at[e]] = sum[e];
    }
  }
}

// piece_sums [kSums, slots, group_planes] of the block -> cell_sums [kSums, cells, group_planes] of the group, both in
// shared memory. True in the block that has them, which is the group's last one; a barrier must lie before and after.
template <int kSums, bool kChannelsLast, class T>
__device__ bool sum_cells(const Launch<T>& launch, const Part<T, kChannelsLast>& part, const T* piece_sums,
                          T* cell_sums) {
  const Stage<T>& stage = part.stage;
  const uint32_t parts = stage.cell_parts * stage.strips, slots = part.cells * stage.cuts;
  const int64_t strip_sums = kSums * stage.cells * stage.group_planes;
  T* partials = launch.partials + stage.partials + static_cast<int64_t>(part.group) * stage.strips * strip_sums;
  for (uint32_t k = threadIdx.x; k < part.cells * part.planes; k += kThreads) {
    const uint32_t plane = k % part.planes, c = k / part.planes, cell = stage.order[part.first_cell + c];
    T* to = parts == 1 ? cell_sums : partials + part.strip * strip_sums;
#pragma unroll
    for (uint32_t q = 0; q < kSums; ++q) {
      T sum = 0;
      for (uint32_t cut = 0; cut < stage.cuts; ++cut) {
        sum += piece_sums[(q * slots + c * stage.cuts + cut) * stage.group_planes + plane];
      }
      to[(q * stage.cells + cell) * stage.group_planes + plane] = sum;
    }
  }
  if (parts == 1) return true;
  const bool finishes = comes_last(launch.counters + stage.first_counter + part.group, parts);
  if (finishes) sum_strips<kSums>(part, partials, cell_sums);
  return finishes;
}

// cell_sums [cells, group_planes] in shared memory -> the group's part of the table; returns the thread's part of the
// pooled terms of the loss. slopes [windows, group_planes] is room in shared memory. Calls visit(cell, plane, entry)
// with what goes into the table.
template <bool kChannelsLast, class T, class Visit>
__device__ T pool_group(const Part<T, kChannelsLast>& part, const T* cell_sums, T* slopes, Visit visit) {
  const Stage<T>& stage = part.stage;
  T loss = 0;
  for (uint32_t level = 0, row = 0, window = 0; level < stage.levels; ++level) {
    const uint32_t l = 1u << level;
    for (uint32_t k = threadIdx.x; k < l * l * part.planes; k += kThreads) {
      const uint32_t plane = k % part.planes, w = k / part.planes, i = row + w / l, j = row + w % l;
      T sum = 0;
      for (uint32_t r = stage.first_row[i]; r < stage.end_row[i]; ++r) {
        for (uint32_t c = stage.first_column[j]; c < stage.end_column[j]; ++c) {
          sum += cell_sums[(r * stage.column_segments + c) * stage.group_planes + plane];
        }
      }
      const T height = stage.edge_row[stage.end_row[i]] - stage.edge_row[stage.first_row[i]];
      const T width = stage.edge_column[stage.end_column[j]] - stage.edge_column[stage.first_column[j]];
      const T share = 1 / (height * width), pooled = sum * share;
      loss += stage.level_weight[level] * pooled * pooled;
      slopes[(window + w) * stage.group_planes + plane] = 2 * stage.level_weight[level] * pooled * share;
    }
    row += l;
    window += l * l;
  }
  __syncthreads();
  for (uint32_t k = threadIdx.x; k < stage.cells * part.planes; k += kThreads) {
    const uint32_t plane = k % part.planes, cell = k / part.planes;
    const uint32_t r = cell / stage.column_segments, c = cell % stage.column_segments;
    T entry = 0;
    for (uint32_t level = 0, row = 0, window = 0; level < stage.levels; ++level) {
      const uint32_t l = 1u << level;
      for (uint32_t i = 0; i < l; ++i) {
        if (r < stage.first_row[row + i] || r >= stage.end_row[row + i]) continue;
        for (uint32_t j = 0; j < l; ++j) {
          if (c < stage.first_column[row + j] || c >= stage.end_column[row + j]) continue;
          entry += slopes[(window + i * l + j) * stage.group_planes + plane];
        }
      }
      row += l;
      window += l * l;
    }
    const uint32_t sample = (part.first_plane + plane) / stage.channels;
    const uint32_t channel = (part.first_plane + plane) % stage.channels;
    stage.table[(static_cast<int64_t>(sample) * stage.cells + cell) * stage.channels + channel] = entry;
    visit(cell, plane, entry);
  }
  return loss;
}

// The call's last block adds up the shares of all of them.
template <class T>
__device__ void finish_loss(const Launch<T>& launch) {
  if (!comes_last(launch.counters, launch.call_blocks)) return;
  double loss = 0;
  for (uint32_t k = threadIdx.x; k < launch.call_shares; k += kThreads) loss += __ldcg(launch.shares + k);
  loss = sum_block<kThreads>(loss);
  if (threadIdx.x == 0) *launch.loss = static_cast<T>(loss);
}

// Dynamic shared memory: Plan::Step::shared_bytes.
template <class A, class B, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 4)
    hcl_forward_kernel(const __grid_constant__ Launch<ComputeType<A, B>> launch) {
  using T = ComputeType<A, B>;
  extern __shared__ uint4 shared_memory[];
  const Part<T, kChannelsLast> part(launch, blockIdx.x);
  const Stage<T>& stage = part.stage;
  T* cell_sums = reinterpret_cast<T*>(shared_memory);            // [cells, group_planes]
  T* piece_sums = cell_sums + stage.cells * stage.group_planes;  // [slots, group_planes]

  // Chains of additions are short either way; only channels-last needs a sum for every element.
  constexpr int kChains = V == 1 ? 1 : 2, kSums = kChannelsLast ? V : kChains;
  T squares[kChains] = {};
  for_each_piece<V>(part, [&](Piece piece) {
    const A* student = static_cast<const A*>(stage.student) + piece.origin;
    const B* teacher = static_cast<const B*>(stage.teacher) + piece.origin;
    T sums[kSums] = {};
    while (piece.walk.valid()) {
      Pack<A, V> s[kUnroll<V, T>];
      Pack<B, V> t[kUnroll<V, T>];
#pragma unroll
      for (int u = 0; u < kUnroll<V, T>; ++u, piece.walk.next()) {
        if (piece.walk.valid()) {
          const int64_t at = offset_of<kChannelsLast>(stage, piece.walk.pixel());
          s[u].load(student + at);
          t[u].load(teacher + at);
        } else {
          s[u].clear();
          t[u].clear();
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll<V, T>; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const T d = widen(s[u].element[v]) - widen(t[u].element[v]);
          sums[v % kSums] += d;
          squares[v % kChains] += d * d;
        }
      }
    }
    T* to = piece_sums + piece.slot * stage.group_planes + piece.plane;
    if constexpr (kChannelsLast) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T sum = sum_lanes(sums[v], stage.lanes);
        if (piece.collects) to[v] = sum;
      }
    } else {
#pragma unroll
      for (int v = 1; v < kSums; ++v) sums[0] += sums[v];
      const T sum = sum_lanes(sums[0], 1, stage.lanes);
      if (piece.collects) *to = sum;
    }
  });
#pragma unroll
  for (int v = 1; v < kChains; ++v) squares[0] += squares[v];
  const T block_squares = sum_block<kThreads>(squares[0]);
  if (threadIdx.x == 0) launch.shares[launch.first_block + blockIdx.x] = block_squares * (stage.alpha / 2);

  const bool finishes = sum_cells<1>(launch, part, piece_sums, cell_sums);
  __syncthreads();
  if (finishes) {
    const T loss = sum_block<kThreads>(pool_group(part, cell_sums, piece_sums, [](uint32_t, uint32_t, T) {}));
    if (threadIdx.x == 0) launch.shares[launch.call_blocks + stage.first_group + part.group] = loss;
  }
  finish_loss(launch);
}

// Single elements are many under way at a time, each with its place: they need more registers.
template <class A, class B, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, V == 1 ? 3 : 4)
    hcl_backward_kernel(const __grid_constant__ Launch<ComputeType<A, B>> launch) {
  using T = ComputeType<A, B>;
  // The last maps that the forward read are the likeliest to be in the cache still.
  const Part<T, kChannelsLast> part(launch, gridDim.x - 1 - blockIdx.x);
  const Stage<T>& stage = part.stage;
  const T upstream = *launch.upstream, alpha = upstream * stage.alpha;
  for_each_piece<V>(part, [&](Piece piece) {
    const A* student = static_cast<const A*>(stage.student) + piece.origin;
    const B* teacher = static_cast<const B*>(stage.teacher) + piece.origin;
    A* gradient = static_cast<A*>(stage.gradient) + piece.origin;
    constexpr int kEntries = kChannelsLast ? V : 1;
    Pack<T, kEntries> entries;
    entries.clear();
    if (piece.walk.valid()) {
      const uint32_t plane = part.first_plane + piece.plane;
      const uint32_t sample = plane / stage.channels, channel = plane % stage.channels;
      entries.load(stage.table + (static_cast<int64_t>(sample) * stage.cells + piece.cell) * stage.channels + channel);
    }
#pragma unroll
    for (int v = 0; v < kEntries; ++v) entries.element[v] *= upstream;
    while (piece.walk.valid()) {
      Pack<A, V> s[kUnroll<V, T>];
      Pack<B, V> t[kUnroll<V, T>];
      uint32_t pixel[kUnroll<V, T>];
      bool valid[kUnroll<V, T>];
#pragma unroll
      for (int u = 0; u < kUnroll<V, T>; ++u, piece.walk.next()) {
        pixel[u] = piece.walk.pixel();
        valid[u] = piece.walk.valid();
        if (!valid[u]) continue;
        const int64_t at = offset_of<kChannelsLast>(stage, pixel[u]);
        s[u].load(student + at);
        t[u].load(teacher + at);
      }
#pragma unroll
      for (int u = 0; u < kUnroll<V, T>; ++u) {
        if (!valid[u]) continue;
        Pack<A, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const T d = widen(s[u].element[v]) - widen(t[u].element[v]);
          narrow(alpha * d + entries.element[kChannelsLast ? v : 0], out.element[v]);
        }
        out.store(gradient + offset_of<kChannelsLast>(stage, pixel[u]));
      }
    }
  });
}

// Calls visit(integral_constant<V>, bool_constant<channels-last>) with what a launch on maps stored as A and B needs.
template <class A, class B, class Visit>
void visit_variant(const Variant& variant, Visit visit) {
  const auto choose = [&](auto channels_last) {
    if constexpr (!std::is_same_v<A, double>) {
      if (variant.vector) return visit(std::integral_constant<int, kVectorWidth<A, B>>(), channels_last);
    }
    visit(std::integral_constant<int, 1>(), channels_last);
  };
  variant.channels_last ? choose(std::true_type()) : choose(std::false_type());
}

// Calls visit(TypeTag<A>, TypeTag<B>, integral_constant<V>, bool_constant<channels-last>).
template <class T, class Visit>
void visit_instance(const Variant& variant, Visit visit) {
  visit_storage<T>(variant.student, [&](auto student) {
    visit_storage<T>(variant.teacher, [&](auto teacher) {
      visit_variant<typename decltype(student)::type, typename decltype(teacher)::type>(
          variant, [&](auto width, auto channels_last) { visit(student, teacher, width, channels_last); });
    });
  });
}

}  // namespace hcl
}  // namespace transkd
