"""TensorRT plans from the portable graphs."""
