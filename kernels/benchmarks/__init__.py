"""What the kernels take on this machine, beside their peers in JAX."""

from kernels.benchmarks.attention import Shape
from kernels.benchmarks.attention import measure_attention
from kernels.benchmarks.attention import shapes
from kernels.benchmarks.decode import measure_decode
from kernels.benchmarks.ring import measure_ring
