"""Decode attention on NVIDIA GPUs in Triton."""

from kernels.decode.triton.backend import TRITON
