// One block in flight: its threads, what they wait for, and what fences order between them and other blocks.
// Only the runtime includes this.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "barriers.h"
#include "fiber.h"
#include "launch.h"
#include "warp.h"

namespace cuda_on_cpu {

// ThreadSanitizer's tokens are addresses; these belong to nothing else.
using Token = char;

// Fences and atomics order memory only together (see memory_order.cpp). Per scope: what a thread's own fences publish,
// what others have fenced before a barrier, and what the thread saw through atomics and may rely on after a fence.
struct Fences {
  Token own[2] = {}, seen[2] = {};
  bool has_own[2] = {}, has_seen[2] = {};
  std::vector<const Token*> inherited[2];
  bool new_to_others = false;
};

// One atomic variable: what was published through it.
struct Published {
  Token token = 0;
  bool any = false;
};

// All meetings of the same threads. What threads do after one generation must not seem ordered before it, and a thread
// can be one generation ahead of another, so neighbouring generations have different tokens.
struct Meetings {
  Token token[2] = {};
  unsigned generation = 0;
};

struct Thread {
  enum class State { kReady, kAtBlockBarrier, kInWarp, kReturned };
  Fiber fiber;
  unsigned linear = 0;
  uint3 index = {};
  State state = State::kReady;
  // Of a wait.
  const char* name = "";
  Site site = {};
  uint32_t mask = 0;
  uint64_t value = 0;
  bool orders_memory = false;
  Gathered gathered;
  Fences fences;
};

// One launch: what all its blocks share.
struct Grid {
  dim3 grid, block;
  size_t dynamic_shared_bytes;
  const std::function<void()>& body;
  Site site;
  std::mt19937_64& random;
  Token end = 0;
  unsigned blocks_run = 0;
  std::map<const void*, Published> published = {};
};

class Block {
 public:
  Block(Grid& grid, uint3 index, Stacks& stacks);
  ~Block();
  void run();

  Votes meet_block(const char* name, bool predicate, Site site);
  const Gathered& meet_warp(const char* name, uint32_t mask, uint64_t value, bool orders_memory, Site site);
  void fence(Scope scope);
  void note_atomic(const void* address);
  uint32_t running_lanes() const;
  Thread& current() { return *current_; }
  // Ends the program: names the kernel's launch, the block and the thread that runs.
  [[noreturn]] void fail(const std::string& message, Site site) const;

  static Block* running;

 private:
  static void begin_thread(void* block);
  void resume(Thread& thread);
  bool release_warp(unsigned warp);
  bool release_block();
  [[noreturn]] void report_deadlock() const;
  void wait(Thread::State state, Meetings* meetings);
  void carry(const std::vector<const Token*>& from, const Token& to) const;
  void share_fences(const std::vector<Thread*>& threads, bool all_threads);

  Grid& grid_;
  uint3 index_;
  Stacks& stacks_;
  std::deque<Thread> threads_;
  Thread* current_ = nullptr;
  unsigned returned_ = 0;
  Votes votes_ = {};
  Token begin_ = 0;
  Meetings barrier_;
  std::map<std::pair<unsigned, uint32_t>, Meetings> warp_meetings_;  // by warp and mask
  std::map<const void*, Published> published_in_shared_;
  std::deque<Token> shared_fences_;
  void* scheduler_identity_;
};

}  // namespace cuda_on_cpu
