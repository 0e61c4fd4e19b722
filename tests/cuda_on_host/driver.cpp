// A libcuda.so.1 over host memory, for tests: unmodified pycuda runs on it, and cuLaunchKernel runs
// the project's kernels compiled for the host.
//
// It defers work as long as a driver may: what is queued on a stream runs only when a caller waits
// for it (cuStreamSynchronize, cuEventSynchronize, cuCtxSynchronize, or another stream's wait that
// runs). A missing synchronisation therefore always shows: the memory still holds its old content,
// 0xCB where it is fresh. What a real driver tolerates or reports late is recorded as a fault: writes
// outside an allocation, freeing memory while work is in flight, asynchronous copies of pageable
// memory, launches with arguments of another size, handles of destroyed objects.
//
// Locks: `state_lock` guards the tables and is never held while work runs; `work_lock` is held by the
// one thread that runs queued work. Calls that only queue work never take `work_lock`, so work that
// calls back into Python cannot deadlock with a thread that queues work while it holds the GIL.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "kernels.h"

namespace {

using Handle = uintptr_t;

enum Status {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500,
  kIllegalAddress = 700,
  kCaptureUnsupported = 900,
};

constexpr size_t kGuard = 4096;
constexpr unsigned char kFresh = 0xCB, kCanary = 0xA5;
constexpr unsigned kNonBlocking = 1;

struct Allocation {
  size_t size;
  bool pinned;
};

struct Work {
  std::function<void()> run;
  std::vector<Handle> touches = {};  // addresses; a kernel's are found in its arguments
  size_t bytes_up = 0, bytes_down = 0;
  const char* kernel = nullptr;
};

struct Stream {
  std::deque<Work> work;
  uint64_t queued = 0, done = 0;
  unsigned flags = 0;
  bool capturing = false;
  std::vector<Work> captured;
};

struct Event {
  Handle stream = 0;
  uint64_t position = 0;
  bool recorded = false;
  unsigned flags = 0;
  std::chrono::steady_clock::time_point reached;
};

std::recursive_mutex state_lock;
std::recursive_mutex work_lock;
std::map<Handle, Allocation> allocations;
std::map<Handle, Stream> streams;
std::map<Handle, Event> events;
std::map<Handle, std::vector<const on_host::Kernel*>> modules;
std::map<Handle, std::vector<Work>> graphs, executables;
int graph_launches = 0;
bool refuses_capture = false;
bool idle = false;
std::vector<std::string> faults;
std::map<std::string, int> launches;
size_t bytes_up = 0, bytes_down = 0;
Handle next_handle = 0x1000;
int retained = 0;
unsigned context_flags = 0;
uint64_t context_id = 0;
int sticky_error = kSuccess;
bool backwards = false;
int cuda_version = 13000;
constexpr Handle kContext = 0xC0FFEE;
thread_local std::vector<Handle> contexts;

using Locked = std::lock_guard<std::recursive_mutex>;

int fault(const std::string& what, int status) {
  Locked lock(state_lock);
  faults.push_back(what);
  return status;
}

bool has_context() { return !contexts.empty() && contexts.back() == kContext && retained > 0; }

#define REQUIRE_CONTEXT(call)                                                     \
  if (sticky_error) return sticky_error;                                          \
  if (!has_context()) return fault(call ": no current context", kInvalidContext);

bool inside(const void* at, size_t size, bool pinned) {
  Locked lock(state_lock);
  auto after = allocations.upper_bound(reinterpret_cast<Handle>(at));
  if (after == allocations.begin()) return false;
  const auto& [base, allocation] = *std::prev(after);
  return allocation.pinned == pinned &&
         reinterpret_cast<Handle>(at) + size <= base + allocation.size;
}

#ifdef __SANITIZE_ADDRESS__
// AddressSanitizer watches what lies around an allocation, reads included.
void check_guards(Handle, const Allocation&) {}
void set_guards(Handle base, size_t size) {
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(base - kGuard), kGuard);
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(base + size), kGuard);
}
void remove_guards(Handle base, size_t size) {
  ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(base - kGuard), size + 2 * kGuard);
}
#else
void remove_guards(Handle, size_t) {}
void check_guards(Handle base, const Allocation& allocation) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(base);
  for (size_t i = 0; i < kGuard; ++i) {
    if (bytes[-1 - static_cast<ptrdiff_t>(i)] == kCanary && bytes[allocation.size + i] == kCanary) {
      continue;
    }
    std::ostringstream what;
    what << "written outside an allocation of " << allocation.size << " bytes, offset " << i;
    fault(what.str(), 0);
    return;
  }
}

