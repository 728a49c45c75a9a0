// What fences and atomics order, for ThreadSanitizer; without it this does nothing.
//
// An atomic operation alone orders nothing. As in the PTX memory model, thread A's earlier accesses come before thread
// B's later ones if A has a fence, then an atomic operation on x; and B an atomic operation on x that comes later, then
// a fence. __threadfence_block() does so only for atomics in shared memory, __threadfence() for all. A barrier shares
// the fences before it: what one thread of the block has fenced, any other may publish after the barrier.
#include "block.h"
#include "sanitizers.h"
#include "shared_memory.h"

namespace cuda_on_cpu {

// Adds to `to` what was released into `from`, and nothing of what the current thread did. The identity that carries it
// is made by the scheduler's, since a new one knows all that its maker knows.
void Block::carry(const std::vector<const Token*>& from, const Token& to) const {
  void* self = tsan::current();
  tsan::switch_to(scheduler_identity_);
  void* carrier = tsan::create();
  tsan::switch_to(carrier);
  for (const Token* token : from) tsan::acquire(token);
  tsan::release(&to);
  tsan::switch_to(self);
  tsan::destroy(carrier);
}

void Block::fence(Scope scope) {
  if (!tsan::kOn) return;
  Fences& fences = current_->fences;
  for (int s = 0; s <= static_cast<int>(scope); ++s) {
    if (fences.has_seen[s]) tsan::acquire(&fences.seen[s]);
    tsan::release(&fences.own[s]);
    fences.has_own[s] = true;
  }
  fences.new_to_others = true;
}

void Block::note_atomic(const void* address) {
  if (!tsan::kOn) return;
  Fences& fences = current_->fences;
  const bool shared = in_shared_memory(address);
  const int s = static_cast<int>(shared ? Scope::kBlock : Scope::kDevice);
  Published& through = (shared ? published_in_shared_ : grid_.published)[address];
  if (through.any) {
    carry({&through.token}, fences.seen[s]);
    fences.has_seen[s] = true;
  }
  std::vector<const Token*> fenced = fences.inherited[s];
  if (fences.has_own[s]) fenced.push_back(&fences.own[s]);
  if (!fenced.empty()) {
    carry(fenced, through.token);
    through.any = true;
  }
}

// After a block's barrier all its threads know of all fences, after a warp's only the threads of that warp.
void Block::share_fences(const std::vector<Thread*>& threads, bool all_threads) {
  if (!tsan::kOn) return;
  bool any = false;
  for (int s : {0, 1}) {
    std::vector<const Token*> fenced;
    for (Thread* thread : threads) {
      const Fences& fences = thread->fences;
      if (!fences.new_to_others) continue;
      if (fences.has_own[s]) fenced.push_back(&fences.own[s]);
      fenced.insert(fenced.end(), fences.inherited[s].begin(), fences.inherited[s].end());
    }
    if (fenced.empty()) continue;
    any = true;
    const Token& shared = shared_fences_.emplace_back();
    carry(fenced, shared);
    for (Thread* thread : threads) thread->fences.inherited[s].push_back(&shared);
  }
  if (any || all_threads) {
    for (Thread* thread : threads) thread->fences.new_to_others = !all_threads;
  }
}

}  // namespace cuda_on_cpu
