"""Turn a program (an exported graph) back into layers.

Keras on its torch backend, ``torch.export`` programs, TorchScript archives and SavedModels
all end as graphs of ATen operators with loose tensors. Folding, int8 rounding and FX
quantization look for ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.Linear``; the passes here give
them back, in channels-first layout, and the result is compared with the original.
"""
