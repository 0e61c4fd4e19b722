// The arguments of each kernel: one struct, passed by value. For kernels and host code.
#pragma once

#include <cstdint>

namespace maskcast {

constexpr int kLevels = 4;
constexpr int kMaxTaps = 64;         // maximum output_size * sampling_ratio of MultiscaleRoiAlign
constexpr int kWord = 64;            // candidates in one word of overlap bits
constexpr int kMaxCandidates = 8192; // of GroupedNms, per image: 128 words
constexpr int kMaxImages = 16;       // in one launch of preprocess or preprocess_planes

struct RoiAlignArguments {
  const void* features[kLevels];  // P2..P5, each [images, channels, heights[i], widths[i]]
  const float* rois;              // [boxes, 4] x1 y1 x2 y2, pixels of the network's input
  const int32_t* batch_index;     // [boxes]; a box of no image (outside 0..images-1) pools to zeros
  void* pooled;                   // [boxes, channels, output_size, output_size]
  int32_t heights[kLevels];
  int32_t widths[kLevels];
  int32_t images;
  int32_t boxes;
  int32_t channels;
  int32_t output_size;
  int32_t sampling_ratio;
  int32_t aligned;
  int32_t channels_per_block;
};

struct NmsArguments {
  const float* boxes;       // [images, candidates, 4] x1 y1 x2 y2
  const float* scores;      // [images, candidates]
  const int32_t* groups;    // [images, candidates]
  int32_t* keep;            // [images, max_output]
  uint64_t* overlaps;       // workspace [images, candidates, words]
  float* sorted_boxes;      // workspace [images, candidates, 4]
  int32_t* sorted_groups;   // workspace [images, candidates]
  int32_t* order;           // workspace [images, candidates], -1 after the last eligible candidate
  int32_t images;
  int32_t candidates;       // at most kMaxCandidates
  int32_t max_output;
  float iou_threshold;      // 0 or more
  float score_threshold;
};

struct PreprocessArguments {
  const uint8_t* images[kMaxImages];  // each [pixels, 3], aligned to 4
  float* inputs;                      // [images, 3, pixels], aligned to 16
  int32_t pixels;                     // of an image; a multiple of 4
};

// A decoded image: 8-bit YUV 4:2:0, rows without padding.
struct Planes {
  const uint8_t* luma;  // [height, width]
  const uint8_t* u;     // [(height + 1) / 2, (width + 1) / 2] samples, `step` bytes apart
  const uint8_t* v;
  int32_t height;
  int32_t width;
  int32_t step;            // 1 for separate planes, 2 for interleaved U and V (NV12)
  int32_t turns;           // quarter turns counter-clockwise that make it upright
  int32_t content_height;  // of the upright image inside the network's input
  int32_t content_width;
  float chroma_shift;  // how far left of the middle of its four pixels a chroma sample lies
  float luma_offset;   // red = luma_scale (Y - luma_offset) + v_to_red (V - 128), and so on
  float luma_scale;
  float v_to_red;
  float u_to_green;
  float v_to_green;
  float u_to_blue;
};

struct PlanesArguments {
  Planes images[kMaxImages];
  float* inputs;  // [images, 3, height, width]
  int32_t height;
  int32_t width;
  float pad_value;  // of the input around an image
};

struct CropsArguments {
  const float* masks;  // [values] 0..1, aligned to 16
  uint8_t* crops;      // [values] 0..255, aligned to 4
  int32_t values;      // a multiple of 4
};

}  // namespace maskcast
