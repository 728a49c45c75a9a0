// Atomic operations: relaxed, as on the GPU, where only a fence before and a fence after make them order other
// accesses.
#pragma once

#include <cstdint>
#include <cstring>

#include "launch.h"

namespace cuda_on_cpu {

// Tells the runtime, which keeps account of what fences order.
void note_atomic(const void* address);

template <class Bits, class T, class Change>
T atomic_change(T* address, const Change& change) {
  static_assert(sizeof(Bits) == sizeof(T));
  note_atomic(address);
  Bits* bits = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(bits, __ATOMIC_RELAXED), new_bits;
  T old_value;
  do {
    std::memcpy(&old_value, &old_bits, sizeof old_value);
    const T new_value = change(old_value);
    std::memcpy(&new_bits, &new_value, sizeof new_bits);
  } while (!__atomic_compare_exchange_n(bits, &old_bits, new_bits, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old_value;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(name, T, Bits, expression)                                         \
  inline T name(T* address, T value) {                                                        \
    return cuda_on_cpu::atomic_change<Bits>(address, [=](T old) -> T { return expression; }); \
  }
#define CUDA_ON_CPU_ATOMIC_INTEGER(name, expression)       \
  CUDA_ON_CPU_ATOMIC(name, int, uint32_t, expression)      \
  CUDA_ON_CPU_ATOMIC(name, unsigned, uint32_t, expression) \
  CUDA_ON_CPU_ATOMIC(name, unsigned long long, uint64_t, expression)
CUDA_ON_CPU_ATOMIC(atomicAdd, int, uint32_t,
                   static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
CUDA_ON_CPU_ATOMIC(atomicAdd, unsigned, uint32_t, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, unsigned long long, uint64_t, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, float, uint32_t, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, double, uint64_t, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, int, uint32_t,
                   static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
CUDA_ON_CPU_ATOMIC(atomicSub, unsigned, uint32_t, old - value)
CUDA_ON_CPU_ATOMIC(atomicInc, unsigned, uint32_t, old >= value ? 0u : old + 1u)
CUDA_ON_CPU_ATOMIC(atomicDec, unsigned, uint32_t, old == 0u || old > value ? value : old - 1u)
CUDA_ON_CPU_ATOMIC(atomicExch, float, uint32_t, ((void)old, value))
CUDA_ON_CPU_ATOMIC_INTEGER(atomicExch, ((void)old, value))
CUDA_ON_CPU_ATOMIC_INTEGER(atomicMin, old < value ? old : value)
CUDA_ON_CPU_ATOMIC_INTEGER(atomicMax, old < value ? value : old)
CUDA_ON_CPU_ATOMIC_INTEGER(atomicAnd, old& value)
CUDA_ON_CPU_ATOMIC_INTEGER(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC_INTEGER(atomicXor, old ^ value)
#undef CUDA_ON_CPU_ATOMIC_INTEGER
#undef CUDA_ON_CPU_ATOMIC

#define CUDA_ON_CPU_ATOMIC_CAS(T, Bits)                                                                         \
  inline T atomicCAS(T* address, T compare, T value) {                                                          \
    return cuda_on_cpu::atomic_change<Bits>(address, [=](T old) -> T { return old == compare ? value : old; }); \
  }
CUDA_ON_CPU_ATOMIC_CAS(int, uint32_t)
CUDA_ON_CPU_ATOMIC_CAS(unsigned, uint32_t)
CUDA_ON_CPU_ATOMIC_CAS(unsigned long long, uint64_t)
#undef CUDA_ON_CPU_ATOMIC_CAS
