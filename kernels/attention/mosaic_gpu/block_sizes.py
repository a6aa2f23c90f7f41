"""Block sizes of the Mosaic GPU kernels.

On an H100 with 16384 tokens, they were the fastest, or within 2% of it. On other GPUs,
`python -m experiments.benchmark tune` prints better rows.
"""

# Queries (or keys, for their gradients) per tile: 64 for each of two warpgroups.
TILE = 128
# Keys (key_value_grad: queries) per streamed block, and blocks in flight, by head_dim.
BLOCKS = {
  "forward": {64: (128, 4), 128: (128, 3), 256: (64, 2)},
  "query_grad": {64: (128, 3), 128: (64, 4), 256: (32, 3)},
  "key_value_grad": {64: (128, 3), 128: (64, 2), 256: (32, 2)},
}
