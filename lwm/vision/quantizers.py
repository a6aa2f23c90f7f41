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
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels.varying import vary_trees_alike
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


@dataclasses.dataclass(frozen=True)
class SimVQ:
  """A frozen random table times a learnt linear layer.

  Leaves: the table; the layer's projection [E, E], which starts as the identity, and bias [E].
  """

  num_codes: int
  width: int
  trained: tuple[str, ...] = ("projection", "bias")

  def init(self, key: jax.Array) -> Leaves:
    return {
      "table": _random_table(key, self.num_codes, self.width),
      "projection": jnp.eye(self.width),
      "bias": jnp.zeros(self.width),
    }

  def table(self, leaves: Leaves) -> jax.Array:
    return leaves["table"] @ leaves["projection"] + leaves["bias"]

  def quantize(self, leaves: Leaves, latents_LxE: jax.Array, axes: Axes) -> Quantized:
    table_VxE = self.table(leaves)
    codes_L = nearest_codes(latents_LxE, table_VxE)
    vectors_LxE = table_VxE[codes_L]
    commitment, codebook = _attraction(latents_LxE, vectors_LxE, axes)
    return Quantized(straight_through(latents_LxE, vectors_LxE), codes_L, commitment, codebook)

  def update(
    self, leaves: Leaves, latents_LxE: jax.Array, codes_L: jax.Array, key: jax.Array, axes: Axes
  ) -> Leaves:
    del latents_LxE, codes_L, key, axes
    return {"table": leaves["table"]}


@dataclasses.dataclass(frozen=True)
class IndexBackpropagation:
  """IBQ: the code vector of the nearest code, with the gradient of the mean under a softmax.

  The softmax is of the negative squared distances over the temperature. (The paper uses inner
  products. With distances, the likeliest code is the nearest one, as for the other quantizers.)
  The codebook's loss attracts the code vectors to their latents, and adds `entropy_weight` times
  the mean entropy of the assignments minus the entropy of the mean assignment: a latent should
  choose one code, and the batch should use all of them.

  Leaves: the table, which gradients train.
  """

  num_codes: int
  width: int
  temperature: float
  entropy_weight: float
  trained: tuple[str, ...] = ("table",)

  def init(self, key: jax.Array) -> Leaves:
    return {"table": _random_table(key, self.num_codes, self.width)}

  def table(self, leaves: Leaves) -> jax.Array:
    return leaves["table"]

  def quantize(self, leaves: Leaves, latents_LxE: jax.Array, axes: Axes) -> Quantized:
    table_VxE = leaves["table"]
    codes_L = nearest_codes(latents_LxE, table_VxE)
    hard_LxE = table_VxE[codes_L]
    soft_LxE, entropy_L, mean_V = soft_assignment(latents_LxE, table_VxE, self.temperature)
    mean_V = jax.lax.pmean(mean_V, axes)
    mean_entropy = -(mean_V * jnp.log(mean_V + 1e-12)).sum()
    penalty = jax.lax.pmean(entropy_L.mean(), axes) - mean_entropy
    commitment, codebook = _attraction(latents_LxE, hard_LxE, axes)
    return Quantized(
      hard_LxE + soft_LxE - jax.lax.stop_gradient(soft_LxE),
      codes_L,
      commitment,
      codebook + self.entropy_weight * penalty,
    )

  def update(
    self, leaves: Leaves, latents_LxE: jax.Array, codes_L: jax.Array, key: jax.Array, axes: Axes
  ) -> Leaves:
    del leaves, latents_LxE, codes_L, key, axes
    return {}


