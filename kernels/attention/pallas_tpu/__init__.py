"""Attention on TPUs in Pallas (Mosaic TPU)."""

from kernels.attention.pallas_tpu.backend import PALLAS_TPU
