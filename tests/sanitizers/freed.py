"""Hands the kernels a teacher whose memory was freed.

``scripts/sanitize`` wants to see this reported before it believes that there is nothing to report.
"""

import ctypes
import os

import torch

import kdkernels as kd

assert kd.backends.cpu.isa() == os.environ["KDKERNELS_CPU_ISA"]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
address = libc.malloc(4 * 64)
teacher = torch.frombuffer((ctypes.c_char * 256).from_address(address), dtype=torch.float32).view(1, 64)
teacher.zero_()
libc.free(address)
kd.kd_loss(torch.zeros(1, 64), teacher, backend="cpu")
print("read")
