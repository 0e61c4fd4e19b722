"""TensorRT plugins: CUDA kernels, and the native library that contains them."""
