// The memory that __shared__ variables live in.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

// The calling host thread's copy of all __shared__ variables, and whether an address lies in it.
bool in_shared_memory(const void* address);

// Fills it with 0xff bytes (NaNs in all floating types) and forbids AddressSanitizer's programs to touch dynamic shared
// memory past the launch's size. Says why not if the launch asks for more than there is, else returns nullptr.
const char* prepare_shared_memory(size_t dynamic_bytes);

// Whether the block has left the memory past its dynamic shared memory alone.
bool dynamic_shared_memory_is_intact(size_t dynamic_bytes);

}  // namespace cuda_on_cpu
