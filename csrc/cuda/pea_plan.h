// How the CUDA kernels of pea cut a call into launches and blocks. Plain C++ without torch or CUDA, so that the tests
// on CPU run exactly what the launcher runs.
//
// Everything goes by tiles of 64 tokens, 64 input or 64 output channels. Where all maps of a stage are token-major, the
// tokens of all samples are one list; else no tile crosses a sample.
//   Narrow stages (weight and its gradient fit on chip): `programs` blocks take token tiles in turn. The residual of a
//   tile never leaves the block: it goes into dx at once and is added to the block's own part of dweight.
//   Wide stages: a block makes the residual of one token tile and one tile of output channels, and stores it in the
//   type of the products' factors. A second kernel makes dx from it, tile by tile, and `splits` parts of dweight.
// A last kernel adds up the parts. All of it depends on the call only, never on the device: results are the same
// everywhere.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/storage_type.h"
#include "cuda/common/launch_size.h"
#include "cuda/common/tile.h"

namespace transkd {
namespace pea {

constexpr int kThreads = 256;
constexpr int kTile = 64;
constexpr int kUnit = 8;          // neighbouring elements that a thread takes together
constexpr int kLaunchStages = 8;  // stages that one launch can take
constexpr int kLaunchJobs = 48;
constexpr int kNarrowIn = kTile, kNarrowOut = 2 * kTile;
constexpr int kStageFactors = 3;                      // columns of `factors`
constexpr int kBlockSums = 3;                         // the loss, and what the gradients of the two scales are made of
constexpr int kScaleElements = 4 * kUnit * kThreads;  // of a block

// A map [B, N, C], token-major or channel-major, or a parameter. Absent: nullptr.
struct Map {
  void* data;
  StorageType type;
  bool channel_major;
  bool wide;  // rows allow accesses of 16 bytes; the plan sets it
};

// One stage of a call, as it comes in; of the gradients, those that are wanted.
struct Problem {
  int64_t batch, tokens, in, out;
  double loss_weight;
  Map x, target, assistant, weight, bias, projection_scale, assistant_scale;
  Map dx, residual;
  void *dweight, *dbias, *scales;  // of the type of computing
};

// Which instantiation of a kernel a launch needs.
struct Variant {
  StorageType x;
  bool tf32;
  bool operator==(const Variant& other) const { return x == other.x && tf32 == other.tf32; }
};

// Sizes that decide how a call is cut; tests choose others to reach every way of cutting with few tokens.
struct Tuning {
  int64_t programs = 2 * 132;  // of a narrow stage, and wanted for dweight of a wide one: two per multiprocessor
  int64_t least_split = 4;     // token tiles in a part of dweight
  int64_t merge_threads = 8;   // threads that share an element of the last kernel, at most
  bool narrow = true;          // allow narrow stages
};

// One stage as the kernels see it. T is the type of computing.
template <class T>
struct StageView {
  Map x, target, assistant, weight, bias, projection_scale, assistant_scale, dx, residual;
  void* residual_tiles;  // wide: [tiles * 64, out_tiles * 64] in x's type, zero where there is no residual
  T* weight_parts;       // [parts, out, in]
  T* bias_parts;         // [parts, out_tiles * 64]
  double loss_share;     // of a squared residual in the loss
  uint32_t samples, tokens, sample_tiles, tiles;  // tokens and token tiles of a sample; token tiles of all
  uint32_t in, out, in_tiles, out_tiles;
  uint32_t first_block, programs;
  uint32_t first_gradient_block, dx_blocks, splits, split_tiles;
  bool narrow;
};

// The parameter of the project and the gradient kernel.
template <class T>
struct Launch {
  StageView<T> stage[kLaunchStages];
  uint32_t stages;
  uint32_t first_block;  // blocks of the call in earlier launches
  double* block_sums;    // [blocks of the call, 3]
};
static_assert(sizeof(Launch<double>) <= 4096, "a kernel's parameters must fit into 4 KB");

// to[i] = f_p sum over parts of from[part, i].
template <class T>
struct Merge {
  const T* from;
  T* to;
  Map projection_scale;
  int64_t stride;
  uint32_t count, parts, threads, first_block;
};

// The parameter of the last kernel of the forward. Its last block does what there is one of.
template <class T>
struct Finish {
  struct Scalars {
    T* scales;  // nullptr: not wanted
    Map assistant_scale;
    double factor;
    uint32_t first_block, blocks;  // in block_sums
  };
  Merge<T> merge[2 * kLaunchStages];
  Scalars stage[kLaunchStages];
  uint32_t merges, stages, call_blocks;
  const double* block_sums;
  T* loss;     // nullptr: another launch's
  T* factors;  // [stages, 3]
};
static_assert(sizeof(Finish<double>) <= 4096, "a kernel's parameters must fit into 4 KB");

// Bytes of a tile in shared memory, padded as leading_of() says.
inline size_t tile_bytes(StorageType type) { return kTile * (kTile * size_of(type) + 16); }

template <class T>
class Plan {
 public:
  struct Step {
    Variant variant;
    Launch<T> launch;
    uint32_t blocks = 0, gradient_blocks = 0;
    size_t shared_bytes = 0, gradient_shared_bytes = 0;  // dynamic
  };
  struct Last {
    Finish<T> finish;
    uint32_t blocks = 0;
  };