void set_guards(Handle base, size_t size) {
  std::memset(reinterpret_cast<void*>(base - kGuard), kCanary, kGuard);
  std::memset(reinterpret_cast<void*>(base + size), kCanary, kGuard);
}
#endif

void* allocate(size_t size, bool pinned) {
  auto* block = static_cast<unsigned char*>(
      std::aligned_alloc(kGuard, (size + 3 * kGuard) / kGuard * kGuard));
  std::memset(block + kGuard, kFresh, size);
  set_guards(reinterpret_cast<Handle>(block + kGuard), size);
  Locked lock(state_lock);
  allocations[reinterpret_cast<Handle>(block + kGuard)] = {size, pinned};
  return block + kGuard;
}

int release(const void* at, bool pinned, const char* call) {
  Locked lock(state_lock);
  auto found = allocations.find(reinterpret_cast<Handle>(at));
  if (found == allocations.end() || found->second.pinned != pinned) {
    return fault(std::string(call) + ": not an allocation", kInvalidValue);
  }
  const Handle end = found->first + found->second.size;
  for (const auto& [handle, stream] : streams) {
    for (const Work& work : stream.work) {
      const bool touched = std::any_of(work.touches.begin(), work.touches.end(), [&](Handle one) {
        return one >= found->first && one < end;
      });
      if (touched) fault(std::string(call) + ": queued work uses the memory", 0);
    }
  }
  check_guards(found->first, found->second);
  remove_guards(found->first, found->second.size);
  std::free(reinterpret_cast<unsigned char*>(found->first) - kGuard);
  allocations.erase(found);
  return kSuccess;
}

// Run a stream's work up to a position; a position past the end runs all of it.
void run_queued(Handle handle, uint64_t position) {
  Locked working(work_lock);
  while (true) {
    Work work;
    {
      Locked lock(state_lock);
      auto found = streams.find(handle);
      if (found == streams.end()) return;
      Stream& stream = found->second;
      if (stream.work.empty() || stream.done >= position) return;
      work = std::move(stream.work.front());
      stream.work.pop_front();
    }
    work.run();
    Locked lock(state_lock);
    ++streams[handle].done;
  }
}

void run_all_queued(bool blocking_only) {
  std::vector<Handle> handles;
  {
    Locked lock(state_lock);
    for (const auto& [handle, stream] : streams) {
      if (!blocking_only || !(stream.flags & kNonBlocking)) handles.push_back(handle);
    }
  }
  for (Handle handle : handles) run_queued(handle, UINT64_MAX);
}

int queue(Handle handle, const char* call, Work work) {
  Locked lock(state_lock);
  auto found = streams.find(handle);
  if (found == streams.end()) {
    return fault(std::string(call) + ": not a stream", kInvalidHandle);
  }
  if (found->second.capturing) {
    found->second.captured.push_back(std::move(work));
    return kSuccess;
  }
  bytes_up += work.bytes_up;
  bytes_down += work.bytes_down;
  if (work.kernel) ++launches[work.kernel];
  found->second.work.push_back(std::move(work));
  ++found->second.queued;
  return kSuccess;
}

// What may not happen while a stream is captured: waiting, loading, allocating.
bool in_capture(const char* call) {
  Locked lock(state_lock);
  for (const auto& entry : streams) {
    if (entry.second.capturing) return fault(std::string(call) + " during a capture", 1) != 0;
  }
  return false;
}

