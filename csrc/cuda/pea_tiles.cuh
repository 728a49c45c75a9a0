// Tiles of pea on their way between global and shared memory: in units of eight neighbouring elements, whatever the
// layout and the storage type.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/storage.cuh"
#include "cuda/common/tile_product.cuh"
#include "cuda/pea_plan.h"

namespace transkd {
namespace pea {

constexpr int kUnits = kTile * kTile / kUnit / kThreads;  // of a tile, for each thread
template <class S>
constexpr int kTileLeading = leading_of<S>(kTile);
template <class S>
constexpr int kTileElements = kTile * kTileLeading<S>;

// Calls visit(TypeTag<S>()). A map that is computed in double is stored in double; parameters may have any type.
template <class T, bool kParameter, class Visit>
__device__ __forceinline__ void visit_type(StorageType type, Visit visit) {
  if constexpr (std::is_same_v<T, double> || kParameter) {
    if (!kParameter || type == StorageType::kDouble) return visit(TypeTag<double>());
  }
  if constexpr (!std::is_same_v<T, double> || kParameter) {
    if (type == StorageType::kFloat) {
      visit(TypeTag<float>());
    } else if (type == StorageType::kBFloat16) {
      visit(TypeTag<__nv_bfloat16>());
    } else {
      visit(TypeTag<__half>());
    }
  }
}

template <class S, class T>
__device__ __forceinline__ S stored_as(T value) {
  S stored;
  narrow(static_cast<ComputeType<S>>(value), stored);
  return stored;
}

// Element `at` of a parameter.
template <class T>
__device__ __forceinline__ T parameter(const Map& map, int64_t at) {
  T value;
  visit_type<T, true>(map.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    value = static_cast<T>(widen(__ldg(static_cast<const S*>(map.data) + at)));
  });
  return value;
}

// The first `valid` of kUnit elements that lie `step` apart; the others are 0.
template <bool kParameter = false, class T>
__device__ __forceinline__ void load_unit(const Map& map, int64_t at, int64_t step, int valid, T (&values)[kUnit]) {
  visit_type<T, kParameter>(map.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* from = static_cast<const S*>(map.data) + at;
    if (map.wide && step == 1 && valid == kUnit) {
      Packed<S, kUnit> unit;
      unit.load(from);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) values[e] = static_cast<T>(unit.get(e));
    } else {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        values[e] = e < valid ? static_cast<T>(widen(__ldg(from + e * step))) : T(0);
      }
    }
  });
}

template <bool kParameter = false, class T>
__device__ __forceinline__ void store_unit(const Map& map, int64_t at, int64_t step, int valid,
                                           const T (&values)[kUnit]) {
  visit_type<T, kParameter>(map.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    S* to = static_cast<S*>(map.data) + at;
    if (map.wide && step == 1 && valid == kUnit) {
      Packed<S, kUnit> unit;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) unit.set(e, static_cast<ComputeType<S>>(values[e]));
      unit.store(to);
    } else {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        if (e < valid) to[e * step] = stored_as<S>(values[e]);
      }
    }
  });
}

// The thread's number, computed anew wherever it is asked for: kept, all that hangs on it would take registers through
// the products.
__device__ __forceinline__ int thread_now() {
  int thread = static_cast<int>(threadIdx.x);
  asm volatile("" : "+r"(thread));
  return thread;
}

// Some tokens of one sample.
struct Tokens {
  uint32_t sample, first;
  int count;  // at most kTile

  template <class T>
  __device__ Tokens(const StageView<T>& stage, uint32_t tile)
      : sample(tile / stage.sample_tiles),
        first(tile % stage.sample_tiles * kTile),
        count(static_cast<int>(min(stage.tokens - first, static_cast<uint32_t>(kTile)))) {}
};

// Some channels of a map with `all` of them.
struct Channels {
  uint32_t all, first;
  int count;  // at most kTile

  __device__ Channels(uint32_t all, uint32_t tile)
      : all(all), first(tile * kTile), count(static_cast<int>(min(all - first, static_cast<uint32_t>(kTile)))) {}
};

// A thread's k-th unit of a tile, along the channels or along the tokens. Threads side by side take neighbouring units
// of a row; along the tokens, four units of each of eight channels, so that they meet more banks of shared memory.
struct Unit {
  int token, channel, valid;

