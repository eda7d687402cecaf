"""An interpreter of Core ML's MIL programs in PyTorch, so that they run on Linux.

It gives the program's meaning (``semantic parity``). What Apple's hardware adds, such as
the accumulation order of the Neural Engine, only a device can show.
"""
