"""The speed of the kernels on this machine, next to JAX's own implementations."""

from kernels.benchmarks.attention import Shape, measure_attention, shapes
from kernels.benchmarks.decode import Cache, caches, measure_decode
from kernels.benchmarks.experts import groups, measure_grouped
from kernels.benchmarks.quantised import Product, measure_quantised, products
from kernels.benchmarks.ring import measure_ring
from kernels.benchmarks.tune import KERNELS, measure_sizes
