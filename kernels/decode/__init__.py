"""Attention of a few query tokens to a long cache of keys and values."""

from kernels.decode.api import decode_attention
from kernels.decode.cache import (
  STRETCH,
  Cached,
  Quantized,
  dequantize,
  local_length,
  quantize,
  whole_length,
  write,
)