  Plan(const std::vector<Problem>& problems, bool tf32, const Tuning& tuning = {}) : tuning_(tuning) {
    for (const Problem& p : problems) add(p, Variant{p.x.type, tf32 && p.x.type == StorageType::kFloat});
    int64_t blocks = 0;
    for (Step& step : steps_) {
      step.launch.first_block = static_cast<uint32_t>(blocks);
      blocks += step.blocks;
    }
    blocks_ = checked("pea", blocks, "blocks");
    block_sums_ = take(blocks_ * kBlockSums * sizeof(double));
    for (size_t m = 0; m < problems.size(); ++m) finish(problems[m], m);
    for (Last& last : lasts_) ++last.blocks;
  }

  const std::vector<Step>& steps() const { return steps_; }
  const std::vector<Last>& lasts() const { return lasts_; }
  size_t workspace_bytes() const { return workspace_bytes_; }

  // The workspace is aligned to 16 bytes.
  void bind(void* workspace, void* loss, void* factors) {
    char* base = static_cast<char*>(workspace);
    const auto at = [&](size_t offset) { return offset == kNone ? nullptr : base + offset; };
    for (const Place& place : places_) {
      StageView<T>& stage = steps_[place.step].launch.stage[place.stage];
      stage.residual_tiles = at(place.residual_tiles);
      stage.weight_parts = reinterpret_cast<T*>(at(place.weight_parts));
      stage.bias_parts = reinterpret_cast<T*>(at(place.bias_parts));
    }
    double* sums = reinterpret_cast<double*>(at(block_sums_));
    for (Step& step : steps_) step.launch.block_sums = sums;
    for (size_t k = 0; k < lasts_.size(); ++k) {
      Finish<T>& last = lasts_[k].finish;
      last.block_sums = sums;
      last.call_blocks = blocks_;
      last.loss = k == 0 ? static_cast<T*>(loss) : nullptr;
      last.factors = static_cast<T*>(factors) + k * kLaunchStages * kStageFactors;
    }
    for (const MergePlace& place : merge_places_) {
      lasts_[place.last].finish.merge[place.merge].from = reinterpret_cast<const T*>(at(place.from));
    }
  }

 private:
  static constexpr size_t kNone = ~size_t{0};

  // Where a stage is, and what it has in the workspace.
  struct Place {
    size_t step, stage;
    size_t residual_tiles = kNone, weight_parts = kNone, bias_parts = kNone;
  };
  struct MergePlace {
    size_t last, merge, from;
  };

  size_t take(size_t bytes) {
    const size_t offset = workspace_bytes_;
    workspace_bytes_ += (bytes + 255) / 256 * 256;
    return offset;
  }

  static Map described(Map map, int64_t row) {
    map.wide = aligned(map.data) && row * size_of(map.type) % 16 == 0;
    return map;
  }

