// Fixed-width vectors as GCC and clang offer them, which stay in registers where an array of lanes would be spilled.
// Loops that are cloned for several instruction sets (clones.h) take them of 32 bytes: a vector wider than the
// registers is taken apart through memory, one that is narrower costs nothing where memory is the limit.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstring>

#include "clones.h"

namespace transkd {

// A vector of Bytes / sizeof(T) elements. Pass by reference only: by value their ABI depends on the instruction set.
template <class T, int Bytes = 32>
struct Vector {
  using Element = T;
  static constexpr int kSize = Bytes / sizeof(T);
  typedef T Lanes __attribute__((vector_size(Bytes)));
  Lanes lanes = {};

  TRANSKD_INLINE void load(const T* from) { std::memcpy(&lanes, from, Bytes); }
  TRANSKD_INLINE void store(T* to) const { std::memcpy(to, &lanes, Bytes); }

  // Stores past the cache, at a multiple of 16 bytes: large results are then written without being read first. Call
  // streamed() before another thread may read them.
  TRANSKD_INLINE void stream(T* to) const {
#if defined(__SSE2__)
    __m128i parts[Bytes / 16];
    std::memcpy(parts, &lanes, Bytes);
    for (int k = 0; k < Bytes / 16; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + k, parts[k]);
#else
    store(to);
#endif
  }

  // A vector of less than 16 bytes never streams.
  TRANSKD_INLINE void store(T* to, bool past_cache) const {
    if constexpr (Bytes >= 16) {
      if (past_cache) return stream(to);
    }
    store(to);
  }

  // The sum of all elements, by halves.
  TRANSKD_INLINE T sum() const {
    if constexpr (kSize == 1) {
      return lanes[0];
    } else {
      Vector<T, Bytes / 2> low, high;
      std::memcpy(&low.lanes, &lanes, Bytes / 2);
      std::memcpy(&high.lanes, reinterpret_cast<const char*>(&lanes) + Bytes / 2, Bytes / 2);
      low.lanes += high.lanes;
      return low.sum();
    }
  }
};

// Waits for what stream() wrote.
inline void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace transkd
