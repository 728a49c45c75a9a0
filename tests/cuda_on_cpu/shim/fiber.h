// One CUDA thread's thread of control: a stack of its own, entered and left by hand.
#pragma once

#include <ucontext.h>

#include <cstddef>

namespace cuda_on_cpu {

class Fiber {
 public:
  // From the scheduler: entry(argument) will run on the given stack, as the thread that ThreadSanitizer knows by that
  // identity. It must end with leave_for_good().
  void start(unsigned char* stack, size_t bytes, void* identity, void (*entry)(void*), void* argument);
  // From the scheduler: runs until the fiber leaves.
  void resume();
  // From the fiber: back to the scheduler, until it resumes.
  void leave();
  [[noreturn]] void leave_for_good();

 private:
  static void begin();
  void switch_to_scheduler(bool for_good);

  ucontext_t here_, scheduler_;
  unsigned char* stack_ = nullptr;
  size_t bytes_ = 0;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* identity_ = nullptr;
  void* scheduler_identity_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// The stacks of one block's fibers.
class Stacks {
 public:
  explicit Stacks(size_t count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  unsigned char* stack(size_t i) const { return memory_ + i * kBytes; }
  size_t count() const { return count_; }
  // Whether fiber i has stayed within its stack so far.
  bool intact(size_t i) const;

  static constexpr size_t kBytes = 256 << 10;  // sanitizers print their reports on the stack of the culprit

 private:
  size_t count_;
  unsigned char* memory_;
};

}  // namespace cuda_on_cpu
