"""The portable ONNX graphs: export, operators, precision, quantisation."""
