// The CUDA driver, opened at run time: the library links neither CUDA nor TensorRT, so that TensorRT
// can load it while it builds plans on a machine without a GPU.
#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>

#include "launch.h"

// The machine code of all kernels, as nvcc made it.
asm(R"(
    .section .rodata
    .balign 64
maskcast_kernels:
    .incbin "kernels.fatbin"
    .previous
)");
extern "C" const unsigned char maskcast_kernels[] __attribute__((visibility("hidden")));

namespace maskcast {
namespace {

constexpr int kNoDriver = 100, kNoContext = 201;  // CUDA_ERROR_NO_DEVICE, _INVALID_CONTEXT

using Handle = void*;

// The functions of cuda.h that are called. CUresult and CUdevice are ints, handles are pointers.
struct Driver {
  int (*current)(Handle* context);
  int (*context_id)(Handle context, unsigned long long* id);
  int (*load)(Handle* module, const void* image);
  int (*find)(Handle* function, Handle module, const char* name);
  int (*launch)(Handle function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned shared, Handle stream, void** parameters, void** extra);
  int (*error_text)(int status, const char** text);
  bool complete = false;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return;
    complete = get(library, "cuCtxGetCurrent", current) && get(library, "cuCtxGetId", context_id) &&
               get(library, "cuModuleLoadData", load) &&
               get(library, "cuModuleGetFunction", find) &&
               get(library, "cuLaunchKernel", launch) &&
               get(library, "cuGetErrorString", error_text);
  }

  template <typename Function>
  static bool get(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
  }
};

const Driver& driver() {
  static const Driver opened;
  return opened;
}

// The kernels of one context. Entries are only added, at the front, so reading takes no lock.
struct Loaded {
  unsigned long long context;
  Handle functions[kKernels];
  const Loaded* next;
};
std::atomic<const Loaded*> all{nullptr};
std::mutex loading;

const Loaded* find(unsigned long long context) {
  const Loaded* entry = all.load(std::memory_order_acquire);
  while (entry && entry->context != context) entry = entry->next;
  return entry;
}

int load_into(unsigned long long context, const Loaded** loaded) {
  const std::lock_guard<std::mutex> lock(loading);
  if ((*loaded = find(context))) return 0;
  Handle module = nullptr;
  if (int status = driver().load(&module, maskcast_kernels)) return status;
  auto* entry = new Loaded{context, {}, all.load(std::memory_order_relaxed)};
  for (int i = 0; i < kKernels; ++i) {
    if (int status = driver().find(&entry->functions[i], module, kKernelNames[i])) {
      delete entry;
      return status;
    }
  }
  all.store(entry, std::memory_order_release);
  *loaded = entry;
  return 0;
}

int kernels(const Loaded** loaded) {
  if (!driver().complete) return kNoDriver;
  Handle context = nullptr;
  if (int status = driver().current(&context)) return status;
  if (!context) return kNoContext;
  // Unlike the handle, the id is never reused for a later context.
  unsigned long long id = 0;
  if (int status = driver().context_id(context, &id)) return status;
  *loaded = find(id);
  return *loaded ? 0 : load_into(id, loaded);
}

}  // namespace

int load() {
  const Loaded* loaded = nullptr;
  return kernels(&loaded);
}

int launch(Kernel kernel, const void* arguments, size_t size, Size3 grid, Size3 block, void* stream) {
  const Loaded* loaded = nullptr;
  if (int status = kernels(&loaded)) return status;
  // CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE, _END: the driver copies the buffer.
  void* extra[] = {reinterpret_cast<void*>(1), const_cast<void*>(arguments),
                   reinterpret_cast<void*>(2), &size, nullptr};
  return driver().launch(loaded->functions[static_cast<int>(kernel)], grid.x, grid.y, grid.z, block.x,
                         block.y, block.z, 0, stream, nullptr, extra);
}

const char* describe(int status) {
  const char* text = nullptr;
  if (!driver().complete) return "there is no NVIDIA driver (libcuda.so.1), or it is too old";
  if (status == kNoContext) return "no CUDA context is current on this thread";
  return driver().error_text(status, &text) || !text ? "unknown error" : text;
}

}  // namespace maskcast

extern "C" __attribute__((visibility("default"))) int maskcast_load() { return maskcast::load(); }
extern "C" __attribute__((visibility("default"))) const char* maskcast_error(int status) {
  return maskcast::describe(status);
}
