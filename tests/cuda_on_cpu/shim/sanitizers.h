// What the sanitizers must be told about fibers and memory. Without them all of it is empty.
// The runtime itself is compiled without instrumentation; runner.py names the sanitizer that drivers have.
#pragma once

#include <cstddef>

#if defined(CUDA_ON_CPU_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

// An identity is what ThreadSanitizer takes for a thread. A token is any address: acquire() orders all that was done
// before the releases of that token before all that the current identity does from now on.
namespace tsan {

#if defined(CUDA_ON_CPU_TSAN)
constexpr bool kOn = true;
inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
inline void destroy(void* identity) { __tsan_destroy_fiber(identity); }
inline void switch_to(void* identity) { __tsan_switch_to_fiber(identity, 1); }  // 1: orders nothing
inline void acquire(const void* token) { __tsan_acquire(const_cast<void*>(token)); }
inline void release(const void* token) { __tsan_release(const_cast<void*>(token)); }

// While it lives, ThreadSanitizer does not see what the current identity reads and writes: the runtime's own memory,
// which malloc and memcpy would report, is used by all identities in turn.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
constexpr bool kOn = false;
struct Unseen {
  Unseen() {}  // not trivial: an object that only lives is no unused variable
};
inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void switch_to(void*) {}
inline void acquire(const void*) {}
inline void release(const void*) {}
#endif

}  // namespace tsan

namespace asan {

#if defined(CUDA_ON_CPU_ASAN)
inline void start_switch(void** fake_stack, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
}
inline void finish_switch(void* fake_stack, const void** bottom, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, bottom, bytes);
}
inline void forbid(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void allow(const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

}  // namespace asan
}  // namespace cuda_on_cpu