  Step& step_for(const Variant& variant) {
    for (Step& step : steps_) {
      if (step.variant == variant && step.launch.stages < kLaunchStages) return step;
    }
    steps_.push_back(Step{variant, Launch<T>{}});
    return steps_.back();
  }

  StageView<T> describe(const Problem& p) const {
    StageView<T> stage{};
    const auto map = [&](const Map& m, int64_t channels) {
      return described(m, m.channel_major ? p.tokens : channels);
    };
    stage.x = map(p.x, p.in);
    stage.dx = map(p.dx, p.in);
    stage.target = map(p.target, p.out);
    stage.assistant = map(p.assistant, p.out);
    stage.residual = map(p.residual, p.out);
    stage.weight = described(p.weight, p.in);
    stage.bias = p.bias;
    stage.projection_scale = p.projection_scale;
    stage.assistant_scale = p.assistant_scale;
    bool one_list = true;
    for (const Map* m : {&p.x, &p.target, &p.assistant, &p.residual}) {
      one_list = one_list && (m->data == nullptr || !m->channel_major);
    }
    stage.samples = checked("pea", one_list ? 1 : p.batch, "samples");
    stage.tokens = checked("pea", one_list ? p.batch * p.tokens : p.tokens, "tokens");
    stage.sample_tiles = static_cast<uint32_t>(ceil_div(stage.tokens, kTile));
    stage.tiles = checked("pea", int64_t{stage.samples} * stage.sample_tiles, "tiles of tokens");
    stage.in = checked("pea", p.in, "channels");
    stage.out = checked("pea", p.out, "channels");
    stage.in_tiles = static_cast<uint32_t>(ceil_div(p.in, kTile));
    stage.out_tiles = static_cast<uint32_t>(ceil_div(p.out, kTile));
    stage.loss_share = p.loss_weight / (static_cast<double>(p.batch * p.tokens) * static_cast<double>(p.out));
    stage.narrow = tuning_.narrow && !std::is_same_v<T, double> && p.in <= kNarrowIn && p.out <= kNarrowOut;
    return stage;
  }

  void add(const Problem& p, const Variant& variant) {
    StageView<T> stage = describe(p);
    Step& step = step_for(variant);
    Place place{static_cast<size_t>(&step - steps_.data()), step.launch.stages};
    const size_t tile = tile_bytes(variant.x), sums = kTile * leading_of<T>(kTile) * sizeof(T);
    const size_t rounded = size_of(variant.x) == 2 ? tile : 0;  // the residual, where it is rounded for the products
    const bool products = p.dx.data != nullptr || p.dweight != nullptr;
    int64_t blocks, parts;
    size_t shared;
    if (stage.narrow) {
      blocks = parts = stage.programs = static_cast<uint32_t>(std::min<int64_t>(stage.tiles, tuning_.programs));
      shared = (1 + 2 * stage.out_tiles) * tile + (rounded ? sums : 0);
    } else {
      blocks = int64_t{stage.tiles} * stage.out_tiles;
      shared = std::max(2 * tile, sums + rounded);
      const int64_t weight_tiles = int64_t{stage.out_tiles} * stage.in_tiles;
      int64_t splits = std::min(ceil_div(tuning_.programs, weight_tiles), int64_t{stage.tiles} / tuning_.least_split);
      stage.split_tiles = static_cast<uint32_t>(ceil_div(stage.tiles, std::max<int64_t>(splits, 1)));
      parts = stage.splits = static_cast<uint32_t>(ceil_div(stage.tiles, stage.split_tiles));
      if (products) {
        place.residual_tiles =
            take(static_cast<size_t>(stage.tiles) * kTile * stage.out_tiles * kTile * size_of(variant.x));
        stage.first_gradient_block = step.gradient_blocks;
        stage.dx_blocks = p.dx.data ? checked("pea", int64_t{stage.tiles} * stage.in_tiles, "blocks") : 0;
        const int64_t weight_blocks = p.dweight ? weight_tiles * stage.splits : 0;
        step.gradient_blocks = checked("pea", step.gradient_blocks + stage.dx_blocks + weight_blocks, "blocks");
        step.gradient_shared_bytes = std::max({step.gradient_shared_bytes, 2 * tile, sums});
      }
    }
    if (p.dweight) place.weight_parts = take(static_cast<size_t>(parts) * p.out * p.in * sizeof(T));
    if (p.dbias) {
      place.bias_parts =
          take(static_cast<size_t>(stage.narrow ? parts : stage.tiles) * stage.out_tiles * kTile * sizeof(T));
    }
    stage.first_block = step.blocks;
    step.blocks = checked("pea", step.blocks + blocks, "blocks");
    step.shared_bytes = std::max(step.shared_bytes, shared);
    step.launch.stage[step.launch.stages++] = stage;
    places_.push_back(place);
  }