  __device__ Unit(int k, bool along_tokens, const Tokens& tokens, const Channels& channels)
      : Unit(thread_now() + k * kThreads, along_tokens) {
    const int left = along_tokens ? tokens.count - token : channels.count - channel;
    const bool inside = along_tokens ? channel < channels.count : token < tokens.count;
    valid = inside ? max(0, min(left, kUnit)) : 0;
  }

  __device__ Unit(int index, bool along_tokens)
      : token(along_tokens ? (index % 4 + index / 32 % 2 * 4) * kUnit : index / (kTile / kUnit)),
        channel(along_tokens ? index / 4 % 8 + index / 64 * 8 : index % (kTile / kUnit) * kUnit),
        valid(kUnit) {}
};

// Where a unit begins in a map.
template <class T>
__device__ __forceinline__ int64_t place_of(const StageView<T>& stage, bool channel_major, const Tokens& tokens,
                                            const Channels& channels, const Unit& unit) {
  const int64_t token = tokens.first + unit.token, channel = channels.first + unit.channel;
  return channel_major ? (static_cast<int64_t>(tokens.sample) * channels.all + channel) * stage.tokens + token
                       : (static_cast<int64_t>(tokens.sample) * stage.tokens + token) * channels.all + channel;
}

// How far apart a unit's elements lie in a map.
template <class T>
__device__ __forceinline__ int64_t step_of(const StageView<T>& stage, bool channel_major, bool along_tokens,
                                           const Channels& channels) {
  if (along_tokens) return channel_major ? 1 : channels.all;
  return channel_major ? stage.tokens : 1;
}

// A tile of factors, stored as X, that is read while another one is multiplied; zero beyond its map.
template <class X>
class FactorTile {
 public:
  using T = ComputeType<X>;

  // Of x, stored as X.
  __device__ __forceinline__ void load(const StageView<T>& stage, const Map& map, const Tokens& tokens,
                                       const Channels& channels) {
    along_tokens_ = map.channel_major;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(k, along_tokens_, tokens, channels);
      const X* from = static_cast<const X*>(map.data) + place_of(stage, along_tokens_, tokens, channels, unit);
      if (map.wide && unit.valid == kUnit) {
        unit_[k].load(from);
      } else {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) unit_[k].set(e, e < unit.valid ? widen(__ldg(from + e)) : T(0));
      }
    }
  }

  // Rows of residual_tiles.
  __device__ __forceinline__ void load_residuals(const StageView<T>& stage, uint32_t token_tile, uint32_t out_tile) {
    along_tokens_ = false;
    const int64_t width = static_cast<int64_t>(stage.out_tiles) * kTile;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(thread_now() + k * kThreads, false);
      unit_[k].load(static_cast<const X*>(stage.residual_tiles) +
                    (static_cast<int64_t>(token_tile) * kTile + unit.token) * width + out_tile * kTile + unit.channel);
    }
  }

  // Of the weight [out, in], rounded to X; rows are output channels.
  __device__ __forceinline__ void load_weight(const StageView<T>& stage, uint32_t out_tile, uint32_t in_tile) {
    along_tokens_ = false;
    const Channels out(stage.out, out_tile), in(stage.in, in_tile);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      Unit unit(thread_now() + k * kThreads, false);
      unit.valid = unit.token < out.count ? max(0, min(in.count - unit.channel, kUnit)) : 0;
      T values[kUnit];
      load_unit<true>(stage.weight, (static_cast<int64_t>(out.first) + unit.token) * stage.in + in.first + unit.channel,
                      1, unit.valid, values);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) unit_[k].set(e, values[e]);
    }
  }

  // Into rows of tokens (output channels).
  __device__ __forceinline__ void put(X* tile) const {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(thread_now() + k * kThreads, along_tokens_);
      X* to = tile + unit.token * kTileLeading<X> + unit.channel;
      if (along_tokens_) {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) to[e * kTileLeading<X>] = stored_as<X>(unit_[k].get(e));
      } else {
        unit_[k].store(to);
      }
    }
  }

 private:
  Packed<X, kUnit> unit_[kUnits];
  bool along_tokens_;
};

}  // namespace pea
}  // namespace transkd
