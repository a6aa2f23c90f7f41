"""Decode attention on TPUs in Pallas (Mosaic TPU)."""

from kernels.decode.pallas_tpu.backend import PALLAS_TPU
