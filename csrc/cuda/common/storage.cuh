// Storage types and how kernels read and write them: up to 16 bytes at a time, computing in float (double for double).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cuda/common/storage_type.h"

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
