"""Feed-forward networks of experts, and products of sorted rows with one matrix per expert."""

from kernels.experts.api import choose, grouped_matmul
from kernels.experts.backend import Backend
from kernels.experts.feed_forward import Settings, expert_feed_forward
