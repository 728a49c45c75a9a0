// What every CPU op asks of its tensors: reading storage types as the compute type.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/half.h"
#include "common/layout.h"

namespace transkd {

using torch::headeronly::ScalarType;

// row[i] = from[i] for half-precision storage, compiled for several instruction sets (convert.cpp).
void widen(const BFloat16* from, float* row, int64_t n);
void widen(const Half* from, float* row, int64_t n);
void narrow(const float* row, BFloat16* to, int64_t n);
void narrow(const float* row, Half* to, int64_t n);

inline bool is_narrow(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

// Reads runs of a tensor as the compute type; only half precision goes through a buffer.
template <class Compute>
class Reader {
 public:
  Reader(const Tensor& tensor) : data_(tensor.const_data_ptr()), type_(tensor.scalar_type()) {}

  // The room that a buffer for n elements needs.
  int64_t buffer(int64_t n) const { return is_narrow(type_) ? n : 0; }

  int64_t element_size() const { return is_narrow(type_) ? 2 : sizeof(Compute); }
  const void* at(int64_t offset) const { return static_cast<const char*>(data_) + offset * element_size(); }

  // Pointer to n elements from offset on; buffer must have room for n, if they are converted.
  const Compute* read(int64_t offset, int64_t n, Compute* buffer) const {
    if constexpr (sizeof(Compute) == sizeof(float)) {
      if (type_ == ScalarType::BFloat16) return widened<BFloat16>(offset, n, buffer);
      if (type_ == ScalarType::Half) return widened<Half>(offset, n, buffer);
    }
    return static_cast<const Compute*>(data_) + offset;
  }

 private:
  template <class Storage>
  const Compute* widened(int64_t offset, int64_t n, Compute* buffer) const {
    widen(static_cast<const Storage*>(data_) + offset, buffer, n);
    return buffer;
  }

  const void* data_;
  ScalarType type_;
};

// Writes runs of the compute type into a tensor: fill the pointer that place() gives, then call commit().
template <class Compute>
class Writer {
 public:
  Writer(const Tensor& tensor) : data_(tensor.mutable_data_ptr()), type_(tensor.scalar_type()) {}

  // Whether commit() converts, from a buffer.
  bool buffered() const { return is_narrow(type_); }

  // The room that a buffer for n elements needs.
  int64_t buffer(int64_t n) const { return buffered() ? n : 0; }

  Compute* place(int64_t offset, Compute* buffer) const {
    return buffered() ? buffer : static_cast<Compute*>(data_) + offset;
  }

  void commit(int64_t offset, int64_t n, const Compute* buffer) const {
    if constexpr (sizeof(Compute) == sizeof(float)) {
      if (type_ == ScalarType::BFloat16) narrow(buffer, static_cast<BFloat16*>(data_) + offset, n);
      if (type_ == ScalarType::Half) narrow(buffer, static_cast<Half*>(data_) + offset, n);
    }
  }

 private:
  void* data_;
  ScalarType type_;
};

// For a large new tensor: where the allocator has returned its memory, writing it first costs a page fault for every
// 4 KB, more than the pass itself. TRANSKD_FAST_HUGE_PAGES=0 leaves pages as they are: the memory stays marked when the
// allocator hands it on.
inline void use_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static const bool wanted = [] {
    const char* const setting = std::getenv("TRANSKD_FAST_HUGE_PAGES");
    return setting == nullptr || std::strcmp(setting, "0") != 0;
  }();
  if (!wanted) return;
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  const uintptr_t from = (begin + kHuge - 1) / kHuge * kHuge, to = end / kHuge * kHuge;
  // It is a hint: an error changes nothing.
  if (end - begin >= 2 * kHuge && from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace transkd