int copy_async(void* to, bool to_pinned, const void* from, bool from_pinned, size_t size,
               Handle stream, const char* call) {
  REQUIRE_CONTEXT("asynchronous copy");
  if (!inside(to, size, to_pinned) || !inside(from, size, from_pinned)) {
    return fault(std::string(call) + ": outside device or pinned memory", kInvalidValue);
  }
  const auto copy = [=] {
    if (inside(to, size, to_pinned) && inside(from, size, from_pinned)) {
      if (!idle) std::memcpy(to, from, size);
    } else {
      fault(std::string(call) + ": the memory was freed before the copy", 0);
    }
  };
  const std::vector<Handle> touches = {reinterpret_cast<Handle>(to), reinterpret_cast<Handle>(from)};
  return queue(stream, call, {copy, touches, from_pinned ? size : 0, to_pinned ? size : 0});
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return kSuccess; }
int cuDriverGetVersion(int* version) { return *version = cuda_version, kSuccess; }
int cuDeviceGetCount(int* count) { return *count = 1, kSuccess; }
int cuDeviceGet(int* device, int index) { return *device = index, index ? 101 : kSuccess; }
int cuDeviceGetName(char* name, int size, int) {
  std::strncpy(name, "host memory", size);
  return kSuccess;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 9 : 1;  // compute capability 8.9
  return kSuccess;
}
int cuDeviceComputeCapability(int* major, int* minor, int) {
  return *major = 8, *minor = 9, kSuccess;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = size_t{8} << 30, kSuccess; }
int cuMemGetInfo_v2(size_t* left, size_t* total) {
  return *left = *total = size_t{8} << 30, kSuccess;
}

int cuDevicePrimaryCtxRetain(Handle* context, int) {
  Locked lock(state_lock);
  if (retained++ == 0) ++context_id;
  return *context = kContext, kSuccess;
}

int cuDevicePrimaryCtxSetFlags_v2(int, unsigned flags) { return context_flags = flags, kSuccess; }
int cuDevicePrimaryCtxSetFlags(int device, unsigned flags) {
  return cuDevicePrimaryCtxSetFlags_v2(device, flags);
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  return *flags = context_flags, *active = retained > 0, kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int) {
  Locked lock(state_lock);
  if (retained == 0) return fault("the primary context was released too often", kInvalidContext);
  if (--retained == 0) modules.clear();
  return kSuccess;
}
int cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }

int cuCtxPushCurrent_v2(Handle context) { return contexts.push_back(context), kSuccess; }
int cuCtxPopCurrent_v2(Handle* context) {
  if (contexts.empty()) return fault("a context was popped from an empty stack", kInvalidContext);
  if (context) *context = contexts.back();
  return contexts.pop_back(), kSuccess;
}
int cuCtxGetCurrent(Handle* context) {
  return *context = contexts.empty() ? 0 : contexts.back(), kSuccess;
}
int cuCtxGetId(Handle, unsigned long long* id) { return *id = context_id, kSuccess; }
int cuCtxGetDevice(int* device) { return *device = 0, kSuccess; }
int cuCtxGetApiVersion(Handle, unsigned* version) { return *version = 3020, kSuccess; }
int cuCtxSynchronize() {
  REQUIRE_CONTEXT("cuCtxSynchronize");
  return run_all_queued(false), sticky_error;
}

int cuMemAlloc_v2(void** at, size_t size) {
  REQUIRE_CONTEXT("cuMemAlloc");
  if (in_capture("cuMemAlloc")) return kCaptureUnsupported;
  if (size == 0) return kInvalidValue;
  return *at = allocate(size, false), kSuccess;
}
int cuMemFree_v2(void* at) { return release(at, false, "cuMemFree"); }
int cuMemHostAlloc(void** at, size_t size, unsigned) {
  REQUIRE_CONTEXT("cuMemHostAlloc");
  return *at = allocate(size, true), kSuccess;
}
int cuMemFreeHost(void* at) { return release(at, true, "cuMemFreeHost"); }

int cuMemcpyHtoD_v2(void* to, const void* from, size_t size) {
  REQUIRE_CONTEXT("cuMemcpyHtoD");
  run_all_queued(true);
  if (!inside(to, size, false)) return fault("cuMemcpyHtoD: outside", kInvalidValue);
  return std::memcpy(to, from, size), sticky_error;
}
int cuMemcpyDtoH_v2(void* to, const void* from, size_t size) {
  REQUIRE_CONTEXT("cuMemcpyDtoH");
  run_all_queued(true);
  if (!inside(from, size, false)) return fault("cuMemcpyDtoH: outside", kInvalidValue);
  return std::memcpy(to, from, size), sticky_error;
}
int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t size, Handle stream) {
  return copy_async(to, false, from, true, size, stream, "cuMemcpyHtoDAsync");
}
int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t size, Handle stream) {
  return copy_async(to, true, from, false, size, stream, "cuMemcpyDtoHAsync");
}
int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t size, Handle stream) {
  return copy_async(to, false, from, false, size, stream, "cuMemcpyDtoDAsync");
}

