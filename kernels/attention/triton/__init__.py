"""Attention on NVIDIA GPUs in Triton."""

from kernels.attention.triton.backend import TRITON
