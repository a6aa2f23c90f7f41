"""Attention where each query row sees one interval of keys."""

from kernels.attention.api import attention
from kernels.attention.backend import SAVED_NAMES, Backend
from kernels.attention.intervals import KeyIntervals, causal, mask, packed, windowed, within
from kernels.attention.merge import merge
