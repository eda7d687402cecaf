"""What runs a model's arithmetic: PyTorch as it is, compiled, or OpenVINO."""
