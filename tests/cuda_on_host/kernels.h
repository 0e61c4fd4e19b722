// The interface between the host-compiled kernels and the host driver.
#pragma once

#include <cstddef>

namespace on_host {

struct Kernel {
  const char* name;
  size_t arguments_size;
  bool barriers;
  void (*body)(const void* arguments);
};

const Kernel* find_kernel(const char* name);
void run_kernel(const Kernel& kernel, const void* arguments, const unsigned grid[3],
                const unsigned block[3], bool reversed);

}  // namespace on_host
