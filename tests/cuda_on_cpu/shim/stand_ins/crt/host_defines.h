// The CUDA keywords as a host compiler is to see them. The toolkit has this header; the wheel with the runtime's
// headers, which torch installs, includes it but does not bring it.
#pragma once

#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __grid_constant__
#define __tile__
#define __tile_builtin__
#define __tile_global__
#define __nv_pure__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __specialization_static
#define __annotate__(attribute)
#define __location__(attribute)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_align__(bytes) __align__(bytes)
#undef __forceinline__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __inline_hint__
#define __thread__ __thread
#define __no_return__ __attribute__((noreturn))
#define __cluster_dims__(...)
#define __block_size__(...)
#define __maxnreg__(registers)
#define CUDARTAPI
#define CUDARTAPI_CDECL
