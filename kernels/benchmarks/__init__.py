"""What the kernels take on this machine, beside their peers in JAX."""

from kernels.benchmarks.attention import Shape
from kernels.benchmarks.attention import measure_attention
from kernels.benchmarks.attention import shapes
from kernels.benchmarks.decode import Cache
from kernels.benchmarks.decode import caches
from kernels.benchmarks.decode import measure_decode
from kernels.benchmarks.ring import measure_ring
from kernels.benchmarks.tune import KERNELS
from kernels.benchmarks.tune import measure_sizes
