// Declarations that depend on the compiler: nvcc for a GPU, g++ with the tests' header for the host.
#pragma once

#ifdef MASKCAST_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_fp16.h>

#include <cstdint>
#endif

namespace maskcast {

// Features are read-only for a whole launch, so they go through the non-coherent cache.
__device__ __forceinline__ float load(const float* at) { return __ldg(at); }
__device__ __forceinline__ float load(const __half* at) { return __half2float(__ldg(at)); }

__device__ __forceinline__ void store(float* at, float value) { *at = value; }
__device__ __forceinline__ void store(__half* at, float value) { *at = __float2half(value); }

}  // namespace maskcast
