// Storage types and how kernels read and write them: up to 16 bytes at a time, computing in float (double for double).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "common/storage_type.h"

namespace transkd {

// The type in which maps stored as A and B are computed.
template <class A, class B = A>
using ComputeType = std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;

// Elements that one access of 16 bytes brings, for maps stored as A and B side by side.
template <class A, class B = A>
constexpr int kVectorWidth = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Round to nearest even.
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(double value, double& to) { to = value; }
__device__ __forceinline__ void narrow(float value, __half& to) { to = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

namespace detail {

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

}  // namespace detail

// N elements that travel together.
template <class S, int N>
struct Pack {
  S element[N];

  // One instruction; more than 16 bytes take several. `from` is aligned to the pack, or to 16 bytes.
  __device__ __forceinline__ void load(const S* __restrict__ from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const Word word = __ldg(reinterpret_cast<const Word*>(from) + i);
      std::memcpy(reinterpret_cast<char*>(element) + i * sizeof(Word), &word, sizeof(Word));
    }
  }

  __device__ __forceinline__ void store(S* __restrict__ to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      Word word;
      std::memcpy(&word, reinterpret_cast<const char*>(element) + i * sizeof(Word), sizeof(Word));
      reinterpret_cast<Word*>(to)[i] = word;
    }
  }

  __device__ __forceinline__ void clear() { std::memset(static_cast<void*>(element), 0, sizeof(element)); }

 private:
  static constexpr int kBytes = sizeof(S) * N;
  static constexpr int kWords = kBytes <= 16 ? 1 : kBytes / 16;
  using Word = typename detail::Word<kBytes <= 16 ? kBytes : 16>::type;
};

// The same, kept as it comes: halves stay two to a register, where Pack's elements take one each as soon as a load
// hangs on a condition.
template <class S, int N>
struct Packed {
  using T = ComputeType<S>;

  __device__ __forceinline__ void load(const S* __restrict__ from) {
    Pack<Word, kWords> words;
    words.load(reinterpret_cast<const Word*>(from));
    std::memcpy(word_, words.element, sizeof(word_));
  }
  __device__ __forceinline__ void store(S* __restrict__ to) const {
    Pack<Word, kWords> words;
    std::memcpy(words.element, word_, sizeof(word_));
    words.store(reinterpret_cast<Word*>(to));
  }
  __device__ __forceinline__ void clear() { std::memset(word_, 0, sizeof(word_)); }

  __device__ __forceinline__ T get(int i) const {
    if constexpr (kElements == 2) {
      std::conditional_t<std::is_same_v<S, __half>, __half2, __nv_bfloat162> pair;
      std::memcpy(static_cast<void*>(&pair), word_ + i / 2, sizeof(Word));
      return i % 2 ? __high2float(pair) : __low2float(pair);
    } else {
      S element;
      std::memcpy(static_cast<void*>(&element), word_ + i, sizeof(Word));
      return widen(element);
    }
  }
  __device__ __forceinline__ void set(int i, T value) {
    S element;
    narrow(value, element);
    if constexpr (kElements == 2) {
      unsigned short bits;
      std::memcpy(&bits, &element, sizeof(bits));
      Word& word = word_[i / 2];
      word = i % 2 ? (word & 0xffffu) | static_cast<unsigned>(bits) << 16 : (word & 0xffff0000u) | bits;
    } else {
      std::memcpy(word_ + i, &element, sizeof(Word));
    }
  }

 private:
  static constexpr int kElements = sizeof(S) == 2 && N % 2 == 0 ? 2 : 1, kWords = N / kElements;
  using Word = std::conditional_t<sizeof(S) == 8, unsigned long long,
                                  std::conditional_t<kElements * sizeof(S) == 4, unsigned, unsigned short>>;
  Word word_[kWords];
};

// An element of a map whose storage type, one that is computed in T, is known at run time only.
template <class T>
__device__ __forceinline__ T load_as(const void* map, StorageType type, int64_t at) {
  if constexpr (std::is_same_v<T, double>) {
    return __ldg(static_cast<const double*>(map) + at);
  } else {
    if (type == StorageType::kFloat) return __ldg(static_cast<const float*>(map) + at);
    const unsigned short bits = __ldg(static_cast<const unsigned short*>(map) + at);
    __half half;
    __nv_bfloat16 bfloat16;
    std::memcpy(static_cast<void*>(&half), &bits, sizeof bits);
    std::memcpy(static_cast<void*>(&bfloat16), &bits, sizeof bits);
    return type == StorageType::kHalf ? widen(half) : widen(bfloat16);
  }
}

template <class T>
__device__ __forceinline__ void store_as(T value, void* map, StorageType type, int64_t at) {
  if constexpr (std::is_same_v<T, double>) {
    static_cast<double*>(map)[at] = value;
  } else {
    if (type == StorageType::kFloat) static_cast<float*>(map)[at] = value;
    if (type == StorageType::kHalf) narrow(value, static_cast<__half*>(map)[at]);
    if (type == StorageType::kBFloat16) narrow(value, static_cast<__nv_bfloat16*>(map)[at]);
  }
}

template <class S>
struct TypeTag {
  using type = S;
};

// Calls visit(TypeTag<S>()) for a storage type that is computed in T.
template <class T, class Visit>
void visit_storage(StorageType type, Visit visit) {
  if constexpr (std::is_same_v<T, double>) {
    if (type == StorageType::kDouble) return visit(TypeTag<double>());
  } else {
    if (type == StorageType::kFloat) return visit(TypeTag<float>());
    if (type == StorageType::kHalf) return visit(TypeTag<__half>());
    if (type == StorageType::kBFloat16) return visit(TypeTag<__nv_bfloat16>());
  }
  throw std::runtime_error("float64 does not mix with other dtypes");
}

}  // namespace transkd
