"""Frames encoded inside a step: the codec's codes, and no device holds a whole row."""

import math
import re

import jax
import numpy as np
import pytest

from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules
from lwm.vision.codec import Codec
from lwm.vision.in_step import fill_in_codes
from tests.lwm import films

B, N, TEXT_VOCAB = 2, 8, 300


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh_config",
  [MeshConfig(data=2, fsdp=1, ring=2, tensor=2), MeshConfig(fsdp=1, ring=4, ulysses=2)],
)
def test_codes_go_to_their_columns_by_permutes_alone(mesh_config, tmp_path):
  codec = Codec(films.write_vqgan(tmp_path / "vqgan.npz"))
  side, per_frame = codec.config.resolution, codec.config.grid**2
  frames = films.frames(B * N, size=(side, side)).reshape(B, N, side, side, 3)
  codes = codec.encode(frames.reshape(B * N, side, side, 3)).reshape(B, N * per_frame)

  # Columns in an order of their own: text before, between and after frames, zigzag or not.
  rng = np.random.default_rng(0)
  columns = N * per_frame + 56 - N * per_frame % 8
  index = np.full((B, columns), -1, np.int32)
  for row in index:
    row[np.sort(rng.permutation(columns)[: N * per_frame])] = np.arange(N * per_frame)
    row[:] = np.roll(row, 7 * columns // 16)
  tokens = rng.integers(0, TEXT_VOCAB, index.shape, np.int32)
  expected = np.where(
    index < 0, tokens, TEXT_VOCAB + np.take_along_axis(codes, np.maximum(index, 0), 1)
  )

  mesh, rules = make_mesh(mesh_config), ShardingRules()
  with jax.set_mesh(mesh):
    sharded = [
      jax.device_put(array, jax.NamedSharding(mesh, rules.spec(*axes)))
      for array, axes in (
        (frames, ("batch", "residual")),
        (tokens, ("batch", "sequence")),
        (index, ("batch", "sequence")),
      )
    ]
    state = jax.device_put(codec.state, jax.NamedSharding(mesh, jax.P()))

    @jax.jit
    def step(state, frames, tokens, index):
      return fill_in_codes(
        codec, state, frames, tokens, index, text_vocab_size=TEXT_VOCAB, frames_per_call=4
      )

    compiled = step.lower(state, *sharded).compile()
    filled = compiled(state, *sharded)
  np.testing.assert_array_equal(filled, expected)
  assert filled.sharding.spec == rules.spec("batch", "sequence")

  program = compiled.as_text()
  assert "collective-permute" in program
  assert not re.search("all-gather|all-reduce|all-to-all|reduce-scatter", program)
  rows = B // math.prod(mesh.shape[axis] for axis in rules.batch)
  # No array has the pixels of a whole row, in any shape.
  sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"\bu8\[([\d,]+)\]", program)]
  assert 0 < max(sizes) < rows * frames[0].size
