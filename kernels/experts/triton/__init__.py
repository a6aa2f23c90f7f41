"""The grouped product on NVIDIA GPUs in Triton."""

from kernels.experts.triton.backend import TRITON
