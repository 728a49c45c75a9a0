// What device code calls: launches, barriers, shuffles and votes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <thread>

#include "barriers.h"
#include "block.h"
#include "launch.h"
#include "sanitizers.h"
#include "warp.h"

namespace cuda_on_cpu {
namespace {

std::mt19937_64 random_engine;

constexpr unsigned kMaxThreads = 1024, kMaxGridY = 65535;

void check_configuration(dim3 grid, dim3 block, Site site) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const bool possible = threads >= 1 && threads <= kMaxThreads && block.z <= 64 && blocks >= 1 &&
                        grid.x <= 0x7fffffffu && grid.y <= kMaxGridY && grid.z <= kMaxGridY;
  if (possible) return;
  std::fprintf(stderr,
               "cuda_on_cpu: no GPU launches a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads\n  at %s:%d in %s\n",
               grid.x, grid.y, grid.z, block.x, block.y, block.z, site.file, site.line, site.function);
  std::_Exit(3);
}

Block& running(const char* name, Site site) {
  if (Block::running == nullptr) {
    std::fprintf(stderr, "cuda_on_cpu: %s is called outside of a kernel\n  at %s:%d in %s\n", name, site.file,
                 site.line, site.function);
    std::_Exit(3);
  }
  return *Block::running;
}

}  // namespace

void set_seed(uint64_t seed) { random_engine.seed(seed); }

void launch_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& body, Site site) {
  check_configuration(grid, block, site);
  Grid launched{grid, block, dynamic_shared_bytes, body, site, random_engine};
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_engine);
  std::unique_ptr<Stacks> stacks;
  const auto run = [&](uint64_t i) {
    const uint3 index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y)};
    // Mapped anew, stacks and shared memory have no history for ThreadSanitizer, which would take two blocks' use of
    // the same memory for races.
    if (stacks == nullptr || tsan::kOn) stacks = std::make_unique<Stacks>(block.x * block.y * block.z);
    std::make_unique<Block>(launched, index, *stacks)->run();  // on the heap, where freed tokens are forgotten
  };
  for (uint64_t i : order) {
    if (tsan::kOn) {
      std::thread(run, i).join();
    } else {
      run(i);
    }
  }
  tsan::acquire(&launched.end);
}

Votes meet_block(const char* name, bool predicate, Site site) {
  const tsan::Unseen unseen;
  return running(name, site).meet_block(name, predicate, site);
}

void meet_warp(uint32_t mask, Site site) {
  const tsan::Unseen unseen;
  running("__syncwarp", site).meet_warp("__syncwarp", mask, 0, true, site);
}

const Gathered& gather(const char* name, uint32_t mask, uint64_t value, Site site) {
  const tsan::Unseen unseen;
  return running(name, site).meet_warp(name, mask, value, false, site);
}

void fence(Scope scope) {
  const tsan::Unseen unseen;
  if (Block::running != nullptr) Block::running->fence(scope);
}

void note_atomic(const void* address) {
  const tsan::Unseen unseen;
  if (Block::running != nullptr) Block::running->note_atomic(address);
}

uint32_t running_lanes() { return running("__activemask", Site::here()).running_lanes(); }

// The lane to read, and the lane's own value where that lies outside of the group, are PTX's shfl.sync.
uint64_t shuffle(const char* name, Shuffle kind, uint32_t mask, uint64_t value, unsigned operand, int width,
                 Site site) {
  const tsan::Unseen unseen;
  Block& block = running(name, site);
  if (width < 1 || width > static_cast<int>(kLanes) || (width & (width - 1)) != 0) {
    block.fail(std::string(name) + ": expected a width of 1, 2, 4, 8, 16 or 32, got " + std::to_string(width), site);
  }
  const Gathered& gathered = gather(name, mask, value, site);
  const int lane = static_cast<int>(block.current().linear % kLanes);
  const int first = lane & ~(width - 1), last = first + width - 1;
  const int steps = static_cast<int>(operand & (kLanes - 1));
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex:
      source = first | (steps & (width - 1));
      break;
    case Shuffle::kUp:
      source = lane - steps >= first ? lane - steps : lane;
      break;
    case Shuffle::kDown:
      source = lane + steps <= last ? lane + steps : lane;
      break;
    case Shuffle::kXor:
      source = (lane ^ steps) <= last ? lane ^ steps : lane;
      break;
  }
  if ((gathered.lanes >> source & 1) == 0) {
    std::ostringstream message;
    message << name << ": lane " << lane << " reads lane " << source << ", which ";
    if ((mask >> source & 1) != 0) {
      message << "has returned or does not exist";
    } else {
      message << "is not in the mask 0x" << std::hex << mask;
    }
    block.fail(message.str(), site);
  }
  return gathered.value[source];
}

uint32_t ballot(const char* name, uint32_t mask, bool predicate, Site site) {
  const tsan::Unseen unseen;
  const Gathered& gathered = gather(name, mask, predicate, site);
  uint32_t lanes = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) lanes |= static_cast<uint32_t>(gathered.value[lane] != 0) << lane;
  return lanes & gathered.lanes;
}

uint32_t match(const char* name, uint32_t mask, uint64_t value, Site site) {
  const tsan::Unseen unseen;
  const Gathered& gathered = gather(name, mask, value, site);
  uint32_t lanes = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    lanes |= static_cast<uint32_t>(gathered.value[lane] == value) << lane;
  }
  return lanes & gathered.lanes;
}

}  // namespace cuda_on_cpu
