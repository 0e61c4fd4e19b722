// The kernels as C functions, for programs without TensorRT: the engine, the tests, benchmarks.
//
// Pointers are to device memory. Every function queues its work on `stream` and returns at once, with
// 0 or a status of the CUDA driver. A CUDA context must be current.
#include "launch.h"

#define MASKCAST_API extern "C" __attribute__((visibility("default")))

// Pools boxes from P2..P5. Features and `pooled` are float16 where `half`, else float32.
MASKCAST_API int maskcast_roi_align(const void* const* features, const int32_t* heights,
                                    const int32_t* widths, const float* rois,
                                    const int32_t* batch_index, void* pooled, int32_t images,
                                    int32_t boxes, int32_t channels, int32_t output_size,
                                    int32_t sampling_ratio, int32_t aligned, int32_t half,
                                    void* stream) {
  maskcast::RoiAlignArguments a = {};
  for (int i = 0; i < maskcast::kLevels; ++i) {
    a.features[i] = features[i];
    a.heights[i] = heights[i];
    a.widths[i] = widths[i];
  }
  a.rois = rois;
  a.batch_index = batch_index;
  a.pooled = pooled;
  a.images = images;
  a.boxes = boxes;
  a.channels = channels;
  a.output_size = output_size;
  a.sampling_ratio = sampling_ratio;
  a.aligned = aligned;
  return maskcast::roi_align(a, half != 0, stream);
}

// Size in bytes of the workspace of maskcast_grouped_nms: device memory, aligned to 256.
MASKCAST_API uint64_t maskcast_nms_workspace_bytes(int32_t images, int32_t candidates) {
  return maskcast::NmsWorkspace(images, candidates).bytes();
}

MASKCAST_API int maskcast_grouped_nms(const float* boxes, const float* scores, const int32_t* groups,
                                      int32_t* keep, void* workspace, int32_t images,
                                      int32_t candidates, int32_t max_output, float iou_threshold,
                                      float score_threshold, void* stream) {
  maskcast::NmsArguments a = {};
  a.boxes = boxes;
  a.scores = scores;
  a.groups = groups;
  a.keep = keep;
  a.images = images;
  a.candidates = candidates;
  a.max_output = max_output;
  a.iou_threshold = iou_threshold;
  a.score_threshold = score_threshold;
  return maskcast::grouped_nms(a, workspace, stream);
}

// `pixels` of an image, a multiple of 4; see preprocess.cu.
MASKCAST_API int maskcast_preprocess(const uint8_t* const* images, int32_t count, float* inputs,
                                     int32_t pixels, void* stream) {
  return maskcast::preprocess(images, count, inputs, pixels, stream);
}

// See preprocess.cu, and Planes in arguments.h.
MASKCAST_API int maskcast_preprocess_planes(const maskcast::Planes* images, int32_t count,
                                            float* inputs, int32_t height, int32_t width,
                                            float pad_value, void* stream) {
  return maskcast::preprocess_planes(images, count, inputs, height, width, pad_value, stream);
}

// `values` is a multiple of 4; see preprocess.cu.
MASKCAST_API int maskcast_crops_to_bytes(const float* masks, uint8_t* crops, int32_t values,
                                         void* stream) {
  return maskcast::crops_to_bytes(masks, crops, values, stream);
}
