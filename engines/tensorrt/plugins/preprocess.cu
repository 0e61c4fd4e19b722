// Preprocess: a batch of 8-bit pictures, resized and padded, as the network's planar float input.
//
// Truth is torch.nn.functional.interpolate(mode="bilinear", align_corners=False, antialias=False), as
// torchvision's GeneralizedRCNNTransform resizes; a picture that has its size already is only
// converted, exactly. Values stay 0..255: the normalisation is in the graph.
//
// One thread makes one pixel of the network's input: 32 neighbours read 96 contiguous bytes (or four
// such runs when resizing) and write three contiguous runs of 128.
//
// Cost for one 800x1344 image without resizing: 3.2 MB read, 12.9 MB written (fp32; fp16 6.5 MB),
// 20 operations a pixel. Floor 54 us on an L4 (300 GB/s), 16 us on an RTX 4090 (1008 GB/s): bound by
// memory. From a 1080x1920 picture 6.2 MB are read: 64 us, 19 us. Not measured on a GPU.
#include "device.cuh"

namespace maskcast {

constexpr int kMaxPictures = 16;

struct Picture {
  const uint8_t* pixels;  // [height, width, 3]
  int32_t height;
  int32_t width;
  int32_t content_height;  // size of the picture inside the network's input, at the top left
  int32_t content_width;
};

struct PreprocessArguments {
  Picture pictures[kMaxPictures];
  void* images;  // [pictures, 3, height, width]
  int32_t height;
  int32_t width;
  float pad_value;
};

struct Blend {
  int32_t low;
  int32_t high;
  float weight_high;
};

__device__ __forceinline__ Blend blend_at(int at, int content, int source) {
  const float scale = static_cast<float>(source) / static_cast<float>(content);
  const float middle = fmaxf((static_cast<float>(at) + 0.5f) * scale - 0.5f, 0.f);
  const int low = min(static_cast<int>(middle), source - 1);
  return {low, min(low + 1, source - 1), middle - static_cast<float>(low)};
}

template <typename T>
__device__ __forceinline__ void preprocess(const PreprocessArguments& a) {
  const int x = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int y = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
  if (x >= a.width || y >= a.height) return;

  const Picture& picture = a.pictures[blockIdx.z];
  const int64_t plane = static_cast<int64_t>(a.height) * a.width;
  T* image = static_cast<T*>(a.images) + 3 * static_cast<int64_t>(blockIdx.z) * plane;
  T* out = image + static_cast<int64_t>(y) * a.width + x;
  if (x >= picture.content_width || y >= picture.content_height) {
    for (int c = 0; c < 3; ++c) store(out + c * plane, a.pad_value);
    return;
  }
  const Blend column = blend_at(x, picture.content_width, picture.width);
  const Blend row = blend_at(y, picture.content_height, picture.height);
  const uint8_t* low = picture.pixels + static_cast<int64_t>(row.low) * picture.width * 3;
  const uint8_t* high = picture.pixels + static_cast<int64_t>(row.high) * picture.width * 3;
  for (int c = 0; c < 3; ++c) {
    const float low_left = __ldg(low + 3 * column.low + c);
    const float low_right = __ldg(low + 3 * column.high + c);
    const float high_left = __ldg(high + 3 * column.low + c);
    const float high_right = __ldg(high + 3 * column.high + c);
    const float upper = low_left + column.weight_high * (low_right - low_left);
    const float lower = high_left + column.weight_high * (high_right - high_left);
    store(out + c * plane, upper + row.weight_high * (lower - upper));
  }
}

}  // namespace maskcast

extern "C" __global__ void preprocess_f32(
    const __grid_constant__ maskcast::PreprocessArguments arguments) {
  maskcast::preprocess<float>(arguments);
}

extern "C" __global__ void preprocess_f16(
    const __grid_constant__ maskcast::PreprocessArguments arguments) {
  maskcast::preprocess<__half>(arguments);
}
