// How the CUDA kernels of gl_mixer cut a call into blocks. Plain C++ without torch or CUDA, so that the tests on CPU
// run exactly what the launcher runs.
//
// The tokens of all samples form one list of rows; tiles of rows may cross samples. Both convolutions are one product:
// their output channels stand one behind the other, a before b, and are called stacked channels. The backward has up
// to three launches:
//   gate       D_a, D_b, the gradient of u, and over parts of the rows the sums for biases and scalars;
//   gradients  blocks for e, blocks for the convolutions' weights, each over a part of the rows, and some that add up
//              the sums of gate;
//   merge      adds up the weights' parts, if there are several.
// All of it depends on the sizes only, never on the device: results are the same everywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/storage_type.h"
#include "cuda/common/launch_size.h"

namespace transkd {
namespace gl_mixer {

constexpr int kTapCount = 3;
constexpr int kWarp = 32;

// Tiles, for elements of so many bytes. Doubles, which are for gradcheck, have smaller ones: all fit into 48 KB.
constexpr int kTileRows = 64;
constexpr int kTileChannels = 32;
// Channels that are added up between two barriers.
constexpr int depth_of(int64_t bytes) { return static_cast<int>(64 / bytes); }
// Of the weights' gradients: stacked channels, and rows that are added up between two barriers.
constexpr int stacked_tile(int64_t bytes) { return bytes == 8 ? 32 : 64; }
constexpr int row_depth(int64_t bytes) { return bytes == 8 ? 8 : static_cast<int>(128 / bytes); }
constexpr int kForwardThreads = 256;
constexpr int gradient_threads(int64_t bytes) { return bytes == 8 ? 64 : 128; }
constexpr int kGateThreads = 256;
constexpr int kMergeThreads = 256;

// A tensor of any floating dtype.
struct Values {
  void* data = nullptr;
  StorageType type = StorageType::kFloat;
};

// The tensors of a call; those that a call does not have, or that are not wanted, have no data. Pairs are of
// convolutions a and b.
struct Call {
  int64_t batch, tokens, channels;
  bool residual;
  StorageType type;  // of e, grad, out
  Values u, weight[2], bias[2], attention_weight, conv_weight;
  const void* e;
  void* out;
  void* branches;  // [B, N, 2, C], of the type of computing
  // The backward's own.
  const void* grad;
  void* e_gradient;
  void* u_gradient;
  void* weight_gradient[2];
  void* bias_gradient[2];
  void* attention_weight_gradient;
  void* conv_weight_gradient;
};

// Tests choose others, to reach every way of cutting with small tensors.
struct Tuning {
  int64_t blocks =
      2 * 132;  // of the gate kernel, and of the weights' gradients: a few per multiprocessor of a large GPU
  int64_t least_rows = 256;  // of a part of the weights' gradients
  bool vectors = true;       // use 16-byte accesses where they are possible
};

// The parameter of all kernels but the merge.
struct Pass {
  Call call;
  void* gate_gradient;  // D, [rows, 2 C] in e's type
  double* bias_sums;    // [gate_parts, 2 C]
  double* scalar_sums;  // [gate_parts * gate_groups, 2]: for w_att, w_conv
  void* weight_parts;   // [weight_parts_count, stacked channels wanted, 3 C], of the type of computing
  uint32_t rows, tokens, channels;
  uint32_t row_tiles, channel_tiles;
  // The gate kernel: `lanes` threads side by side in channels, `gate_share` rows to a block.
  uint32_t lanes, gate_groups, gate_parts, gate_share;
  // The weights' gradients: of the stacked channels [first_stacked, end_stacked), `weight_share` rows to a part.
  uint32_t first_stacked, end_stacked, stacked_tiles, weight_parts_count, weight_share;
  // The gradients' blocks: first those of e, then those of weights, then those of sums.
  uint32_t e_blocks, weight_blocks, sum_blocks;
  bool vectors;

