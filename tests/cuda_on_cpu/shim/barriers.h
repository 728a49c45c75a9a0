// Barriers and fences.
#pragma once

#include <cstdint>

#include "launch.h"

namespace cuda_on_cpu {

struct Votes {
  int yes, all;
};
// Waits for all threads of the block and counts the predicates among them.
Votes meet_block(const char* name, bool predicate, Site site);
void meet_warp(uint32_t mask, Site site);

enum class Scope { kBlock, kDevice };
void fence(Scope scope);

}  // namespace cuda_on_cpu

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::meet_block("__syncthreads", false, site);
}

inline int __syncthreads_count(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::meet_block("__syncthreads_count", predicate != 0, site).yes;
}

inline int __syncthreads_and(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  const cuda_on_cpu::Votes votes = cuda_on_cpu::meet_block("__syncthreads_and", predicate != 0, site);
  return votes.yes == votes.all;
}

inline int __syncthreads_or(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::meet_block("__syncthreads_or", predicate != 0, site).yes != 0;
}

// Unlike shuffles and votes it orders the memory accesses of its lanes.
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::meet_warp(mask, site);
}

inline void __threadfence_block() { cuda_on_cpu::fence(cuda_on_cpu::Scope::kBlock); }
inline void __threadfence() { cuda_on_cpu::fence(cuda_on_cpu::Scope::kDevice); }
inline void __threadfence_system() { cuda_on_cpu::fence(cuda_on_cpu::Scope::kDevice); }
