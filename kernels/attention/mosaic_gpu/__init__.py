"""Attention on NVIDIA Hopper GPUs in Pallas (Mosaic GPU)."""

from kernels.attention.mosaic_gpu.backend import MOSAIC_GPU