  // After all stages were added.
  void finish(const Problem& p, size_t m) {
    if (m % kLaunchStages == 0) lasts_.push_back(Last{});
    Last& last = lasts_.back();
    const Place& place = places_[m];
    const Step& step = steps_[place.step];
    const StageView<T>& stage = step.launch.stage[place.stage];
    const auto merge = [&](void* to, size_t from, int64_t parts, int64_t stride, int64_t count) {
      Merge<T> job{};
      job.to = static_cast<T*>(to);
      job.projection_scale = p.projection_scale;
      job.stride = stride;
      job.count = checked("pea", count, "elements of a weight");
      job.parts = static_cast<uint32_t>(parts);
      job.threads = 1;
      while (job.threads < tuning_.merge_threads && parts > 16 * job.threads) job.threads *= 2;
      job.first_block = last.blocks;
      last.blocks = checked("pea", last.blocks + ceil_div(count, kThreads / job.threads), "blocks");
      merge_places_.push_back({lasts_.size() - 1, last.finish.merges, from});
      last.finish.merge[last.finish.merges++] = job;
    };
    const int64_t parts = stage.narrow ? stage.programs : stage.splits, weights = p.out * p.in;
    if (p.dweight) merge(p.dweight, place.weight_parts, parts, weights, weights);
    if (p.dbias) {
      merge(p.dbias, place.bias_parts, stage.narrow ? parts : stage.tiles, int64_t{stage.out_tiles} * kTile, p.out);
    }
    const uint32_t blocks = stage.narrow ? stage.programs : stage.tiles * stage.out_tiles;
    last.finish.stage[last.finish.stages++] = {static_cast<T*>(p.scales), p.assistant_scale, 2 * stage.loss_share,
                                               step.launch.first_block + stage.first_block, blocks};
  }

  Tuning tuning_;
  std::vector<Step> steps_;
  std::vector<Last> lasts_;
  std::vector<Place> places_;
  std::vector<MergePlace> merge_places_;
  size_t workspace_bytes_ = 0, block_sums_ = kNone;
  uint32_t blocks_ = 0;
};

// One gradient of the backward: to = upstream * factors[place] * from, element by element as they lie in memory.
struct ScaleJob {
  const void* from;
  void* to;
  int64_t count;
  StorageType from_type, to_type;
  bool wide;
  uint32_t place, first_block;
};

template <class T>
struct ScaleLaunch {
  ScaleJob job[kLaunchJobs];
  uint32_t jobs, blocks;
  const T* upstream;
  const T* factors;
};
static_assert(sizeof(ScaleLaunch<double>) <= 4096, "a kernel's parameters must fit into 4 KB");

template <class T>
std::vector<ScaleLaunch<T>> plan_backward(const std::vector<ScaleJob>& jobs, const void* upstream,
                                          const void* factors) {
  std::vector<ScaleLaunch<T>> launches;
  for (ScaleJob s : jobs) {
    if (launches.empty() || launches.back().jobs == kLaunchJobs) {
      launches.push_back({});
      launches.back().upstream = static_cast<const T*>(upstream);
      launches.back().factors = static_cast<const T*>(factors);
    }
    ScaleLaunch<T>& launch = launches.back();
    s.wide = aligned(s.from) && aligned(s.to);
    s.first_block = launch.blocks;
    launch.blocks = checked("pea", launch.blocks + ceil_div(s.count, kScaleElements), "blocks");
    launch.job[launch.jobs++] = s;
  }
  return launches;
}

}  // namespace pea
}  // namespace transkd
