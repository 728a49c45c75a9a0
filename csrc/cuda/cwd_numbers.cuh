// The five numbers by which cwd's kernels know a softmax of student and teacher, or a part of it.
#pragma once

#include <cmath>

#include "cuda/cwd_plan.h"

namespace transkd {
namespace cwd {

__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

template <class T>
constexpr T kMinusInfinity = -static_cast<T>(INFINITY);

// What is subtracted for a maximum: -inf, the maximum of nothing, would make NaN of -inf.
template <class T>
__device__ __forceinline__ T base_of(T maximum) {
  return maximum == kMinusInfinity<T> ? T(0) : maximum;
}

// Maxima, sums of e = exp((x - maximum) / temperature), and A, the sum of e_t ((t - max_t) - (s - max_s)): then
// KL = A / (temperature z_t) + ln(z_s / z_t), and no large value is subtracted from another. NaN stays out of the
// maxima, as it does of max(), and comes into the sums. `inverse` is 1 / temperature, `rate` log2(e) times that.
template <class T>
struct Numbers {
  T max_s = kMinusInfinity<T>, z_s = 0, max_t = kMinusInfinity<T>, z_t = 0, a = 0;

  // For maxima that are no smaller.
  __device__ __forceinline__ void raise(T to_s, T to_t, T rate) {
    const T below_s = max_s - base_of(to_s), below_t = max_t - base_of(to_t);
    const T shrink = exp2_of(below_t * rate);
    z_s *= exp2_of(below_s * rate);
    z_t *= shrink;
    // A part without weight says nothing, however far the student's maximum has moved.
    a = z_t == 0 ? T(0) : a * shrink + z_t * (below_t - below_s);
    max_s = to_s;
    max_t = to_t;
  }

  // One entry, after raise(); base_of() the maxima.
  __device__ __forceinline__ void add(T s, T t, T base_s, T base_t, T rate) {
    const T below_s = s - base_s, below_t = t - base_t;
    const T e_t = exp2_of(below_t * rate);
    z_s += exp2_of(below_s * rate);
    z_t += e_t;
    // What has no weight counts for nothing, also where a difference is -inf.
    a += e_t == 0 ? T(0) : e_t * (below_t - below_s);
  }

  __device__ __forceinline__ void merge(Numbers other, T rate) {
    const T to_s = max(max_s, other.max_s), to_t = max(max_t, other.max_t);
    raise(to_s, to_t, rate);
    other.raise(to_s, to_t, rate);
    z_s += other.z_s;
    z_t += other.z_t;
    a += other.a;
  }

  __device__ __forceinline__ T divergence(T inverse) const { return a / z_t * inverse + log_of(z_s / z_t); }

  // Numbers lie `stride` apart.
  __device__ __forceinline__ void store(T* to, int64_t stride) const {
    to[0] = max_s;
    to[stride] = z_s;
    to[2 * stride] = max_t;
    to[3 * stride] = z_t;
    to[4 * stride] = a;
  }
  __device__ __forceinline__ void load(const T* from, int64_t stride) {
    max_s = from[0];
    z_s = from[stride];
    max_t = from[2 * stride];
    z_t = from[3 * stride];
    a = from[4 * stride];
  }
};

// Writes the statistics [4, softmaxes] of a sample, from one softmax's place in them; returns its divergence.
template <class T>
__device__ __forceinline__ T keep(const Numbers<T>& numbers, T* statistics, int64_t softmaxes, T inverse) {
  statistics[0] = numbers.max_s;
  statistics[softmaxes] = log_of(numbers.z_s);
  statistics[2 * softmaxes] = numbers.max_t;
  statistics[3 * softmaxes] = log_of(numbers.z_t);
  return numbers.divergence(inverse);
}

}  // namespace cwd
}  // namespace transkd