// Copies rows between host and device memory at once; FFmpeg copies decoded frames with it.
struct Copy2D {
  size_t from_x, from_y;
  int from_kind;
  const void* from_host;
  void* from_device;
  void* from_array;
  size_t from_pitch, to_x, to_y;
  int to_kind;
  void* to_host;
  void* to_device;
  void* to_array;
  size_t to_pitch, width, height;
};
int cuMemcpy2DAsync_v2(const Copy2D* copy, Handle) {
  REQUIRE_CONTEXT("cuMemcpy2DAsync");
  constexpr int kDevice = 2;
  const auto* from = static_cast<const unsigned char*>(
      copy->from_kind == kDevice ? copy->from_device : copy->from_host);
  auto* to =
      static_cast<unsigned char*>(copy->to_kind == kDevice ? copy->to_device : copy->to_host);
  for (size_t row = 0; row < copy->height; ++row) {
    std::memcpy(to + (copy->to_y + row) * copy->to_pitch + copy->to_x,
                from + (copy->from_y + row) * copy->from_pitch + copy->from_x, copy->width);
  }
  return kSuccess;
}

int cuStreamCreate(Handle* stream, unsigned flags) {
  REQUIRE_CONTEXT("cuStreamCreate");
  Locked lock(state_lock);
  *stream = next_handle++;
  streams[*stream].flags = flags;
  return kSuccess;
}
int cuStreamDestroy_v2(Handle stream) {
  Locked lock(state_lock);
  auto found = streams.find(stream);
  if (found == streams.end()) return fault("cuStreamDestroy: not a stream", kInvalidHandle);
  if (!found->second.work.empty()) fault("cuStreamDestroy: work is in flight", 0);
  return streams.erase(found), kSuccess;
}
int cuStreamSynchronize(Handle stream) {
  REQUIRE_CONTEXT("cuStreamSynchronize");
  // FFmpeg waits for the default stream while PyAV holds the GIL; nothing is ever queued on it here.
  if (stream == 0) return sticky_error;
  if (in_capture("cuStreamSynchronize")) return kCaptureUnsupported;
  return run_queued(stream, UINT64_MAX), sticky_error;
}
int cuStreamWaitEvent(Handle stream, Handle event, unsigned) {
  REQUIRE_CONTEXT("cuStreamWaitEvent");
  Locked lock(state_lock);
  auto found = events.find(event);
  if (found == events.end()) return fault("cuStreamWaitEvent: not an event", kInvalidHandle);
  if (!found->second.recorded) return fault("cuStreamWaitEvent: never recorded", kSuccess);
  if (streams[stream].capturing) return fault("cuStreamWaitEvent during a capture", kCaptureUnsupported);
  const Handle other = found->second.stream;
  const uint64_t position = found->second.position;
  return queue(stream, "cuStreamWaitEvent", {[=] { run_queued(other, position); }});
}

// cuLaunchHostFunc: the double of TensorRT's execution context puts its work on the stream with it.
int cuLaunchHostFunc(Handle stream, void (*function)(void*), void* data) {
  REQUIRE_CONTEXT("cuLaunchHostFunc");
  return queue(stream, "cuLaunchHostFunc", {[=] { function(data); }});
}

