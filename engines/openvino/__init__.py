"""The CPU engine, on OpenVINO."""
