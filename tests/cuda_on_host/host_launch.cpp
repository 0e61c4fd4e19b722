// Replaces the library's driver.cpp: a launch runs the kernel on the host at once, without a driver.
#include "../../engines/tensorrt/plugins/launch.h"
#include "kernels.h"

namespace {

bool backwards = false;

}  // namespace

namespace maskcast {

int launch(Kernel kernel, const void* arguments, size_t size, Size3 grid, Size3 block, void*) {
  const on_host::Kernel* found = on_host::find_kernel(kKernelNames[static_cast<int>(kernel)]);
  if (!found || found->arguments_size != size) return 500;
  const unsigned grids[3] = {grid.x, grid.y, grid.z}, blocks[3] = {block.x, block.y, block.z};
  on_host::run_kernel(*found, arguments, grids, blocks, backwards);
  return 0;
}

}  // namespace maskcast

extern "C" {

int maskcast_load() { return 0; }
const char* maskcast_error(int) { return "no kernel of that name takes arguments of that size"; }

// Reverses the order of threads and blocks.
void host_backwards(int reversed) { backwards = reversed != 0; }

}  // extern "C"
