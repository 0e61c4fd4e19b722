// CUDA's execution model on the host, for tests: as much of the language as g++ needs to compile the
// project's .cu file. The threads of a block are coroutines that switch at __syncthreads; blocks run
// one after another. `reversed` reverses the order of threads and blocks, so that a kernel that
// depends on an order (a missing barrier) gives another result.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static thread_local

using std::max;
using std::min;
using __half = _Float16;

struct alignas(16) float4 {
  float x, y, z, w;
};

template <typename T>
inline T __ldg(const T* at) {
  return *at;
}
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half(float value) { return static_cast<__half>(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

namespace on_host {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
  Dim3 at(unsigned i) const { return {i % x, i / x % y, i / x / y}; }
};

}  // namespace on_host

inline thread_local on_host::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Dim3 thread;
  bool done = false;
};

using Body = void (*)(const void* arguments);

inline thread_local ucontext_t scheduler;
inline thread_local Fiber* running = nullptr;
inline thread_local Body body = nullptr;
inline thread_local const void* body_arguments = nullptr;

inline void enter() {
  body(body_arguments);
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

// Between two barriers every thread runs to the next one, or to its end.
inline void run_block_with_barriers(bool reversed) {
  constexpr size_t kStack = 64 * 1024;
  static thread_local std::vector<Fiber> fibers;
  const unsigned count = blockDim.count();
  if (fibers.size() < count) fibers.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.thread = blockDim.at(i);
    fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = fibers[reversed ? count - 1 - i : i];
      if (fiber.done) continue;
      running = &fiber;
      threadIdx = fiber.thread;
      swapcontext(&scheduler, &fiber.context);
      left |= !fiber.done;
    }
  }
  running = nullptr;
}

inline void run(Body kernel, const void* arguments, Dim3 grid, Dim3 block, bool barriers,
                bool reversed) {
  gridDim = grid;
  blockDim = block;
  body = kernel;
  body_arguments = arguments;
  for (unsigned b = 0; b < grid.count(); ++b) {
    blockIdx = grid.at(reversed ? grid.count() - 1 - b : b);
    if (barriers) {
      run_block_with_barriers(reversed);
      continue;
    }
    for (unsigned t = 0; t < block.count(); ++t) {
      threadIdx = block.at(reversed ? block.count() - 1 - t : t);
      kernel(arguments);
    }
  }
}

}  // namespace on_host

inline void __syncthreads() {
  if (!on_host::running) {
    std::fprintf(stderr, "a kernel declared without barriers reached __syncthreads\n");
    std::abort();
  }
  on_host::Fiber* self = on_host::running;
  swapcontext(&self->context, &on_host::scheduler);
}