int cuEventCreate(Handle* event, unsigned flags) {
  REQUIRE_CONTEXT("cuEventCreate");
  Locked lock(state_lock);
  *event = next_handle++;
  events[*event].flags = flags;
  return kSuccess;
}
int cuEventDestroy_v2(Handle event) {
  Locked lock(state_lock);
  return events.erase(event) ? kSuccess : fault("cuEventDestroy: not an event", kInvalidHandle);
}
int cuEventRecord(Handle event, Handle stream) {
  REQUIRE_CONTEXT("cuEventRecord");
  Locked lock(state_lock);
  auto found = events.find(event);
  if (found == events.end()) return fault("cuEventRecord: not an event", kInvalidHandle);
  const auto reach = [=] {
    Locked reached(state_lock);
    auto still = events.find(event);
    if (still != events.end()) still->second.reached = std::chrono::steady_clock::now();
  };
  const int status = queue(stream, "cuEventRecord", {reach});
  if (status == kSuccess) {
    found->second.stream = stream;
    found->second.position = streams[stream].queued;
    found->second.recorded = true;
  }
  return status;
}
int cuEventSynchronize(Handle event) {
  REQUIRE_CONTEXT("cuEventSynchronize");
  Event waited;
  {
    Locked lock(state_lock);
    auto found = events.find(event);
    if (found == events.end()) return fault("cuEventSynchronize: not an event", kInvalidHandle);
    waited = found->second;
    // An event that was reached needs no wait, even while another thread runs queued work.
    const auto stream = streams.find(waited.stream);
    if (stream == streams.end() || stream->second.done >= waited.position) return kSuccess;
  }
  return run_queued(waited.stream, waited.position), sticky_error;
}
int cuEventElapsedTime_v2(float* ms, Handle start, Handle end) {
  Locked lock(state_lock);
  const auto passed = events[end].reached - events[start].reached;
  *ms = std::chrono::duration<float, std::milli>(passed).count();
  return kSuccess;
}

int cuModuleLoadData(Handle* module, const void* image) {
  REQUIRE_CONTEXT("cuModuleLoadData");
  if (in_capture("cuModuleLoadData")) return kCaptureUnsupported;
  const uint32_t kFatBinary = 0xBA55ED50;
  if (std::memcmp(image, &kFatBinary, sizeof kFatBinary) != 0) {
    return fault("cuModuleLoadData: not a fat binary", kInvalidImage);
  }
  Locked lock(state_lock);
  *module = next_handle++;
  modules[*module];
  return kSuccess;
}
int cuModuleGetFunction(const on_host::Kernel** function, Handle module, const char* name) {
  REQUIRE_CONTEXT("cuModuleGetFunction");
  Locked lock(state_lock);
  if (!modules.count(module)) return fault("cuModuleGetFunction: not a module", kInvalidHandle);
  *function = on_host::find_kernel(name);
  if (!*function) return fault(std::string("no kernel is named ") + name, kNotFound);
  modules[module].push_back(*function);
  return kSuccess;
}

int cuLaunchKernel(const on_host::Kernel* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned, Handle stream,
                   void** parameters, void** extra) {
  REQUIRE_CONTEXT("cuLaunchKernel");
  std::vector<unsigned char> arguments;
  if (parameters || !extra) return fault("only argument buffers are understood", kInvalidValue);
  size_t size = 0;
  const unsigned char* buffer = nullptr;
  for (int i = 0; extra[i]; i += 2) {
    if (extra[i] == reinterpret_cast<void*>(1)) buffer = static_cast<unsigned char*>(extra[i + 1]);
    if (extra[i] == reinterpret_cast<void*>(2)) size = *static_cast<size_t*>(extra[i + 1]);
  }
  if (!buffer || size != kernel->arguments_size) {
    std::ostringstream what;
    what << kernel->name << " takes " << kernel->arguments_size << " bytes of arguments, got " << size;
    return fault(what.str(), kInvalidValue);
  }
  if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_y > 65535 || grid_z > 65535 ||
      block_x * block_y * block_z == 0 || block_x * block_y * block_z > 1024) {
    return fault(std::string(kernel->name) + ": invalid grid or block", kInvalidValue);
  }
  arguments.assign(buffer, buffer + size);
  std::vector<Handle> touches(size / sizeof(Handle));
  std::memcpy(touches.data(), buffer, touches.size() * sizeof(Handle));
  const auto run = [=] {
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    if (!idle) on_host::run_kernel(*kernel, arguments.data(), grid, block, backwards);
  };
  return queue(stream, "cuLaunchKernel", {run, std::move(touches), 0, 0, kernel->name});
}

