"""The quantized product on TPUs in Pallas."""

from kernels.quantised_matmul.pallas_tpu.backend import PALLAS_TPU
