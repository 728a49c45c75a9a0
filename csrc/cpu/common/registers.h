// One function per instruction set, each with vectors of its registers' width, the best chosen at the first call. It is

// there.
#pragma once

#include "cpu/common/clones.h"

namespace transkd {

inline int register_bytes() {
#ifdef TRANSKD_HAS_CLONES
  static const int here = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("x86-64-v4") ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
  }();
  return here;
#else
  return 16;
#endif
}

}  // namespace transkd

// Defines `Result name(Arguments)` that calls `loop<bytes>(arguments)`; Arguments is one type.
#ifdef TRANSKD_HAS_CLONES
#define TRANSKD_BY_REGISTERS(Result, name, Arguments, loop)                                                   \
  static Result name##_usual(Arguments arguments) { return loop<16>(arguments); }                             \
  __attribute__((target("arch=x86-64-v3"))) static Result name##_v3(Arguments arguments) {                    \
    return loop<32>(arguments);                                                                               \
  }                                                                                                           \
  __attribute__((target("arch=x86-64-v4"))) static Result name##_v4(Arguments arguments) {                    \
    return loop<64>(arguments);                                                                               \
  }                                                                                                           \
  static Result name(Arguments arguments) {                                                                   \
    const int bytes = register_bytes();                                                                       \
    return bytes == 64 ? name##_v4(arguments) : bytes == 32 ? name##_v3(arguments) : name##_usual(arguments); \
  }
#else
#define TRANSKD_BY_REGISTERS(Result, name, Arguments, loop) \
  static Result name(Arguments arguments) { return loop<16>(arguments); }
#endif
