// MultiscaleRoiAlign: RoIAlign (He et al., Mask R-CNN, section 3) over four levels of a feature
// pyramid; the level of a box is chosen inside (Lin et al., FPN, equation 1).
//
// The reference is torchvision.ops.MultiScaleRoIAlign with sampling_ratio >= 1.
//
// One block pools `channels_per_block` channels of one box. The bilinear taps of a box are separable
// (the y taps do not depend on x) and the same for every channel: the block computes
// 2 * output_size * sampling_ratio of them once into shared memory, where a thread for each output
// would compute 4 * sampling_ratio^2 a channel. Outputs of a block are contiguous, so every store is
// coalesced; neighbouring threads read neighbouring bins of one plane, which share cache lines.
//
// Cost for 1000 boxes, 7x7, 256 channels, 800x1344 input, fp16 (sampling_ratio 2):
//   bytes       25 MB written + at most 46 MB of features read once (the rest hits L2)
//   operations  12.5 M outputs x 16 multiply-adds = 0.4 GFLOP
//   floor       L4 (300 GB/s) 0.24 ms, RTX 4090 (1008 GB/s) 0.07 ms: bound by memory, not arithmetic
// For 100 boxes, 14x14: 10 MB written, floor 0.03 - 0.19 ms on an L4, 0.01 - 0.06 ms on an RTX 4090,
// depending on how much of the pyramid the boxes cover. fp32 doubles the bytes. Not measured on a GPU.
#include "arguments.h"
#include "device.cuh"

