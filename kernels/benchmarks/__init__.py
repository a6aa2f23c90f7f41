"""What the kernels take on this machine, beside their peers in JAX."""

from kernels.benchmarks.attention import Shape, measure_attention, shapes
from kernels.benchmarks.decode import Cache, caches, measure_decode
from kernels.benchmarks.ring import measure_ring
from kernels.benchmarks.tune import KERNELS, measure_sizes
