"""Attention for a sequence that is sharded over a ring of devices."""

from kernels.ring.attention import ring_attention
from kernels.ring.layout import Layout
from kernels.ring.work import blocks_per_device
