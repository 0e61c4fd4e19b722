// The shipped kernels in the current CUDA context, through the CUDA driver alone.
#pragma once

namespace maskcast {

// Loads the kernels into the calling thread's current context, once for each context. Launching does
// so as well, but it may not happen in `enqueue` nor while a stream is captured. Returns a status.
int load();

// Says in words what a status of `load` or `launch` means.
const char* describe(int status);

}  // namespace maskcast
