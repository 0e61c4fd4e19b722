// A libnvcuvid.so.1 on the host driver, for tests: FFmpeg's NVDEC decoder runs on it. The values of
// frame n, in decoding order, are luma 2 + 4 n, chroma 100 + n and 150 - n.
//
// The structs are NVIDIA's up to the last member that is read or written here.
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>

extern "C" {
int cuMemAlloc_v2(void**, size_t);
int cuMemFree_v2(void*);
}

namespace {

struct CreateInfo {
  unsigned long width, height, surfaces;
};
struct Capabilities {
  int codec, chroma, depth_minus_8;
  unsigned reserved[3];
  unsigned char is_supported, decoders;
  uint16_t formats;
  uint32_t max_width, max_height, max_blocks;
  uint16_t min_width, min_height;
};
struct Frame {
  int width_in_blocks, height_in_blocks, index;
};

struct Decoder {
  unsigned width, height;
  int frames = 0;
  std::map<int, int> numbers = {};  // of the frame in each surface
};

std::mutex lock;
bool broken = false;

}  // namespace

extern "C" {

int cuvidGetDecoderCaps(Capabilities* found) {
  found->is_supported = found->codec == 4;  // H.264
  found->decoders = 1;
  found->formats = 1;  // NV12
  found->max_width = found->max_height = 8192;
  found->max_blocks = 1 << 20;
  found->min_width = found->min_height = 48;
  return 0;
}

int cuvidCreateDecoder(void** decoder, const CreateInfo* info) {
  *decoder = new Decoder{static_cast<unsigned>(info->width), static_cast<unsigned>(info->height)};
  return 0;
}
int cuvidDestroyDecoder(void* decoder) { return delete static_cast<Decoder*>(decoder), 0; }

int cuvidDecodePicture(void* decoder, const Frame* frame) {
  std::lock_guard<std::mutex> locked(lock);
  if (broken) return 999;
  auto& known = *static_cast<Decoder*>(decoder);
  known.numbers[frame->index] = known.frames++;
  return 0;
}

int cuvidMapVideoFrame64(void* decoder, int index, unsigned long long* at, unsigned* pitch, void*) {
  std::lock_guard<std::mutex> locked(lock);
  const auto& known = *static_cast<Decoder*>(decoder);
  const int number = known.numbers.at(index);
  *pitch = (known.width + 255) / 256 * 256;
  const size_t luma = size_t{*pitch} * known.height;
  void* memory = nullptr;
  if (int status = cuMemAlloc_v2(&memory, luma * 3 / 2)) return status;
  auto* bytes = static_cast<unsigned char*>(memory);
  std::memset(bytes, 2 + 4 * number, luma);
  for (size_t i = luma; i < luma * 3 / 2; ++i) bytes[i] = i % 2 ? 150 - number : 100 + number;
  *at = reinterpret_cast<unsigned long long>(memory);
  return 0;
}
int cuvidUnmapVideoFrame64(void*, unsigned long long at) {
  return cuMemFree_v2(reinterpret_cast<void*>(at));
}

// Fail every decode from now on, or decode again.
void host_nvcuvid_break(int now) { broken = now != 0; }

int cuvidGetDecodeStatus(void*, int, int* status) { return *status = 2, 0; }  // success

#define ABSENT(name) \
  int name() { return 801; }
ABSENT(cuvidReconfigureDecoder)
ABSENT(cuvidCtxLock)
ABSENT(cuvidCtxLockCreate)
ABSENT(cuvidCtxLockDestroy)
ABSENT(cuvidCtxUnlock)
ABSENT(cuvidCreateVideoParser)
ABSENT(cuvidDestroyVideoParser)
ABSENT(cuvidParseVideoData)
ABSENT(cuvidCreateVideoSource)
ABSENT(cuvidCreateVideoSourceW)
ABSENT(cuvidDestroyVideoSource)
ABSENT(cuvidGetSourceAudioFormat)
ABSENT(cuvidGetSourceVideoFormat)
ABSENT(cuvidGetVideoSourceState)
ABSENT(cuvidSetVideoSourceState)

}  // extern "C"
