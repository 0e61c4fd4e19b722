// preprocess: 8-bit RGB images of the network's size become its planar float input, exactly. Values
// stay 0..255: the normalisation is in the graph. libswscale has resized them on the way from the
// camera's pixel format.
//
// crops_to_bytes: mask crops 0..1 become bytes 0..255, rounded to the nearest, halves to the even
// one, so that a quarter of the bytes comes down.
//
// A thread of preprocess makes 4 pixels: it reads 12 bytes and writes three runs of 16. For one
// 800x1344 image 3.2 MB are read and 12.9 MB written: bound by memory, floor 54 us on an L4
// (300 GB/s), 16 us on an RTX 4090 (1008 GB/s). Not measured on a GPU.
#include "arguments.h"
#include "device.cuh"

// grid (ceil(pixels / 1024), pictures), block (256)
extern "C" __global__ void preprocess(const __grid_constant__ maskcast::PreprocessArguments a) {
  const int group = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (group >= a.pixels / 4) return;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(a.pictures[blockIdx.y]) + 3 * group;
  const uint32_t first = __ldg(words), second = __ldg(words + 1), third = __ldg(words + 2);
  // Little-endian words: R0 G0 B0 R1 | G1 B1 R2 G2 | B2 R3 G3 B3.
  const auto byte = [](uint32_t word, int i) { return static_cast<float>(word >> 8 * i & 255u); };
  const int64_t plane = a.pixels / 4;
  float4* out = reinterpret_cast<float4*>(a.images) + 3 * plane * blockIdx.y + group;
  out[0] = {byte(first, 0), byte(first, 3), byte(second, 2), byte(third, 1)};
  out[plane] = {byte(first, 1), byte(second, 0), byte(second, 3), byte(third, 2)};
  out[2 * plane] = {byte(first, 2), byte(second, 1), byte(third, 0), byte(third, 3)};
}

// grid (ceil(values / 1024)), block (256)
extern "C" __global__ void crops_to_bytes(const __grid_constant__ maskcast::CropsArguments a) {
  const int group = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (group >= a.values / 4) return;
  const float4 masks = __ldg(reinterpret_cast<const float4*>(a.masks) + group);
  // A NaN becomes 0: fmaxf takes the number.
  const auto byte = [](float value, int i) {
    const float scaled = fminf(fmaxf(value * 255.f, 0.f), 255.f);
    return static_cast<uint32_t>(__float2int_rn(scaled)) << 8 * i;
  };
  reinterpret_cast<uint32_t*>(a.crops)[group] =
      byte(masks.x, 0) | byte(masks.y, 1) | byte(masks.z, 2) | byte(masks.w, 3);
}
