#include "block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sstream>

#include "sanitizers.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

// Making an identity takes ThreadSanitizer a millisecond, so blocks take turns with two sets of them. An identity still
// knows what it learned two blocks ago, so races between blocks that used the same set are not seen; the order of
// blocks is shuffled, and blocks that follow one another have different sets.
void* identity_of(unsigned block, size_t thread) {
  static std::vector<void*> sets[2];
  std::vector<void*>& identities = sets[block % 2];
  while (identities.size() <= thread) identities.push_back(tsan::create());
  return identities[thread];
}

std::string text(uint3 index) {
  std::ostringstream out;
  out << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return out.str();
}

std::string text(Site site) {
  std::ostringstream out;
  out << site.file << ":" << site.line << " in " << site.function;
  return out.str();
}

bool same_call(const Thread& a, const Thread& b) {
  return a.site.line == b.site.line && std::strcmp(a.name, b.name) == 0 && std::strcmp(a.site.file, b.site.file) == 0;
}

std::string state_of(const Thread& thread) {
  std::ostringstream out;
  if (thread.state == Thread::State::kReturned) {
    out << "returned from the kernel";
  } else {
    out << "waits at " << thread.name;
    if (thread.state == Thread::State::kInWarp) out << " with mask 0x" << std::hex << thread.mask << std::dec;
    out << ", " << text(thread.site);
  }
  return out.str();
}

}  // namespace

Block* Block::running = nullptr;

Block::Block(Grid& grid, uint3 index, Stacks& stacks)
    : grid_(grid), index_(index), stacks_(stacks), threads_(stacks.count()), scheduler_identity_(tsan::current()) {
  running = this;
  blockIdx = index;
  blockDim = grid.block;
  gridDim = grid.grid;
  if (const char* problem = prepare_shared_memory(grid.dynamic_shared_bytes)) fail(problem, grid.site);
  unsigned linear = 0;
  for (Thread& thread : threads_) {
    thread.linear = linear++;
    thread.index = {thread.linear % blockDim.x, thread.linear / blockDim.x % blockDim.y,
                    thread.linear / blockDim.x / blockDim.y};
  }
}

Block::~Block() { running = nullptr; }

void Block::run() {
  tsan::release(&begin_);
  for (Thread& thread : threads_) {
    thread.fiber.start(stacks_.stack(thread.linear), Stacks::kBytes, identity_of(grid_.blocks_run, thread.linear),
                       &Block::begin_thread, this);
  }
  ++grid_.blocks_run;
  std::vector<unsigned> order(threads_.size());
  std::iota(order.begin(), order.end(), 0u);
  while (returned_ < threads_.size()) {
    std::shuffle(order.begin(), order.end(), grid_.random);
    bool progress = false;
    for (unsigned i : order) {
      if (threads_[i].state != Thread::State::kReady) continue;
      resume(threads_[i]);
      progress = true;
    }
    for (unsigned warp = 0; warp * kLanes < threads_.size(); ++warp) progress |= release_warp(warp);
    progress |= release_block();
    if (!progress) report_deadlock();
  }
  current_ = nullptr;
  if (!dynamic_shared_memory_is_intact(grid_.dynamic_shared_bytes)) {
    fail("the block wrote past its " + std::to_string(grid_.dynamic_shared_bytes) + " bytes of dynamic shared memory",
         grid_.site);
  }
}

void Block::resume(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
  thread.fiber.resume();
  if (!stacks_.intact(thread.linear)) fail("the thread has overrun its stack on the CPU", thread.site);
}

void Block::begin_thread(void* block) {
  Block& self = *static_cast<Block*>(block);
  tsan::acquire(&self.begin_);
  self.grid_.body();
  Thread& thread = *self.current_;
  tsan::release(&self.grid_.end);
  thread.state = Thread::State::kReturned;
  ++self.returned_;
  thread.fiber.leave_for_good();
}

void Block::wait(Thread::State state, Meetings* meetings) {
  Thread& thread = *current_;
  thread.state = state;
  if (meetings == nullptr) return thread.fiber.leave();
  const Token& token = meetings->token[meetings->generation % 2];
  tsan::release(&token);
  thread.fiber.leave();
  tsan::acquire(&token);
}

Votes Block::meet_block(const char* name, bool predicate, Site site) {
  Thread& thread = *current_;
  thread.name = name;
  thread.site = site;
  thread.value = predicate;
  wait(Thread::State::kAtBlockBarrier, &barrier_);
  return votes_;
}

