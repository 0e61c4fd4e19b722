// Grids, blocks and workspace of every kernel. Plain C++: it needs neither CUDA nor TensorRT. `launch`
// is defined elsewhere: driver.cpp queues a kernel on a stream, the tests run it on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arguments.h"

namespace maskcast {

enum class Kernel {
  kRoiAlignFloat,
  kRoiAlignHalf,
  kNmsRank,
  kNmsOverlap,
  kNmsSelect,
  kPreprocess,
  kPreprocessPlanes,
  kCropsToBytes,
};
constexpr const char* kKernelNames[] = {
    "multiscale_roi_align_f32", "multiscale_roi_align_f16", "nms_rank",          "nms_overlap",
    "nms_select",               "preprocess",               "preprocess_planes", "crops_to_bytes",
};
constexpr int kKernels = sizeof kKernelNames / sizeof *kKernelNames;

struct Size3 {
  unsigned x, y = 1, z = 1;
};

// Launches a kernel with `size` bytes of arguments. Returns 0, or a status of the CUDA driver.
int launch(Kernel kernel, const void* arguments, size_t size, Size3 grid, Size3 block, void* stream);

template <typename Arguments>
int launch(Kernel kernel, const Arguments& arguments, Size3 grid, Size3 block, void* stream) {
  return launch(kernel, &arguments, sizeof arguments, grid, block, stream);
}

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Computes `channels_per_block`. Without boxes, launches nothing.
inline int roi_align(RoiAlignArguments a, bool half, void* stream) {
  if (a.boxes == 0) return 0;
  // About 3000 outputs per block: the taps cost little, and there are enough blocks to fill any GPU.
  const int most = 3136 / (a.output_size * a.output_size);
  a.channels_per_block = most < 1 ? 1 : most < a.channels ? most : a.channels;
  const Size3 grid = {static_cast<unsigned>(a.boxes),
                      static_cast<unsigned>(divide_up(a.channels, a.channels_per_block))};
  return launch(half ? Kernel::kRoiAlignHalf : Kernel::kRoiAlignFloat, a, grid, {256}, stream);
}

// Sizes of the parts of NMS's workspace, each a multiple of 256 bytes.
struct NmsWorkspace {
  int64_t overlaps, boxes, groups, order;

  NmsWorkspace(int64_t images, int64_t candidates) {
    const auto aligned = [](int64_t size) { return divide_up(size, 256) * 256; };
    const int64_t rows = images * candidates;
    overlaps = aligned(rows * divide_up(candidates, kWord) * 8);
    boxes = aligned(rows * 16);
    groups = order = aligned(rows * 4);
  }
  size_t bytes() const { return static_cast<size_t>(overlaps + boxes + groups + order); }
};

// Computes the pointers into `workspace`, which must be aligned to 256.
inline int grouped_nms(NmsArguments a, void* workspace, void* stream) {
  const NmsWorkspace parts(a.images, a.candidates);
  char* at = static_cast<char*>(workspace);
  a.overlaps = reinterpret_cast<uint64_t*>(at);
  a.sorted_boxes = reinterpret_cast<float*>(at += parts.overlaps);
  a.sorted_groups = reinterpret_cast<int32_t*>(at += parts.boxes);
  a.order = reinterpret_cast<int32_t*>(at += parts.groups);
  const auto images = static_cast<unsigned>(a.images);
  const auto words = static_cast<unsigned>(divide_up(a.candidates, kWord));
  if (a.candidates > 0) {
    const auto rows = static_cast<unsigned>(divide_up(a.candidates, 32));
    if (int status = launch(Kernel::kNmsRank, a, {rows, images}, {32, 8}, stream)) return status;
    const Size3 grid = {static_cast<unsigned>(divide_up(words, 4)), words, images};
    if (int status = launch(Kernel::kNmsOverlap, a, grid, {64, 4}, stream)) return status;
  }
  return launch(Kernel::kNmsSelect, a, {images}, {512}, stream);
}

// Any number of images, one launch for each 16 of them.
inline int preprocess(const uint8_t* const* images, int count, float* inputs, int32_t pixels,
                      void* stream) {
  for (int first = 0; first < count; first += kMaxImages) {
    PreprocessArguments a = {};
    const int here = count - first < kMaxImages ? count - first : kMaxImages;
    for (int i = 0; i < here; ++i) a.images[i] = images[first + i];
    a.inputs = inputs + int64_t{3} * pixels * first;
    a.pixels = pixels;
    const Size3 grid = {static_cast<unsigned>(divide_up(pixels / 4, 256)),
                        static_cast<unsigned>(here)};
    if (int status = launch(Kernel::kPreprocess, a, grid, {256}, stream)) return status;
  }
  return 0;
}

// Any number of images, one launch for each 16 of them.
inline int preprocess_planes(const Planes* images, int count, float* inputs, int32_t height,
                             int32_t width, float pad_value, void* stream) {
  for (int first = 0; first < count; first += kMaxImages) {
    PlanesArguments a = {};
    const int here = count - first < kMaxImages ? count - first : kMaxImages;
    for (int i = 0; i < here; ++i) a.images[i] = images[first + i];
    a.inputs = inputs + int64_t{3} * height * width * first;
    a.height = height;
    a.width = width;
    a.pad_value = pad_value;
    const Size3 grid = {static_cast<unsigned>(divide_up(width, 32)),
                        static_cast<unsigned>(divide_up(height, 8)), static_cast<unsigned>(here)};
    if (int status = launch(Kernel::kPreprocessPlanes, a, grid, {32, 8}, stream)) return status;
  }
  return 0;
}

inline int crops_to_bytes(const float* masks, uint8_t* crops, int32_t values, void* stream) {
  const auto blocks = static_cast<unsigned>(divide_up(values / 4, 256));
  if (blocks == 0) return 0;
  return launch(Kernel::kCropsToBytes, CropsArguments{masks, crops, values}, {blocks}, {256}, stream);
}

}  // namespace maskcast
