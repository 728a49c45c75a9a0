#include "shared_memory.h"

#include <link.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "launch.h"
#include "sanitizers.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kGuardBytes = 256;

struct Range {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
};

// The program's thread_local variables are in one piece, and the shim has none of its own.
Range shared_memory() {
  Range range;
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* result) {
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          if (object->dlpi_phdr[i].p_type == PT_TLS) {
            *static_cast<Range*>(result) = {static_cast<unsigned char*>(object->dlpi_tls_data),
                                            object->dlpi_phdr[i].p_memsz};
          }
        }
        return 1;  // the first object is the program itself
      },
      &range);
  return range;
}

struct Declared {
  void* (*address)();
  size_t capacity;
};

std::vector<Declared>& declared() {
  static std::vector<Declared> arrays;
  return arrays;
}

}  // namespace

DynamicShared::DynamicShared(void* (*address)(), size_t capacity) { declared().push_back({address, capacity}); }

bool in_shared_memory(const void* address) {
  const Range range = shared_memory();
  return address >= range.begin && address < range.begin + range.bytes;
}

const char* prepare_shared_memory(size_t dynamic_bytes) {
  if (dynamic_bytes > 0 && declared().empty()) {
    return "the launch asks for dynamic shared memory, but the driver has no CUDA_ON_CPU_DYNAMIC_SHARED";
  }
  const Range range = shared_memory();
  asan::allow(range.begin, range.bytes);
  if (range.bytes > 0) std::memset(range.begin, 0xff, range.bytes);
  for (const Declared& array : declared()) {
    if (dynamic_bytes > array.capacity) return "the launch asks for more dynamic shared memory than a block can have";
    asan::forbid(static_cast<unsigned char*>(array.address()) + dynamic_bytes, array.capacity - dynamic_bytes);
  }
  return nullptr;
}

bool dynamic_shared_memory_is_intact(size_t dynamic_bytes) {
  return std::all_of(declared().begin(), declared().end(), [&](const Declared& array) {
    const unsigned char* end = static_cast<unsigned char*>(array.address()) + dynamic_bytes;
    return std::all_of(end, end + std::min(kGuardBytes, array.capacity - dynamic_bytes),
                       [](unsigned char byte) { return byte == 0xff; });
  });
}

}  // namespace cuda_on_cpu
