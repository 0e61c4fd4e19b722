// The shipped kernels in the current CUDA context, through the CUDA driver alone.
#pragma once

namespace maskcast {

// Loads the kernels into the calling thread's current context, once for each context. A launch also
// loads them, but that is not allowed in `enqueue` or while a stream is captured. Returns a status.
int load();

// Describes a status of `load` or `launch` in words.
const char* describe(int status);

}  // namespace maskcast
