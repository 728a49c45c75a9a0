// csf on CUDA: sums over the pixels of every plane, the attention over [samples, channels] in one block, and the passes
// that write v and the maps' gradients. csf_plan.h says how a call is cut into blocks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/csf_gradients.cuh"
#include "cuda/csf_sums.cuh"
#include "cuda/csf_team.cuh"

namespace transkd {
namespace csf {

// sums [batch, parts, 3, channels]: the mean of z over the part, the squares about it, the sum of y's windows.
template <class Z, bool kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kReduceThreads<kChannelsLast>, kChannelsLast ? 2 : 4)
    csf_reduce_kernel(const __grid_constant__ Pass<ComputeType<Z>> pass) {
  constexpr int V = kWidth<Z, kVector>, kChannels = kChannelsLast ? V : 1;
  const Place<kChannelsLast> place(pass, V);
  const Z* z = static_cast<const Z*>(pass.z) + place.origin(pass, pass.pixels);
  const int64_t y = place.origin(pass, pass.coarse_pixels);
  const Range part(place.cut, pass.share, pass.pixels), coarse(place.cut, pass.coarse_share, pass.coarse_pixels);
  __shared__ BlockSums<kChannelsLast> sums;
  clear_totals<kChannelsLast, kChannels>(sums, pass.lanes);
  const uint32_t run = pass.teams * pass.run;
  for (uint32_t done = 0; done < max(pass.share, pass.coarse_share); done += run) {
    {
      const FineSums<Z, V, kChannelsLast> fine(pass, place, z, part.after(done, run));
      // The threads' sums are added up about one value, the first of the part.
      Packed<Z, kChannels> first;
      first.clear();
      if (fine.count > 0) first.load(z + place.offset(pass, part.begin));
#pragma unroll
      for (int v = 0; v < kChannels; ++v) {
        const double about = first.get(v);
        add_up_warp<kChannelsLast, kChannels>(sums, 0, v, pass.lanes, fine.sum(v, about));
        add_up_warp<kChannelsLast, kChannels>(sums, 1, v, pass.lanes, fine.square(v, about));
      }
    }
    const CoarseSums<Z, kVector, kChannelsLast> windows(pass, place, y, coarse.after(done, run));
#pragma unroll
    for (int v = 0; v < kChannels; ++v) {
      add_up_warp<kChannelsLast, kChannels>(sums, 2, v, pass.lanes, windows.total(v));
    }
    add_up_block<kChannelsLast, kChannels>(sums, pass.lanes);
  }

  const uint32_t own = block_channel<kChannelsLast, kChannels>(pass, place);
  if (own >= pass.channels) return;
  double mean = 0, squares = 0;
  if (part.size() > 0) {
    const Place<kChannelsLast> first = place.at(own);
    const Z* from = static_cast<const Z*>(pass.z) + first.origin(pass, pass.pixels);
    mean = widen(from[first.offset(pass, part.begin)]) + sums.total[0][threadIdx.x] / part.size();
    squares = sums.total[1][threadIdx.x] - sums.total[0][threadIdx.x] * (sums.total[0][threadIdx.x] / part.size());
  }
  double* to = sums_of(pass, place, own);
  to[0] = mean;
  to[pass.channels] = squares;
  to[2 * pass.channels] = sums.total[2][threadIdx.x];
}

// sums [batch, parts, 3, channels]: of G, of G (z - mean), of G up(y), over the fine pixels of the part.
template <class Z, bool kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kReduceThreads<kChannelsLast>, kChannelsLast ? 2 : 4)
    csf_backward_reduce_kernel(const __grid_constant__ Pass<ComputeType<Z>> pass) {
  using T = ComputeType<Z>;
  constexpr int V = kWidth<Z, kVector>, kChannels = kChannelsLast ? V : 1;
  const Place<kChannelsLast> place(pass, V);
  // What the shifts are off the means follows at the end, in doubles.
  Packed<Z, kChannels> shift;
  shift.clear();
#pragma unroll
  for (int v = 0; v < kChannels; ++v) {
    if (place.active(pass)) shift.set(v, static_cast<T>(near<Z>(pass.mean[place.channel + v])));
  }
  const Range part(place.cut, pass.share, pass.pixels);
  __shared__ BlockSums<kChannelsLast> sums;
  clear_totals<kChannelsLast, kChannels>(sums, pass.lanes);
  const uint32_t run = pass.teams * pass.run;
  for (uint32_t done = 0; done < pass.share; done += run) {
    const Products<Z, kVector, kChannelsLast> products(pass, place, shift, part.after(done, run));
#pragma unroll
    for (int v = 0; v < kChannels; ++v) {
      add_up_warp<kChannelsLast, kChannels>(sums, 0, v, pass.lanes, products.grad[v]);
      add_up_warp<kChannelsLast, kChannels>(sums, 1, v, pass.lanes, products.z[v]);
      add_up_warp<kChannelsLast, kChannels>(sums, 2, v, pass.lanes, products.y[v]);
    }
    add_up_block<kChannelsLast, kChannels>(sums, pass.lanes);
  }

  const uint32_t own = block_channel<kChannelsLast, kChannels>(pass, place);
  if (own >= pass.channels) return;
  Packed<Z, 1> own_shift;
  own_shift.set(0, static_cast<T>(near<Z>(pass.mean[own])));
  double* to = sums_of(pass, place, own);
  to[0] = sums.total[0][threadIdx.x];
  to[pass.channels] = sums.total[1][threadIdx.x] + (own_shift.get(0) - pass.mean[own]) * sums.total[0][threadIdx.x];
  to[2 * pass.channels] = sums.total[2][threadIdx.x];
}