int cuStreamBeginCapture_v2(Handle handle, int) {
  REQUIRE_CONTEXT("cuStreamBeginCapture");
  Locked lock(state_lock);
  auto found = streams.find(handle);
  if (found == streams.end() || found->second.capturing || refuses_capture) {
    return kCaptureUnsupported;
  }
  found->second.capturing = true;
  return kSuccess;
}
int cuStreamEndCapture(Handle handle, Handle* graph) {
  Locked lock(state_lock);
  Stream& stream = streams[handle];
  if (!stream.capturing) return fault("cuStreamEndCapture: no capture", kCaptureUnsupported);
  stream.capturing = false;
  *graph = next_handle++;
  graphs[*graph].swap(stream.captured);
  stream.captured.clear();
  return sticky_error;
}
int cuGraphInstantiateWithFlags(Handle* executable, Handle graph, unsigned long long) {
  Locked lock(state_lock);
  if (!graphs.count(graph)) return fault("cuGraphInstantiate: not a graph", kInvalidHandle);
  *executable = next_handle++;
  executables[*executable] = graphs[graph];
  return kSuccess;
}
int cuGraphDestroy(Handle graph) {
  Locked lock(state_lock);
  return graphs.erase(graph) ? kSuccess : fault("cuGraphDestroy: not a graph", kInvalidHandle);
}
int cuGraphLaunch(Handle executable, Handle stream) {
  REQUIRE_CONTEXT("cuGraphLaunch");
  Locked lock(state_lock);
  auto found = executables.find(executable);
  if (found == executables.end()) return fault("cuGraphLaunch: not a graph", kInvalidHandle);
  ++graph_launches;
  for (const Work& work : found->second) {
    if (int status = queue(stream, "cuGraphLaunch", work)) return status;
  }
  return kSuccess;
}
int cuGraphExecDestroy(Handle executable) {
  Locked lock(state_lock);
  if (executables.erase(executable)) return kSuccess;
  return fault("cuGraphExecDestroy: not a graph", kInvalidHandle);
}

int cuGetErrorString(int status, const char** text) {
  *text = status == kIllegalAddress ? "an illegal memory access was encountered" : "host driver";
  return kSuccess;
}
int cuGetErrorName(int, const char** name) { return *name = "CUDA_ERROR", kSuccess; }

// For the tests. The report is one line per fault, then counts of what exists and what was done.
const char* host_driver_report() {
  static thread_local std::string text;
  Locked lock(state_lock);
  for (const auto& [base, allocation] : allocations) check_guards(base, allocation);
  std::ostringstream out;
  for (const auto& what : faults) out << "fault: " << what << "\n";
  size_t pinned = 0, pending = 0;
  for (const auto& entry : allocations) pinned += entry.second.pinned;
  for (const auto& entry : streams) pending += entry.second.work.size();
  out << "device allocations: " << allocations.size() - pinned << "\n";
  out << "pinned allocations: " << pinned << "\n";
  out << "streams: " << streams.size() << "\n";
  out << "events: " << events.size() << "\n";
  out << "graphs: " << graphs.size() + executables.size() << "\n";
  out << "graph launches: " << graph_launches << "\n";
  out << "modules: " << modules.size() << "\n";
  out << "contexts: " << retained << "\n";
  out << "pending: " << pending << "\n";
  out << "bytes up: " << bytes_up << "\n";
  out << "bytes down: " << bytes_down << "\n";
  for (const auto& [name, count] : launches) out << "launches of " << name << ": " << count << "\n";
  text = out.str();
  return text.c_str();
}

// Fail every call from now on with this status, as after a fault on the device; 0 ends that.
void host_driver_break(int status) {
  Locked lock(state_lock);
  sticky_error = status;
  if (!status) return;
  for (auto& [handle, stream] : streams) {  // a lost device does nothing more
    stream.done += stream.work.size();
    stream.work.clear();
  }
}

void host_driver_reset() {
  Locked lock(state_lock);
  for (const auto& [base, allocation] : allocations) set_guards(base, allocation.size);
  faults.clear();
  launches.clear();
  bytes_up = bytes_down = 0;
  graph_launches = 0;
  refuses_capture = false;
  sticky_error = kSuccess;
  cuda_version = 13000;
}

// Count the events whose waiters block, or those whose waiters spin.
int host_driver_blocking_events(int blocking) {
  Locked lock(state_lock);
  int count = 0;
  for (const auto& entry : events) count += (entry.second.flags & 1) == (blocking ? 1u : 0u);
  return count;
}

// Turn kernels and asynchronous copies into no-ops, to time the host's part alone.
void host_driver_idle(int idles) { idle = idles != 0; }

// Refuse to capture streams, as a driver does that cannot.
void host_driver_refuse_capture(int refuse) { refuses_capture = refuse != 0; }

void host_driver_version(int version) { cuda_version = version; }

void host_driver_backwards(int reversed) { backwards = reversed != 0; }

}  // extern "C"
