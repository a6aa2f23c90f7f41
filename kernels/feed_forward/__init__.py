"""The feed-forward network, in chunks of the sequence."""

from kernels.feed_forward.api import feed_forward