// v = scale (z - shift) + offset + up_weight up(y).
template <class Z, bool kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 4) csf_fuse_kernel(const __grid_constant__ Pass<ComputeType<Z>> pass) {
  using T = ComputeType<Z>;
  constexpr int V = kWidth<Z, kVector>, kUnit = kChannelsLast ? 1 : V;
  constexpr int kCoarse = kCoarseWidth<Z, kVector, kChannelsLast>;
  constexpr int kAtOnce = kChannelsLast && V > 4 ? 2 : V, kChannels = kChannelsLast ? kAtOnce : 1;
  const Place<kChannelsLast> place(pass, V);
  const int64_t origin = place.origin(pass, pass.pixels), coarse_origin = place.origin(pass, pass.coarse_pixels);
  const Z* z = static_cast<const Z*>(pass.z) + origin;
  Z* out = static_cast<Z*>(pass.out) + origin;
  const Range units(place.cut, pass.share, pass.pixels / kUnit);
  const uint32_t end = place.active(pass) ? units.end : 0, unit = units.begin + place.team;
  Walk walk(unit, pass.fine);
  Packed<Z, V> fine[kFuseUnits<kChannelsLast>];
  CoarsePack<Z, kCoarse, kVector> coarse[kFuseUnits<kChannelsLast>];
  if (unit >= end) return;
#pragma unroll
  for (int u = 0; u < kFuseUnits<kChannelsLast>; ++u) {
    const uint32_t at = unit + u * pass.teams;
    if (u > 0 && at < end) walk.next(pass.fine);
    fine[u].load(z + place.offset(pass, (at < end ? at : unit) * kUnit));
    const uint32_t pixel = coarse_pixel<V, kChannelsLast>(pass, walk);
    coarse[u].load(pass.y, pass.y_type, coarse_origin + place.offset(pass, pixel));
  }
#pragma unroll
  for (int base = 0; base < V; base += kAtOnce) {
    const uint32_t entry = place.entry(pass) + (kChannelsLast ? base : 0);
    const auto scale = read_here<kChannels>(pass.coefficients.scale + entry);
    const auto shift = read_here<kChannels>(pass.coefficients.shift + entry);
    const auto offset = read_here<kChannels>(pass.coefficients.offset + entry);
    const auto up_weight = read_here<kChannels>(pass.coefficients.up_weight + entry);
#pragma unroll
    for (int u = 0; u < kFuseUnits<kChannelsLast>; ++u) {
#pragma unroll
      for (int v = base; v < base + kAtOnce; ++v) {
        const int c = kChannelsLast ? v - base : 0;
        const T x = fine[u].get(v) - shift.get(c), up = coarse[u].pack.get(v * kCoarse / V);
        fine[u].set(v, scale.get(c) * x + offset.get(c) + up_weight.get(c) * up);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kFuseUnits<kChannelsLast>; ++u) {
    const uint32_t at = unit + u * pass.teams;
    if (at < end) fine[u].store(out + place.offset(pass, at * kUnit));
  }
}

// The gradients of z and y. In channels-last, sums and coefficients of eight channels want more registers than 64.
template <class Z, bool kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kChannelsLast ? 2 : 4)
    csf_apply_kernel(const __grid_constant__ Pass<ComputeType<Z>> pass) {
  if constexpr (kVector && !kChannelsLast) {
    apply_to_rows<Z>(pass);
  } else {
    apply_to_windows<Z, kVector, kChannelsLast>(pass);
  }
}

// One block: the state, the coefficients of csf_fuse_kernel, running statistics and counters.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    csf_attention_kernel(const __grid_constant__ Call call, const __grid_constant__ Coefficients<T> coefficients) {
  BatchNorm bn = call.bn, fc_bn = call.fc_bn;
  Layers layers = call.layers;
  stage_parameters(call.sizes, bn, fc_bn, layers);
  const State state(call.state, call.sizes);
  const Parts cuts(call.sizes.pixels, call.parts);
  const auto add = [&](Moments& moments, const double* entry, int64_t part, double about) {
    moments.add(entry, call.sizes.channels, static_cast<double>(cuts.size(part)), about);
  };
  merge_parts(call.sums, call.parts, call.sizes, add, [&](int64_t plane, const Moments& moments, double about) {
    put_moments(state, call.sizes, plane, moments, about);
  });
  attention(Block(), call.sizes, bn, fc_bn, layers, state, coefficients);
}

