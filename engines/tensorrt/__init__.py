"""The GPU engine, on TensorRT."""
