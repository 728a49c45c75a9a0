// CUDA C++ for g++: included before a kernel header, it lets unmodified device code compile and run on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include "atomics.h"
#include "barriers.h"
#include "launch.h"
#include "math.h"
#include "memory.h"
#include "warp.h"

// The toolkit's headers leave most keywords empty for a host compiler. A block runs in one host thread, and threads of
// the same launch never run two blocks at once, so a thread_local variable is a block's shared memory; being in one
// piece, all of it can be filled with garbage before each block.
#undef __shared__
#define __shared__ thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __cluster_dims__
#define __cluster_dims__(...)
#undef __maxnreg__
#define __maxnreg__(...)
#undef __grid_constant__
#define __grid_constant__
