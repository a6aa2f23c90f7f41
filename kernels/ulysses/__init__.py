"""Attention for a sequence that is sharded over two mesh axes."""

from kernels.ulysses.attention import ulysses_attention
