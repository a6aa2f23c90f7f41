"""Feed-forward network in blocks of the sequence."""

from kernels.feed_forward.api import feed_forward
