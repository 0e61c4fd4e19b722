// preprocess: 8-bit RGB images of the network's size become its planar float input, exactly. Values
// stay 0..255: the normalisation is in the graph.
//
// preprocess_planes: decoded images, 8-bit YUV 4:2:0, become the same input: resized, converted to
// RGB, rotated upright, padded, and rounded to whole values, as libswscale does it in one pass. A
// sample of the result is the mean of the area that it covers; when an image grows, of an area of
// one sample, which is linear interpolation. Luma and chroma are averaged at their own resolutions,
// then converted: the conversion is linear, so only values out of RGB's range depend on the order.
//
// crops_to_bytes: mask crops 0..1 become bytes 0..255, rounded to the nearest, halves to even, so
// that only a quarter of the bytes is downloaded.
//
// A thread of preprocess makes 4 pixels: it reads 12 bytes and writes three runs of 16. For one
// 800x1344 image 3.2 MB are read and 12.9 MB written: bound by memory, floor 54 us on an L4
// (300 GB/s), 16 us on an RTX 4090 (1008 GB/s). A thread of preprocess_planes makes a pixel;
// neighbours read the same rows, which the cache holds. For 1080p to 800x1344, 3.1 MB are read and
// 12.9 MB written: floor 53 us and 16 us. Not measured on a GPU.
#include "arguments.h"
#include "device.cuh"

// grid (ceil(pixels / 1024), images), block (256)
extern "C" __global__ void preprocess(const __grid_constant__ maskcast::PreprocessArguments a) {
  const int group = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (group >= a.pixels / 4) return;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(a.images[blockIdx.y]) + 3 * group;
  const uint32_t first = __ldg(words), second = __ldg(words + 1), third = __ldg(words + 2);
  // Little-endian words: R0 G0 B0 R1 | G1 B1 R2 G2 | B2 R3 G3 B3.
  const auto byte = [](uint32_t word, int i) { return static_cast<float>(word >> 8 * i & 255u); };
  const int64_t plane = a.pixels / 4;
  float4* out = reinterpret_cast<float4*>(a.inputs) + 3 * plane * blockIdx.y + group;
  out[0] = {byte(first, 0), byte(first, 3), byte(second, 2), byte(third, 1)};
  out[plane] = {byte(first, 1), byte(second, 0), byte(second, 3), byte(third, 2)};
  out[2 * plane] = {byte(first, 2), byte(second, 1), byte(third, 0), byte(third, 3)};
}

namespace maskcast {

// The samples that a sample of the result covers along one axis: from `first` to `last`, where
// those at both ends count in part. Outside the image, its border is repeated.
struct Cover {
  int first, last;
  float low, high;

  // `scale`: samples of the source for one of the result.
  __device__ Cover(int at, float scale, float shift) {
    const float half = 0.5f * fmaxf(scale, 1.f), centre = (at + 0.5f) * scale + shift;
    low = centre - half;
    high = centre + half;
    first = static_cast<int>(floorf(low));
    last = static_cast<int>(ceilf(high)) - 1;
  }
  __device__ float weight(int i) const { return fminf(i + 1.f, high) - fmaxf(i, low); }
};

__device__ __forceinline__ int clamp(int i, int count) { return min(max(i, 0), count - 1); }

__device__ __forceinline__ float mean(const uint8_t* plane, int height, int width, int step,
                                      const Cover& rows, const Cover& columns) {
  float sum = 0.f;
  for (int y = rows.first; y <= rows.last; ++y) {
    const uint8_t* row = plane + static_cast<int64_t>(clamp(y, height)) * width * step;
    float in_row = 0.f;
    for (int x = columns.first; x <= columns.last; ++x) {
      in_row += columns.weight(x) * __ldg(row + clamp(x, width) * step);
    }
    sum += rows.weight(y) * in_row;
  }
  return sum / ((rows.high - rows.low) * (columns.high - columns.low));
}

// Rounded to a whole value of 0..255.
__device__ __forceinline__ float level(float value) {
  return rintf(fminf(fmaxf(value, 0.f), 255.f));
}

}  // namespace maskcast

// grid (ceil(width / 32), ceil(height / 8), images), block (32, 8)
extern "C" __global__ void preprocess_planes(const __grid_constant__ maskcast::PlanesArguments a) {
  using maskcast::Cover;
  const int x = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int y = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
  if (x >= a.width || y >= a.height) return;
  const maskcast::Planes& image = a.images[blockIdx.z];
  const int64_t plane = static_cast<int64_t>(a.height) * a.width;
  float* out = a.inputs + 3 * plane * blockIdx.z + static_cast<int64_t>(y) * a.width + x;
  const int height = image.content_height, width = image.content_width;
  if (x >= width || y >= height) {
    out[0] = out[plane] = out[2 * plane] = a.pad_value;
    return;
  }
  // The pixel's position before the rotation, in an image of `rows` times `columns`.
  const bool is_sideways = image.turns % 2 != 0;
  const int rows = is_sideways ? width : height, columns = is_sideways ? height : width;
  int row = is_sideways ? x : y, column = is_sideways ? y : x;
  if (image.turns == 2 || image.turns == 3) row = rows - 1 - row;
  if (image.turns == 1 || image.turns == 2) column = columns - 1 - column;

  const int chroma_height = (image.height + 1) / 2, chroma_width = (image.width + 1) / 2;
  const float luma = maskcast::mean(
      image.luma, image.height, image.width, 1,
      Cover(row, static_cast<float>(image.height) / static_cast<float>(rows), 0.f),
      Cover(column, static_cast<float>(image.width) / static_cast<float>(columns), 0.f));
  const Cover chroma_rows(row, static_cast<float>(chroma_height) / static_cast<float>(rows), 0.f);
  const Cover chroma_columns(
      column, static_cast<float>(chroma_width) / static_cast<float>(columns), image.chroma_shift);
  const float u = -128.f + maskcast::mean(image.u, chroma_height, chroma_width, image.step,
                                          chroma_rows, chroma_columns);
  const float v = -128.f + maskcast::mean(image.v, chroma_height, chroma_width, image.step,
                                          chroma_rows, chroma_columns);
  const float grey = image.luma_scale * (luma - image.luma_offset);
  out[0] = maskcast::level(grey + image.v_to_red * v);
  out[plane] = maskcast::level(grey + image.u_to_green * u + image.v_to_green * v);
  out[2 * plane] = maskcast::level(grey + image.u_to_blue * u);
}

// grid (ceil(values / 1024)), block (256)
extern "C" __global__ void crops_to_bytes(const __grid_constant__ maskcast::CropsArguments a) {
  const int group = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (group >= a.values / 4) return;
  const float4 masks = __ldg(reinterpret_cast<const float4*>(a.masks) + group);
  // A NaN becomes 0: fmaxf returns the other operand.
  const auto byte = [](float value, int i) {
    const float scaled = fminf(fmaxf(value * 255.f, 0.f), 255.f);
    return static_cast<uint32_t>(__float2int_rn(scaled)) << 8 * i;
  };
  reinterpret_cast<uint32_t*>(a.crops)[group] =
      byte(masks.x, 0) | byte(masks.y, 1) | byte(masks.z, 2) | byte(masks.w, 3);
}
