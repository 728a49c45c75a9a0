#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "sanitizers.h"

namespace cuda_on_cpu {
namespace {

Fiber* starting = nullptr;  // makecontext hands over no pointers
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11ull;

}  // namespace

void Fiber::start(unsigned char* stack, size_t bytes, void* identity, void (*entry)(void*), void* argument) {
  stack_ = stack;
  bytes_ = bytes;
  entry_ = entry;
  argument_ = argument;
  fake_stack_ = nullptr;
  identity_ = identity;
  scheduler_identity_ = tsan::current();
  getcontext(&here_);
  here_.uc_stack.ss_sp = stack;
  here_.uc_stack.ss_size = bytes;
  here_.uc_link = nullptr;
  makecontext(&here_, &Fiber::begin, 0);
}

void Fiber::begin() {
  Fiber* self = starting;
  asan::finish_switch(nullptr, &self->scheduler_stack_, &self->scheduler_stack_bytes_);
  self->entry_(self->argument_);
  std::abort();  // entry_ must not return
}

void Fiber::resume() {
  starting = this;
  void* fake_stack = nullptr;
  asan::start_switch(&fake_stack, stack_, bytes_);
  tsan::switch_to(identity_);
  swapcontext(&scheduler_, &here_);
  asan::finish_switch(fake_stack, nullptr, nullptr);
}

void Fiber::switch_to_scheduler(bool for_good) {
  asan::start_switch(for_good ? nullptr : &fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
  tsan::switch_to(scheduler_identity_);
  swapcontext(&here_, &scheduler_);
  asan::finish_switch(fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
}

void Fiber::leave() { switch_to_scheduler(false); }

void Fiber::leave_for_good() {
  switch_to_scheduler(true);
  std::abort();
}

Stacks::Stacks(size_t count) : count_(count) {
  void* memory =
      mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  memory_ = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < count; ++i) std::memcpy(stack(i), &kCanary, sizeof kCanary);
}

Stacks::~Stacks() { munmap(memory_, count_ * kBytes); }

bool Stacks::intact(size_t i) const { return std::memcmp(stack(i), &kCanary, sizeof kCanary) == 0; }

}  // namespace cuda_on_cpu
