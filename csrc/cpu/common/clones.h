// Function multiversioning: the same loop compiled for several instruction sets, the best one taken at load time. It
// gives the speed of -march=native without its illegal instructions on an older machine.
//
// Use it on small non-template functions with branch-free loops. The generic x86-64 levels are named because the names
// of Intel's architectures do not match AMD's processors.
//
// The choice at load time is an ifunc, which glibc has and musl lacks.
#pragma once

#include <cstdlib>  // defines __GLIBC__ where the C library is glibc

#include "common/host_device.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12 && !defined(TRANSKD_NO_CLONES)
#define TRANSKD_HAS_CLONES 1
#define TRANSKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define TRANSKD_CLONE_NAMES "x86-64-v4, x86-64-v3, default"
#else
#define TRANSKD_CLONES
#define TRANSKD_CLONE_NAMES "default"
#endif
