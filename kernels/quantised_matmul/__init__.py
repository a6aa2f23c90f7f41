"""Products with a matrix of 8-bit or 4-bit codes, which never exists in floats as a whole."""

from kernels.quantised_matmul.api import quantised_matmul
from kernels.quantised_matmul.matrix import (
  GRIDS,
  Grid,
  QuantizedMatrix,
  columns,
  dequantize,
  quantize,
)
