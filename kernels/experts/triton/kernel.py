"""The Triton kernels of the grouped product.

`product` has one program per visit (`kernels.experts.visits`) and block of outputs. Programs that
start together share the weights of a group and the rows of a few visits, so that both stay in the
L2 cache. `outer` has one program per group and block of its matrix, which loops over the group's
rows. Both accumulate in float32.

Arrays are row-major. Offsets of rows and groups are int64, offsets inside a block int32. R rows,
E groups (experts), V visits, I inputs, O outputs; r rows, i inputs and o outputs per block.
"""

import triton
import triton.language as tl

# Visits whose blocks of outputs are computed together.
BAND = tl.constexpr(8)


@triton.jit
def product(
  x_RxI: tl.tensor,
  weight_E: tl.tensor,
  group_V: tl.tensor,
  block_V: tl.tensor,
  start_E: tl.tensor,
  stop_E: tl.tensor,
  num_visits_1: tl.tensor,
  out_RxO: tl.tensor,
  INPUTS: tl.constexpr,
  OUTPUTS: tl.constexpr,
  IS_TRANSPOSED: tl.constexpr,
  ROW_BLOCK: tl.constexpr,
  INPUT_BLOCK: tl.constexpr,
  OUTPUT_BLOCK: tl.constexpr,
  PRECISION: tl.constexpr,
) -> None:
  """Grid (V * O blocks). A matrix is [I, O], or [O, I] if `IS_TRANSPOSED`.

  Rows without a group are not written.
  """
  num_columns = OUTPUTS // OUTPUT_BLOCK
  most_visits = tl.num_programs(0) // num_columns
  first_visit = tl.program_id(0) // (BAND * num_columns) * BAND
  in_band = tl.program_id(0) % (BAND * num_columns)
  visits_in_band = tl.minimum(most_visits - first_visit, BAND)
  visit = first_visit + in_band % visits_in_band
  column = in_band // visits_in_band
  if visit < tl.load(num_visits_1):
    group = tl.load(group_V + visit).to(tl.int64)
    row_r = tl.load(block_V + visit).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    is_own_r = (row_r >= tl.load(start_E + group)) & (row_r < tl.load(stop_E + group))
    index_i = tl.arange(0, INPUT_BLOCK)
    index_o = column * OUTPUT_BLOCK + tl.arange(0, OUTPUT_BLOCK)
    x_rxi = x_RxI + row_r[:, None] * INPUTS + index_i[None, :]
    weight = weight_E + group * (INPUTS * OUTPUTS)
    if IS_TRANSPOSED:
      weight_ixo = weight + index_i[:, None] + index_o[None, :] * INPUTS
    else:
      weight_ixo = weight + index_i[:, None] * OUTPUTS + index_o[None, :]
    step = INPUT_BLOCK if IS_TRANSPOSED else INPUT_BLOCK * OUTPUTS
    out_rxo = tl.full((ROW_BLOCK, OUTPUT_BLOCK), 0.0, tl.float32)
    for _ in range(INPUTS // INPUT_BLOCK):
      own_x_rxi = tl.load(x_rxi, mask=is_own_r[:, None], other=0.0)
      out_rxo = tl.dot(own_x_rxi, tl.load(weight_ixo), out_rxo, input_precision=PRECISION)
      x_rxi += INPUT_BLOCK
      weight_ixo += step
    offsets_rxo = row_r[:, None] * OUTPUTS + index_o[None, :]
    out_rxo = out_rxo.to(out_RxO.dtype.element_ty)
    tl.store(out_RxO + offsets_rxo, out_rxo, mask=is_own_r[:, None])


@triton.jit
def outer(
  x_RxI: tl.tensor,
  y_RxO: tl.tensor,
  start_E: tl.tensor,
  stop_E: tl.tensor,
  out_ExIxO: tl.tensor,
  INPUTS: tl.constexpr,
  OUTPUTS: tl.constexpr,
  ROW_BLOCK: tl.constexpr,
  INPUT_BLOCK: tl.constexpr,
  OUTPUT_BLOCK: tl.constexpr,
  PRECISION: tl.constexpr,
) -> None:
  """Grid (I blocks * O blocks, E). Empty groups give 0."""
  num_columns = OUTPUTS // OUTPUT_BLOCK
  group = tl.program_id(1)
  start, stop = tl.load(start_E + group), tl.load(stop_E + group)
  index_i = tl.program_id(0) // num_columns * INPUT_BLOCK + tl.arange(0, INPUT_BLOCK)
  index_o = tl.program_id(0) % num_columns * OUTPUT_BLOCK + tl.arange(0, OUTPUT_BLOCK)
  out_ixo = tl.full((INPUT_BLOCK, OUTPUT_BLOCK), 0.0, tl.float32)
  for first in range(start, stop, ROW_BLOCK):
    row_r = first + tl.arange(0, ROW_BLOCK)
    is_own_rx1 = (row_r < stop)[:, None]
    row_rx1 = row_r.to(tl.int64)[:, None]
    x_rxi = tl.load(x_RxI + row_rx1 * INPUTS + index_i[None, :], mask=is_own_rx1, other=0.0)
    y_rxo = tl.load(y_RxO + row_rx1 * OUTPUTS + index_o[None, :], mask=is_own_rx1, other=0.0)
    out_ixo = tl.dot(tl.trans(x_rxi), y_rxo, out_ixo, input_precision=PRECISION)
  offsets_ixo = index_i[:, None] * OUTPUTS + index_o[None, :]
  tl.store(out_ExIxO + group.to(tl.int64) * (INPUTS * OUTPUTS) + offsets_ixo, out_ixo)
