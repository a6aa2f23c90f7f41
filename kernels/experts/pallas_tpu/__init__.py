"""The grouped product on TPUs in Pallas."""

from kernels.experts.pallas_tpu.backend import PALLAS_TPU
