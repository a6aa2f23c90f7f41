"""The quantizers: latents to code vectors, and how gradients and code vectors change each other.

All end in a plain table of code vectors, and the code of a latent is the nearest vector of the
table, so that the file of a VQGAN, its codec and its tokens are the same for all of them.

moving_average  Code vectors are moving averages of the latents that they win (van den Oord et al.,
                arXiv 1711.00937, appendix A.1). A code that wins hardly any latents is replaced by
                a latent.
simvq           A frozen random table times a learnt linear layer (arXiv 2411.02038): a gradient
                moves all code vectors at once, so none is left behind.
ibq             Index backpropagation (arXiv 2412.02692): the gradient passes through a softmax over
                all codes, and reaches all of them.
fsq             Finite scalar quantization (arXiv 2309.15505): each channel is rounded to one of a
                few levels.

The functions run inside `jax.shard_map`: latents and codes are a device's part of the batch, `axes`
are the mesh axes that divide the batch, and everything else is the same on all devices.

Legend: L latents; V codes, in a block too; E codebook width; K blocks.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels.varying import vary_alike
from lwm.config.vqgan import VQGANConfig, VQGANLossConfig
from lwm.vision.vqgan import blocks_of, nearest_codes, straight_through

Leaves = dict[str, jax.Array]
Axes = tuple[str, ...]

# Codes whose soft assignments exist at the same time, for all latents of a device.
_CODES_PER_BLOCK = 1024


class Quantized(NamedTuple):
  """Latents after quantization.

  Attributes:
    vectors_LxE: the code vectors, with the gradients that the quantizer defines.
    codes_L: int32.
    commitment: what pulls the encoder to its codes; a scalar, the mean over the global batch.
    codebook: the loss of the trained leaves of the codebook; a scalar like it.
  """

  vectors_LxE: jax.Array
  codes_L: jax.Array
  commitment: jax.Array
  codebook: jax.Array


class Quantizer(Protocol):
  """What the objective knows of a quantizer; `leaves` are its arrays by name.

  Attributes:
    trained: names of the leaves that gradients train. `update` changes the others.
  """

  @property
  def trained(self) -> tuple[str, ...]: ...

  def init(self, key: jax.Array) -> Leaves:
    """The leaves before the first step."""
    ...

  def table(self, leaves: Leaves) -> jax.Array:
    """The code vectors [V, E]."""
    ...

  def quantize(self, leaves: Leaves, latents_LxE: jax.Array, axes: Axes) -> Quantized: ...

  def update(
    self, leaves: Leaves, latents_LxE: jax.Array, codes_L: jax.Array, key: jax.Array, axes: Axes
  ) -> Leaves:
    """The next values of the leaves that gradients do not train."""
    ...


@dataclasses.dataclass(frozen=True)
class MovingAverage:
  """VQ by moving averages. Leaves: for each code, averages over batches of its wins and their sum.

  No gradient reaches the code vectors. They start as latents of the first batch: codes without wins
  are replaced.
  """

  num_codes: int
  width: int
  decay: float
  restart_share: float
  trained: tuple[str, ...] = ()

  def init(self, key: jax.Array) -> Leaves:
    del key
    zeros_VxE = jnp.zeros((self.num_codes, self.width))
    return {"counts": jnp.zeros(self.num_codes), "sums": zeros_VxE}

  def table(self, leaves: Leaves) -> jax.Array:
    counts_V = leaves["counts"]
    return leaves["sums"] / jnp.where(counts_V > 0, counts_V, 1.0)[:, None]

  def quantize(self, leaves: Leaves, latents_LxE: jax.Array, axes: Axes) -> Quantized:
    table_VxE = jax.lax.stop_gradient(self.table(leaves))
    codes_L = nearest_codes(latents_LxE, table_VxE)
    vectors_LxE = table_VxE[codes_L]
    commitment = jax.lax.pmean(jnp.square(latents_LxE - vectors_LxE).mean(), axes)
    vectors_LxE = straight_through(latents_LxE, vectors_LxE)
    return Quantized(vectors_LxE, codes_L, commitment, jnp.zeros(()))

  def update(
    self, leaves: Leaves, latents_LxE: jax.Array, codes_L: jax.Array, key: jax.Array, axes: Axes
  ) -> Leaves:
    wins_V = count_wins(codes_L, self.num_codes, axes)
    sums_VxE = jax.lax.psum(jax.ops.segment_sum(latents_LxE, codes_L, self.num_codes), axes)
    counts_V = self.decay * leaves["counts"] + (1.0 - self.decay) * wins_V
    sums_VxE = self.decay * leaves["sums"] + (1.0 - self.decay) * sums_VxE
    even = wins_V.sum() / self.num_codes
    # Before the first step, all codes are dead.
    dead_V = (counts_V < self.restart_share * even) | (leaves["counts"].sum() == 0)
    fresh_VxE = draw(latents_LxE, self.num_codes, key, axes)
    return {
      "counts": jnp.where(dead_V, even, counts_V),
      "sums": jnp.where(dead_V[:, None], fresh_VxE * even, sums_VxE),
    }


def count_wins(codes_L: jax.Array, num_codes: int, axes: Axes) -> jax.Array:
  """The number of latents of the global batch that each code wins, float32 [V]."""
  return jax.lax.psum(jax.ops.segment_sum(jnp.ones(len(codes_L)), codes_L, num_codes), axes)


def draw(latents_LxE: jax.Array, count: int, key: jax.Array, axes: Axes) -> jax.Array:
  """Latents of the global batch drawn at random, [count, E]; the same for any division of it."""
  here = len(latents_LxE)
  chosen = jax.random.randint(key, (count,), 0, here * jax.lax.axis_size(axes))
  chosen -= here * jax.lax.axis_index(axes)
  is_here = (chosen >= 0) & (chosen < here)
  drawn = jnp.where(is_here[:, None], latents_LxE[jnp.clip(chosen, 0, here - 1)], 0.0)
  return jax.lax.psum(drawn, axes)


def make_quantizer(config: VQGANConfig, losses: VQGANLossConfig) -> Quantizer:
  """The quantizer that the settings name."""
  return MovingAverage(
    config.codebook_size, config.codebook_width, losses.codebook_decay, losses.restart_share
  )
