"""TensorRT plans from the portable graphs; the compilation of kernels and plugins."""
