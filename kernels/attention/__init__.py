"""Attention over key intervals."""

from kernels.attention.api import attention
from kernels.attention.backend import SAVED_NAMES
from kernels.attention.backend import Backend
from kernels.attention.intervals import KeyIntervals
from kernels.attention.intervals import causal
from kernels.attention.intervals import mask
from kernels.attention.intervals import packed
from kernels.attention.intervals import within
from kernels.attention.merge import merge