  bool wants_weights() const { return end_stacked > first_stacked; }
};
static_assert(sizeof(Pass) <= 4096, "a kernel's parameters must fit into 4 KB");

// The parameter of the merge kernel.
struct Merge {
  const void* parts;  // [count, elements]
  void* gradient[2];  // elements one behind the other
  StorageType type[2];
  int64_t elements, of_gradient;
  uint32_t count;
  bool doubles, vectors;
};

class Plan {
 public:
  explicit Plan(const Call& call, const Tuning& tuning = {}) {
    pass_.call = call;
    pass_.tokens = checked("gl_mixer", call.tokens, "tokens in a sample");
    // Places within a tile of rows of 2 C channels are counted in 32 bits.
    pass_.channels = checked("gl_mixer", 4 * kTileRows * call.channels, "elements in a tile of rows") / (4 * kTileRows);
    // Whole tiles of rows are counted in 32 bits.
    pass_.rows = checked("gl_mixer", call.batch * call.tokens + 2 * kTileRows, "tokens in a batch") - 2 * kTileRows;
    pass_.row_tiles = static_cast<uint32_t>(ceil_div(pass_.rows, kTileRows));
    pass_.channel_tiles = static_cast<uint32_t>(ceil_div(pass_.channels, kTileChannels));
    pass_.vectors = tuning.vectors && vectors_fit();
    plan_gate(tuning);
    plan_gradients(tuning);
  }

  const Pass& pass() const { return pass_; }
  uint32_t forward_blocks() const {
    return checked("gl_mixer", int64_t{pass_.row_tiles} * pass_.channel_tiles, "tiles");
  }
  // 0: nothing is wanted.
  uint32_t gate_blocks() const { return wants_any() ? pass_.gate_parts * pass_.gate_groups : 0; }
  uint32_t gradient_blocks() const { return pass_.e_blocks + pass_.weight_blocks + pass_.sum_blocks; }
  uint32_t merge_blocks() const {
    if (!merges()) return 0;
    const int64_t per_block = kMergeThreads * (merge().vectors ? 4 : 1);
    return checked("gl_mixer", ceil_div(merge().elements, per_block), "elements in a weight");
  }

  Merge merge() const {
    Merge merge{};
    merge.parts = pass_.weight_parts;
    for (int k = 0; k < 2; ++k) {
      merge.gradient[k] = pass_.call.weight_gradient[k];
      merge.type[k] = pass_.call.weight[k].type;
    }
    if (merge.gradient[0] == nullptr) {
      merge.gradient[0] = merge.gradient[1];
      merge.type[0] = merge.type[1];
    }
    merge.of_gradient = int64_t{kTapCount} * pass_.channels * pass_.channels;
    merge.elements = int64_t{kTapCount} * pass_.channels * (pass_.end_stacked - pass_.first_stacked);
    merge.count = pass_.weight_parts_count;
    merge.doubles = pass_.call.type == StorageType::kDouble;
    merge.vectors = pass_.vectors;
    return merge;
  }

  // The backward's workspace; nothing in it has to be set before.
  int64_t workspace_bytes() const { return sections().end; }
  void bind(void* workspace) {
    char* const base = static_cast<char*>(workspace);
    const Sections at = sections();
    pass_.gate_gradient = base + at.gate_gradient;
    pass_.bias_sums = reinterpret_cast<double*>(base + at.bias_sums);
    pass_.scalar_sums = reinterpret_cast<double*>(base + at.scalar_sums);
    pass_.weight_parts = base + at.weight_parts;
  }

 private:
  struct Sections {
    int64_t gate_gradient, bias_sums, scalar_sums, weight_parts, end;
  };

  int64_t bytes() const { return size_of(pass_.call.type); }
  int64_t sum_bytes() const { return pass_.call.type == StorageType::kDouble ? 8 : 4; }

  // Doubles are for gradcheck and not worth 16-byte accesses. Eight channels are a multiple of 16 bytes in all types.
  bool vectors_fit() const {
    const Call& c = pass_.call;
    if (c.type == StorageType::kDouble || c.channels % 8 != 0) return false;
    bool fit = aligned(c.e) && aligned(c.u.data) && aligned(c.out) && aligned(c.branches) && aligned(c.grad) &&
               aligned(c.e_gradient) && aligned(c.u_gradient);
    for (int k = 0; k < 2; ++k) {
      fit =
          fit && c.weight[k].type != StorageType::kDouble && aligned(c.weight[k].data) && aligned(c.weight_gradient[k]);
    }
    return fit;
  }

