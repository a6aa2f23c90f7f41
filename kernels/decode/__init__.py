"""Attention of one or a few query tokens to a long cache of keys and values."""

from kernels.decode.api import decode_attention
from kernels.decode.cache import Quantized
from kernels.decode.cache import dequantize
from kernels.decode.cache import quantize
from kernels.decode.cache import whole_length
from kernels.decode.cache import write
