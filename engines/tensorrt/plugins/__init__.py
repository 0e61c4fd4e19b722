"""TensorRT plugins: CUDA kernels and their IPluginV3 faces."""
