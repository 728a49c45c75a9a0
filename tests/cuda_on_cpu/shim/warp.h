// Shuffles and votes. They exchange registers and order no memory accesses.
#pragma once

#include <cstdint>
#include <cstring>

#include "launch.h"

namespace cuda_on_cpu {

constexpr unsigned kLanes = 32;

// What the lanes of a mask that are still running have brought to a meeting.
struct Gathered {
  uint32_t lanes = 0;
  uint64_t value[kLanes] = {};
};
// Waits until all running lanes of the mask have come with the same call, then returns what they brought.
const Gathered& gather(const char* name, uint32_t mask, uint64_t value, Site site);

enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(const char* name, Shuffle kind, uint32_t mask, uint64_t value, unsigned operand, int width, Site site);
uint32_t ballot(const char* name, uint32_t mask, bool predicate, Site site);
uint32_t match(const char* name, uint32_t mask, uint64_t value, Site site);
uint32_t running_lanes();

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  using namespace cuda_on_cpu;
  return unpack<T>(
      shuffle("__shfl_sync", Shuffle::kIndex, mask, pack(value), static_cast<unsigned>(lane), width, site));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  using namespace cuda_on_cpu;
  return unpack<T>(shuffle("__shfl_up_sync", Shuffle::kUp, mask, pack(value), delta, width, site));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  using namespace cuda_on_cpu;
  return unpack<T>(shuffle("__shfl_down_sync", Shuffle::kDown, mask, pack(value), delta, width, site));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  using namespace cuda_on_cpu;
  return unpack<T>(
      shuffle("__shfl_xor_sync", Shuffle::kXor, mask, pack(value), static_cast<unsigned>(lane_mask), width, site));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::ballot("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::ballot("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::ballot("__all_sync", mask, predicate == 0, site) == 0;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::match("__match_any_sync", mask, cuda_on_cpu::pack(value), site);
}

// On a GPU these are the lanes that happen to run together; here, all lanes of the warp that have not returned.
inline unsigned __activemask() { return cuda_on_cpu::running_lanes(); }