namespace maskcast {

// One coordinate of a bilinear sample; low < 0 where the sample lies outside and counts as zero.
struct Tap {
  int32_t low;
  int32_t high;
  float weight_low;
  float weight_high;
};

// The comparison is written so that NaN counts as outside.
__device__ __forceinline__ Tap tap_at(float at, int extent) {
  if (!(at >= -1.f && at <= static_cast<float>(extent))) return {-1, -1, 0.f, 0.f};
  at = fmaxf(at, 0.f);
  const int low = static_cast<int>(at);
  if (low >= extent - 1) return {extent - 1, extent - 1, 1.f, 0.f};
  const float weight_high = at - static_cast<float>(low);
  return {low, low + 1, 1.f - weight_high, weight_high};
}

// 0 for P2 .. 3 for P5, as torchvision's LevelMapper: floor(4 + log2(sqrt(area) / 224) + 1e-6).
__device__ __forceinline__ int level_of(float x1, float y1, float x2, float y2) {
  const float side = sqrtf(fmaxf((x2 - x1) * (y2 - y1), 0.f));
  const float level = floorf(4.f + log2f(side / 224.f) + 1e-6f);
  return static_cast<int>(fminf(fmaxf(level, 2.f), 5.f)) - 2;
}

// One output: the mean of ratio x ratio bilinear samples of a plane. The sizes may be constants.
template <typename T>
__device__ __forceinline__ float sample(const T* plane, const Tap* y_taps, const Tap* x_taps,
                                        int width, int ratio) {
  float sum = 0.f;
#pragma unroll
  for (int iy = 0; iy < ratio; ++iy) {
    const Tap y = y_taps[iy];
    if (y.low < 0) continue;
    const T* low = plane + static_cast<int64_t>(y.low) * width;
    const T* high = plane + static_cast<int64_t>(y.high) * width;
#pragma unroll
    for (int ix = 0; ix < ratio; ++ix) {
      const Tap x = x_taps[ix];
      if (x.low < 0) continue;
      const float upper = x.weight_low * load(low + x.low) + x.weight_high * load(low + x.high);
      const float lower = x.weight_low * load(high + x.low) + x.weight_high * load(high + x.high);
      sum += y.weight_low * upper + y.weight_high * lower;
    }
  }
  return sum / static_cast<float>(ratio * ratio);
}

// All outputs of a block. kSize and kRatio are 0, or constants that save three divisions an output
// and unroll the loops over the samples.
template <typename T, int kSize, int kRatio>
__device__ __forceinline__ void pool(const RoiAlignArguments& a, const T* planes, T* pooled,
                                     const Tap* y_taps, const Tap* x_taps, int channels,
                                     int height, int width, bool of_an_image) {
  const int size = kSize ? kSize : a.output_size, ratio = kRatio ? kRatio : a.sampling_ratio;
  const int64_t plane_size = static_cast<int64_t>(height) * width;
  for (int out = static_cast<int>(threadIdx.x); out < channels * size * size;
       out += static_cast<int>(blockDim.x)) {
    const int column = out % size, row = out / size % size;
    const T* plane = planes + (out / (size * size)) * plane_size;
    const float value =
        of_an_image ? sample(plane, y_taps + row * ratio, x_taps + column * ratio, width, ratio) : 0.f;
    store(pooled + out, value);
  }
}

template <typename T>
__device__ __forceinline__ void multiscale_roi_align(const RoiAlignArguments& a) {
  __shared__ Tap y_taps[kMaxTaps];
  __shared__ Tap x_taps[kMaxTaps];

  const int box = static_cast<int>(blockIdx.x);
  const float* roi = a.rois + 4 * static_cast<int64_t>(box);
  const float x1 = __ldg(roi), y1 = __ldg(roi + 1), x2 = __ldg(roi + 2), y2 = __ldg(roi + 3);
  const int level = level_of(x1, y1, x2, y2);
  const int height = a.heights[level], width = a.widths[level];
  const int size = a.output_size, ratio = a.sampling_ratio, taps = size * ratio;

  const float scale = 1.f / static_cast<float>(4 << level);
  const float offset = a.aligned ? 0.5f : 0.f;
  const float top = y1 * scale - offset, left = x1 * scale - offset;
  float roi_height = (y2 * scale - offset) - top, roi_width = (x2 * scale - offset) - left;
  if (!a.aligned) {
    roi_height = fmaxf(roi_height, 1.f);
    roi_width = fmaxf(roi_width, 1.f);
  }
  const float bin_height = roi_height / static_cast<float>(size);
  const float bin_width = roi_width / static_cast<float>(size);
  for (int t = static_cast<int>(threadIdx.x); t < 2 * taps; t += static_cast<int>(blockDim.x)) {
    const int k = t < taps ? t : t - taps;
    const float bin = static_cast<float>(k / ratio);
    const float within = (static_cast<float>(k % ratio) + 0.5f) / static_cast<float>(ratio);
    if (t < taps) {
      y_taps[k] = tap_at(top + bin * bin_height + within * bin_height, height);
    } else {
      x_taps[k] = tap_at(left + bin * bin_width + within * bin_width, width);
    }
  }
  __syncthreads();

  const int image = __ldg(a.batch_index + box);
  const bool of_an_image = image >= 0 && image < a.images;
  const int first_channel = static_cast<int>(blockIdx.y) * a.channels_per_block;
  const int channels = min(a.channels_per_block, a.channels - first_channel);
  const int64_t plane_size = static_cast<int64_t>(height) * width;
  const int64_t first_plane =
      static_cast<int64_t>(of_an_image ? image : 0) * a.channels + first_channel;
  const T* planes = static_cast<const T*>(a.features[level]) + first_plane * plane_size;
  T* pooled = static_cast<T*>(a.pooled) +
              (static_cast<int64_t>(box) * a.channels + first_channel) * size * size;

  // The sizes of Mask R-CNN, for boxes and for masks; then the general case.
  if (size == 7 && ratio == 2) {
    pool<T, 7, 2>(a, planes, pooled, y_taps, x_taps, channels, height, width, of_an_image);
  } else if (size == 14 && ratio == 2) {
    pool<T, 14, 2>(a, planes, pooled, y_taps, x_taps, channels, height, width, of_an_image);
  } else {
    pool<T, 0, 0>(a, planes, pooled, y_taps, x_taps, channels, height, width, of_an_image);
  }
}

}  // namespace maskcast

// __grid_constant__: the arrays in the arguments are indexed in place, not copied to the stack.
extern "C" __global__ void multiscale_roi_align_f32(
    const __grid_constant__ maskcast::RoiAlignArguments arguments) {
  maskcast::multiscale_roi_align<float>(arguments);
}

extern "C" __global__ void multiscale_roi_align_f16(
    const __grid_constant__ maskcast::RoiAlignArguments arguments) {
  maskcast::multiscale_roi_align<__half>(arguments);
}
