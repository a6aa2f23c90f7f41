"""Block sizes of the Mosaic GPU kernels.

They were chosen without a GPU: the largest blocks that fit the shared memory and the registers, as
`python -m tests.kernels.compile_for_gpu` shows. None has been timed. On a Hopper GPU,
`python -m experiments.benchmark tune` prints better rows.
"""

# Queries (or keys, for their gradients) per tile: 64 for each of two warpgroups.
TILE = 128
# Keys (key_value_grad: queries) per streamed block, and blocks in flight, by head_dim.
BLOCKS = {
  "forward": {64: (128, 4), 128: (128, 2), 256: (64, 2)},
  "query_grad": {64: (128, 3), 128: (64, 3), 256: (32, 3)},
  "key_value_grad": {64: (64, 4), 128: (64, 3), 256: (32, 2)},
}
