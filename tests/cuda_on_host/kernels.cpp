// The project's kernels, compiled for the host, by name.
#define MASKCAST_ON_HOST
#include "kernels.h"

#include "../../engines/tensorrt/plugins/kernels.cu"

namespace on_host {
namespace {

template <typename Arguments, void (*kernel)(Arguments)>
void call(const void* arguments) {
  kernel(*static_cast<const Arguments*>(arguments));
}

template <typename Arguments, void (*kernel)(Arguments)>
constexpr Kernel entry(const char* name, bool barriers) {
  return {name, sizeof(Arguments), barriers, call<Arguments, kernel>};
}

using maskcast::CropsArguments;
using maskcast::NmsArguments;
using maskcast::PlanesArguments;
using maskcast::PreprocessArguments;
using maskcast::RoiAlignArguments;

const Kernel kKernels[] = {
    entry<RoiAlignArguments, multiscale_roi_align_f32>("multiscale_roi_align_f32", true),
    entry<RoiAlignArguments, multiscale_roi_align_f16>("multiscale_roi_align_f16", true),
    entry<NmsArguments, nms_rank>("nms_rank", true),
    entry<NmsArguments, nms_overlap>("nms_overlap", true),
    entry<NmsArguments, nms_select>("nms_select", true),
    entry<PreprocessArguments, preprocess>("preprocess", false),
    entry<PlanesArguments, preprocess_planes>("preprocess_planes", false),
    entry<CropsArguments, crops_to_bytes>("crops_to_bytes", false),
};

}  // namespace

const Kernel* find_kernel(const char* name) {
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) == 0) return &kernel;
  }
  return nullptr;
}

void run_kernel(const Kernel& kernel, const void* arguments, const unsigned grid[3],
                const unsigned block[3], bool reversed) {
  run(kernel.body, arguments, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
      kernel.barriers, reversed);
}

}  // namespace on_host
