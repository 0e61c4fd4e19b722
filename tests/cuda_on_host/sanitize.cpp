// A program for AddressSanitizer and UndefinedBehaviorSanitizer: the library's plugins, called as
// TensorRT calls them, on the host driver, with inputs of all sizes that include NaN, infinities and
// huge values. The host driver allocates exactly the size requested and poisons what surrounds it.
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../engines/tensorrt/plugins/arguments.h"

struct Tensor {
  int32_t rank, type;
  int64_t dims[4];
  void* pointer;
};
extern "C" {
int call_plugin(const char*, const char*, const double*, const Tensor*, int32_t, Tensor*, void**, void*);
const char* plugin_caller_reason();
int cuDevicePrimaryCtxRetain(uintptr_t*, int);
int cuCtxPushCurrent_v2(uintptr_t);
int cuMemAlloc_v2(void**, size_t);
int cuMemFree_v2(void*);
int cuMemcpyHtoD_v2(void*, const void*, size_t);
int cuStreamCreate(uintptr_t*, unsigned);
int cuStreamSynchronize(uintptr_t);
const char* host_driver_report();
void host_driver_backwards(int);
}

namespace {

constexpr int kFloat = 0, kHalf = 1, kInt32 = 3;
std::mt19937 random_bits(1);
uintptr_t stream;
const char* library;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

float number(float low, float high) {
  const int kind = pick(0, 40);
  if (kind == 0) return std::numeric_limits<float>::quiet_NaN();
  if (kind == 1) return std::numeric_limits<float>::infinity() * (pick(0, 1) ? 1 : -1);
  if (kind == 2) return 3e38f;
  return std::uniform_real_distribution<float>(low, high)(random_bits);
}

Tensor tensor(int type, std::vector<int64_t> dims, float low, float high) {
  Tensor made{static_cast<int32_t>(dims.size()), type, {}, nullptr};
  int64_t count = 1;
  for (size_t i = 0; i < dims.size(); ++i) count *= made.dims[i] = dims[i];
  const size_t each = type == kHalf ? 2 : 4;
  if (count == 0) return made;
  cuMemAlloc_v2(&made.pointer, count * each);
  std::vector<unsigned char> bytes(count * each);
  for (int64_t i = 0; i < count; ++i) {
    const float value = number(low, high);
    const _Float16 half = static_cast<_Float16>(value);
    const int32_t whole = pick(static_cast<int>(low), static_cast<int>(high));
    if (type == kFloat) std::memcpy(&bytes[i * 4], &value, 4);
    if (type == kHalf) std::memcpy(&bytes[i * 2], &half, 2);
    if (type == kInt32) std::memcpy(&bytes[i * 4], &whole, 4);
  }
  cuMemcpyHtoD_v2(made.pointer, bytes.data(), bytes.size());
  return made;
}

void run(const char* name, const std::vector<double>& values, std::vector<Tensor> inputs,
         size_t output_bytes) {
  Tensor output{};
  if (output_bytes) cuMemAlloc_v2(&output.pointer, output_bytes);
  void* workspace = nullptr;
  if (call_plugin(library, name, values.data(), inputs.data(), inputs.size(), &output, &workspace,
                  reinterpret_cast<void*>(stream))) {
    std::printf("%s: %s\n", name, plugin_caller_reason());
    std::exit(3);
  }
  cuStreamSynchronize(stream);
  for (const Tensor& input : inputs) {
    if (input.pointer) cuMemFree_v2(input.pointer);
  }
  if (workspace) cuMemFree_v2(workspace);
  if (output.pointer) cuMemFree_v2(output.pointer);
}

void nms() {
  static const int64_t kSizes[] = {0, 1, 63, 64, 65, 300, 1000};
  const int64_t images = pick(1, 3), count = kSizes[pick(0, 6)], most = pick(1, 400);
  run("GroupedNms", {pick(0, 10) / 10., pick(0, 1) ? -1. : 0.3, static_cast<double>(most)},
      {tensor(kFloat, {images, count, 4}, -50, 400), tensor(kFloat, {images, count}, -1, 1),
       tensor(kInt32, {images, count}, -3, 5)},
      images * most * 4);
}

void roi_align() {
  const int type = pick(0, 1) ? kHalf : kFloat;
  const int64_t images = pick(1, 2), channels = pick(1, 9), boxes = pick(0, 12);
  const int64_t size = pick(0, 2) ? 7 * pick(1, 2) : pick(1, 15);
  std::vector<Tensor> inputs;
  for (int level = 0; level < 4; ++level) {
    inputs.push_back(tensor(type, {images, channels, 32 >> level, 24 >> level}, -9, 9));
  }
  inputs.push_back(tensor(kFloat, {boxes, 4}, -100, 300));
  inputs.push_back(tensor(kInt32, {boxes}, -2, 4));
  run("MultiscaleRoiAlign", {static_cast<double>(size), static_cast<double>(pick(1, 3)), 0.}, inputs,
      boxes * channels * size * size * (type == kHalf ? 2 : 4));
}

// Decoded images of all sizes become a batch of the network's input.
void planes() {
  void* opened = dlopen(library, RTLD_NOW);
  const auto convert = reinterpret_cast<int (*)(const maskcast::Planes*, int32_t, float*, int32_t,
                                                int32_t, float, void*)>(
      dlsym(opened, "maskcast_preprocess_planes"));
  const int count = pick(1, 20), height = pick(1, 60), width = pick(1, 90);
  std::vector<maskcast::Planes> images(count);
  std::vector<void*> memory(count);
  for (int i = 0; i < count; ++i) {
    maskcast::Planes& image = images[i];
    image.height = pick(1, 70);
    image.width = pick(1, 70);
    image.step = pick(1, 2);
    image.turns = pick(0, 3);
    image.content_height = pick(1, height);
    image.content_width = pick(1, width);
    image.chroma_shift = pick(0, 1) / 4.f;
    image.luma_scale = image.v_to_red = image.u_to_green = image.v_to_green = image.u_to_blue = 1.f;
    const int luma = image.height * image.width;
    const int chroma = (image.height + 1) / 2 * ((image.width + 1) / 2);
    cuMemAlloc_v2(&memory[i], luma + 2 * chroma);
    const auto* at = static_cast<const uint8_t*>(memory[i]);
    image.luma = at;
    image.u = at + luma;
    image.v = image.u + (image.step == 1 ? chroma : 1);
  }
  void* inputs = nullptr;
  cuMemAlloc_v2(&inputs, size_t{12} * count * height * width);
  if (convert(images.data(), count, static_cast<float*>(inputs), height, width, 7.f,
              reinterpret_cast<void*>(stream))) {
    std::printf("maskcast_preprocess_planes failed\n");
    std::exit(3);
  }
  cuStreamSynchronize(stream);
  for (void* one : memory) cuMemFree_v2(one);
  cuMemFree_v2(inputs);
  dlclose(opened);
}

}  // namespace

int main(int argc, char** argv) {
  library = argv[1];
  if (argc > 2 && !std::strcmp(argv[2], "overread")) {  // AddressSanitizer must catch this
    void* memory = nullptr;
    uintptr_t context = 0;
    cuDevicePrimaryCtxRetain(&context, 0);
    cuCtxPushCurrent_v2(context);
    cuMemAlloc_v2(&memory, 64);
    return static_cast<volatile unsigned char*>(memory)[64];
  }
  uintptr_t context = 0;
  cuDevicePrimaryCtxRetain(&context, 0);
  cuCtxPushCurrent_v2(context);
  cuStreamCreate(&stream, 1);
  for (int i = 0; i < 20; ++i) {
    host_driver_backwards(i % 2);
    nms();
    roi_align();
    planes();
  }
  std::printf("%s", host_driver_report());
  return 0;
}