  bool wants_sums() const {
    const Call& c = pass_.call;
    return c.bias_gradient[0] != nullptr || c.bias_gradient[1] != nullptr || c.attention_weight_gradient != nullptr ||
           c.conv_weight_gradient != nullptr;
  }
  bool wants_any() const {
    return pass_.call.e_gradient != nullptr || pass_.call.u_gradient != nullptr || pass_.wants_weights() ||
           wants_sums();
  }
  bool merges() const { return pass_.wants_weights() && pass_.weight_parts_count > 1; }

  void plan_gate(const Tuning& tuning) {
    const int64_t packs = pass_.channels / (pass_.vectors ? 16 / bytes() : 1);
    pass_.lanes = 1;
    while (pass_.lanes < packs && pass_.lanes < kWarp) pass_.lanes *= 2;
    pass_.gate_groups = static_cast<uint32_t>(ceil_div(packs, pass_.lanes));
    const int64_t teams = kGateThreads / pass_.lanes;
    const int64_t parts = std::clamp<int64_t>(tuning.blocks / pass_.gate_groups, 1, ceil_div(pass_.rows, teams));
    pass_.gate_share = static_cast<uint32_t>(ceil_div(ceil_div(pass_.rows, parts), teams) * teams);
    pass_.gate_parts = static_cast<uint32_t>(ceil_div(pass_.rows, pass_.gate_share));
  }

  void plan_gradients(const Tuning& tuning) {
    const Call& c = pass_.call;
    const uint32_t channels = pass_.channels;
    const int64_t depth = row_depth(bytes());
    pass_.e_blocks = c.e_gradient != nullptr ? forward_blocks() : 0;
    pass_.first_stacked = c.weight_gradient[0] != nullptr ? 0 : channels;
    pass_.end_stacked = c.weight_gradient[1] != nullptr ? 2 * channels : channels;
    pass_.stacked_tiles =
        static_cast<uint32_t>(ceil_div(pass_.end_stacked - pass_.first_stacked, stacked_tile(bytes())));
    const int64_t tiles = int64_t{pass_.stacked_tiles} * pass_.channel_tiles;
    // With 2 C rows, a block of the weights' gradients takes as long as one of e's.
    const int64_t least_rows = std::max<int64_t>(tuning.least_rows, tuning.least_rows > 1 ? 2 * int64_t{channels} : 1);
    const int64_t most_parts = std::min(ceil_div(pass_.rows, least_rows), ceil_div(pass_.rows, depth));
    const int64_t parts =
        std::clamp<int64_t>(tuning.blocks / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(most_parts, 1));
    pass_.weight_share = static_cast<uint32_t>(ceil_div(ceil_div(pass_.rows, parts), depth) * depth);
    pass_.weight_parts_count = static_cast<uint32_t>(ceil_div(pass_.rows, pass_.weight_share));
    pass_.weight_blocks = checked("gl_mixer", tiles * pass_.weight_parts_count, "tiles");
    // One block for the scalars, before those for the biases.
    pass_.sum_blocks = wants_sums() ? static_cast<uint32_t>(1 + ceil_div(2 * int64_t{channels}, kWarp)) : 0;
    checked("gl_mixer", int64_t{pass_.e_blocks} + pass_.weight_blocks + pass_.sum_blocks, "tiles");
  }

  Sections sections() const {
    const int64_t channels = pass_.channels;
    Sections at{};
    const auto take = [&at](int64_t bytes) {
      const int64_t begin = at.end;
      at.end += ceil_div(bytes, 256) * 256;
      return begin;
    };
    const Call& c = pass_.call;
    const bool gradient = c.e_gradient != nullptr || pass_.wants_weights();
    at.gate_gradient = take(gradient ? pass_.rows * 2 * channels * bytes() : 0);
    at.bias_sums = take(wants_sums() ? pass_.gate_parts * 2 * channels * int64_t{8} : 0);
    at.scalar_sums = take(wants_sums() ? int64_t{2} * pass_.gate_parts * pass_.gate_groups * int64_t{8} : 0);
    at.weight_parts = take(merges() ? pass_.weight_parts_count * merge().elements * sum_bytes() : 0);
    return at;
  }

  Pass pass_{};
};

}  // namespace gl_mixer
}  // namespace transkd