bool Block::release_block() {
  const Thread& first = threads_.front();
  for (const Thread& thread : threads_) {
    if (thread.state != Thread::State::kAtBlockBarrier || !same_call(thread, first)) return false;
  }
  votes_ = {};
  std::vector<Thread*> all;
  for (Thread& thread : threads_) {
    votes_.yes += thread.value != 0;
    ++votes_.all;
    all.push_back(&thread);
    thread.state = Thread::State::kReady;
  }
  share_fences(all, true);
  ++barrier_.generation;
  return true;
}

const Gathered& Block::meet_warp(const char* name, uint32_t mask, uint64_t value, bool orders_memory, Site site) {
  Thread& thread = *current_;
  if ((mask >> thread.linear % kLanes & 1) == 0) {
    std::ostringstream message;
    message << name << ": lane " << thread.linear % kLanes << " calls it with mask 0x" << std::hex << mask
            << ", which does not name that lane";
    fail(message.str(), site);
  }
  thread.name = name;
  thread.site = site;
  thread.mask = mask;
  thread.value = value;
  thread.orders_memory = orders_memory;
  wait(Thread::State::kInWarp, orders_memory ? &warp_meetings_[{thread.linear / kLanes, mask}] : nullptr);
  return thread.gathered;
}

// A meeting takes place when every lane of its mask that has not returned waits in the same call with that mask.
bool Block::release_warp(unsigned warp) {
  const unsigned begin = warp * kLanes, end = std::min<unsigned>(begin + kLanes, threads_.size());
  bool progress = false;
  for (unsigned i = begin; i < end; ++i) {
    Thread& first = threads_[i];
    if (first.state != Thread::State::kInWarp) continue;
    Gathered gathered;
    std::vector<Thread*> lanes;
    bool complete = true;
    for (unsigned j = begin; j < end; ++j) {
      Thread& other = threads_[j];
      if ((first.mask >> (j - begin) & 1) == 0 || other.state == Thread::State::kReturned) continue;
      complete &= other.state == Thread::State::kInWarp && other.mask == first.mask && same_call(other, first);
      gathered.lanes |= 1u << (j - begin);
      gathered.value[j - begin] = other.value;
      lanes.push_back(&other);
    }
    if (!complete) continue;
    for (Thread* lane : lanes) {
      lane->gathered = gathered;
      lane->state = Thread::State::kReady;
    }
    if (first.orders_memory) {
      share_fences(lanes, false);
      ++warp_meetings_[{warp, first.mask}].generation;
    }
    progress = true;
  }
  return progress;
}

uint32_t Block::running_lanes() const {
  const unsigned begin = current_->linear / kLanes * kLanes;
  uint32_t lanes = 0;
  for (unsigned lane = 0; lane < kLanes && begin + lane < threads_.size(); ++lane) {
    if (threads_[begin + lane].state != Thread::State::kReturned) lanes |= 1u << lane;
  }
  return lanes;
}

void Block::fail(const std::string& message, Site site) const {
  std::fprintf(stderr, "cuda_on_cpu: %s\n  at %s\n", message.c_str(), text(site).c_str());
  std::fprintf(stderr, "  block %s", text(index_).c_str());
  if (current_ != nullptr) std::fprintf(stderr, ", thread %s", text(current_->index).c_str());
  std::fprintf(stderr, ", of the kernel launched at %s\n", text(grid_.site).c_str());
  std::_Exit(3);
}

void Block::report_deadlock() const {
  std::vector<std::pair<std::string, std::vector<const Thread*>>> states;
  bool barrier = false, returned = false;
  for (const Thread& thread : threads_) {
    const std::string state = state_of(thread);
    if (states.empty() || states.back().first != state) states.push_back({state, {}});
    states.back().second.push_back(&thread);
    barrier |= thread.state == Thread::State::kAtBlockBarrier;
    returned |= thread.state == Thread::State::kReturned;
  }
  const char* what = !barrier   ? "lanes that a mask names do not come with the same call and mask"
                     : returned ? "divergent barrier: some threads wait while others have returned"
                                : "divergent barrier: not all threads of the block come to the same one";
  std::fprintf(stderr, "cuda_on_cpu: %s\n  block %s of the kernel launched at %s\n", what, text(index_).c_str(),
               text(grid_.site).c_str());
  constexpr size_t kLines = 40;
  for (size_t i = 0; i < std::min(states.size(), kLines); ++i) {
    const auto& [state, threads] = states[i];
    std::fprintf(stderr, "  thread %s", text(threads.front()->index).c_str());
    if (threads.size() > 1) std::fprintf(stderr, " to %s", text(threads.back()->index).c_str());
    std::fprintf(stderr, " %s\n", state.c_str());
  }
  if (states.size() > kLines) std::fprintf(stderr, "  and %zu lines more\n", states.size() - kLines);
  std::_Exit(3);
}

}  // namespace cuda_on_cpu
