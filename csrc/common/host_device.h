// Functions that host code and, compiled by nvcc, kernels share.
#pragma once

#if defined(__CUDACC__)
#define TRANSKD_HOST_DEVICE __host__ __device__
#else
#define TRANSKD_HOST_DEVICE
#endif

#define TRANSKD_INLINE TRANSKD_HOST_DEVICE inline __attribute__((always_inline))