@dataclasses.dataclass(frozen=True)
class FiniteScalar:
  """FSQ: channel i takes the nearest of levels[i] values, evenly spaced from -1 to 1. No leaves.

  The paper bounds latents by tanh. Here, those outside [-1, 1] take the outermost value, and the
  commitment loss is how far outside they are, squared. So rounding is the search for the nearest
  vector in the table of all combinations, which is what a VQGAN's file holds.
  """

  levels: tuple[int, ...]
  trained: tuple[str, ...] = ()

  def init(self, key: jax.Array) -> Leaves:
    del key
    return {}

  def table(self, leaves: Leaves) -> jax.Array:
    del leaves
    codes_V = jnp.arange(math.prod(self.levels))
    digits = [codes_V // place % level for place, level in zip(self._places, self.levels)]
    return self._values(jnp.stack(digits, axis=-1))

  def quantize(self, leaves: Leaves, latents_LxE: jax.Array, axes: Axes) -> Quantized:
    del leaves
    inside_LxE = jnp.clip(latents_LxE, -1.0, 1.0)
    digits_LxE = jnp.round((inside_LxE + 1.0) * (0.5 * self._steps)).astype(jnp.int32)
    codes_L = (digits_LxE * jnp.array(self._places)).sum(-1)
    commitment = jax.lax.pmean(jnp.square(latents_LxE - inside_LxE).mean(), axes)
    vectors_LxE = straight_through(latents_LxE, self._values(digits_LxE))
    return Quantized(vectors_LxE, codes_L, commitment, jnp.zeros(()))

  def update(
    self, leaves: Leaves, latents_LxE: jax.Array, codes_L: jax.Array, key: jax.Array, axes: Axes
  ) -> Leaves:
    del leaves, latents_LxE, codes_L, key, axes
    return {}

  def _values(self, digits: jax.Array) -> jax.Array:
    return digits * (2.0 / self._steps) - 1.0

  @property
  def _steps(self) -> jax.Array:
    return jnp.array(self.levels, jnp.float32) - 1.0

  @property
  def _places(self) -> list[int]:
    """What a digit counts in a code: the first channel changes fastest."""
    return [math.prod(self.levels[:channel]) for channel in range(len(self.levels))]


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


def soft_assignment(
  latents_LxE: jax.Array, table_VxE: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Softmax over codes of the negative squared distances, without ever holding it as a whole.

  Probabilities exist for one block of codes at a time, backwards too: a block is computed again
  for its gradient.

  Args:
    latents_LxE: the queries.
    table_VxE: all codes.
    temperature: distances are divided by it.

  Returns:
    The mean code vector of each latent [L, E], with the gradient of the softmax alone; the entropy
    of each latent's softmax [L] in nats; and the mean of the softmax over the latents [V].
  """
  size = min(len(table_VxE), _CODES_PER_BLOCK)
  # The padding is so far away that its probability is 0.
  squares_KxV = blocks_of(jnp.square(table_VxE).sum(-1), size, 1e30)
  blocks = blocks_of(table_VxE, size), squares_KxV

  def logits(latents_LxE, block):
    vectors_VxE, squares_V = block
    # The latent's own square is the same for every code, so it is left out.
    return (2.0 * latents_LxE @ vectors_VxE.T - squares_V) / temperature

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def normaliser(latents_LxE, block):
    return jax.nn.logsumexp(logits(latents_LxE, block), axis=-1)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def terms(latents_LxE, total_L, block):
    logits_LxV = logits(latents_LxE, block)
    share_LxV = jnp.exp(logits_LxV - total_L[:, None])
    vectors_VxE = jax.lax.stop_gradient(block[0])
    return share_LxV @ vectors_VxE, (share_LxV * logits_LxV).sum(-1), share_LxV.mean(0)

  totals_KxL = jax.lax.map(functools.partial(normaliser, latents_LxE), blocks)
  total_L = jax.nn.logsumexp(totals_KxL, axis=0)

  def add(sums, block):
    vectors_LxE, logits_L, mean_V = terms(latents_LxE, total_L, block)
    return (sums[0] + vectors_LxE, sums[1] + logits_L), mean_V

  zeros, _ = vary_trees_alike((jnp.zeros_like(latents_LxE), jnp.zeros_like(total_L)), total_L)
  (soft_LxE, logits_L), mean_KxV = jax.lax.scan(add, zeros, blocks)
  return soft_LxE, total_L - logits_L, mean_KxV.reshape(-1)[: len(table_VxE)]


def _random_table(key: jax.Array, num_codes: int, width: int) -> jax.Array:
  """Vectors of length 1 on average."""
  return jax.random.normal(key, (num_codes, width)) * width**-0.5


def _attraction(
  latents_LxE: jax.Array, vectors_LxE: jax.Array, axes: Axes
) -> tuple[jax.Array, jax.Array]:
  """Mean squared distances over the global batch: one moves the latents, one the code vectors."""
  fixed = jax.lax.stop_gradient
  commitment = jnp.square(latents_LxE - fixed(vectors_LxE)).mean()
  codebook = jnp.square(fixed(latents_LxE) - vectors_LxE).mean()
  return jax.lax.pmean(commitment, axes), jax.lax.pmean(codebook, axes)


def make_quantizer(config: VQGANConfig, losses: VQGANLossConfig) -> Quantizer:
  """The quantizer that the settings name."""
  size = config.codebook_size, config.codebook_width
  match losses.quantizer:
    case "simvq":
      return SimVQ(*size)
    case "ibq":
      return IndexBackpropagation(*size, losses.temperature, losses.entropy_weight)
    case "fsq":
      return FiniteScalar(losses.levels)
  return MovingAverage(*size, losses.codebook_decay, losses.restart_share)
