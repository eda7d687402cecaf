"""The Open Inference Protocol, version 2: its messages and tensors. No HTTP and no torch."""