// One block: the gradients of the parameters and the coefficients of csf_apply_kernel.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    csf_attention_backward_kernel(const __grid_constant__ BackwardCall call,
                                  const __grid_constant__ Coefficients<T> coefficients) {
  BatchNorm bn = call.bn, fc_bn = call.fc_bn;
  Layers layers = call.layers;
  stage_parameters(call.sizes, bn, fc_bn, layers);
  const Scratch scratch(call.scratch, call.sizes);
  const auto add = [&](Moments& moments, const double* entry, int64_t, double) {
    moments.z += entry[0];
    moments.squares += entry[call.sizes.channels];
    moments.y += entry[2 * call.sizes.channels];
  };
  merge_parts(call.sums, call.parts, call.sizes, add, [&](int64_t plane, const Moments& moments, double) {
    scratch.grad[plane] = moments.z;
    scratch.grad_z[plane] = moments.squares;
    scratch.grad_y[plane] = moments.y;
  });
  attention_backward(Block(), call.sizes, bn, fc_bn, layers, State(call.state, call.sizes), scratch, call.bn_gradients,
                     call.fc_bn_gradients, call.gradients, coefficients);
}

// Calls visit(TypeTag<Z>, bool_constant<vector>, bool_constant<channels-last>).
template <class T, class Visit>
void visit_instance(const Variant& variant, Visit visit) {
  visit_storage<T>(variant.type, [&](auto type) {
    const auto choose = [&](auto channels_last) {
      if constexpr (!std::is_same_v<T, double>) {
        if (variant.vector) return visit(type, std::true_type(), channels_last);
      }
      visit(type, std::false_type(), channels_last);
    };
    variant.channels_last ? choose(std::true_type()) : choose(std::false_type());
  });
}

}  // namespace csf
}  // namespace transkd
