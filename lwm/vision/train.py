"""Training of a VQGAN on frames.

The loss is L1 + L2 of the pixels and the commitment of the encoder to its codes. The code vectors
are moving averages of the latents that they win (van den Oord et al., arXiv 1711.00937, appendix
A.1), start from clusters of the latents after a stretch without quantization, and start anew from a
latent when they win none, so that no code stays dead. Left out, against the VQGAN of LWM: the
discriminator and the perceptual loss, which need more steps, and pretrained weights, than the small
size here is given. What comes out is recognisable and somewhat blurred.

Legend: N frames, B frames in a batch, H, W pixels; h, w grid; L latents; V codes; E codebook width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lwm.config.vqgan import VQGANConfig, VQGANTrainingConfig
from lwm.vision.codec import to_pixels
from lwm.vision.vqgan import VQGAN, Codebook, nearest_codes, straight_through

# Latents that the codebook's first clusters are made of, and rounds of k-means over them.
_CLUSTER_LATENTS_PER_CODE = 64
_CLUSTER_ROUNDS = 10


class TrainState(NamedTuple):
  params: nnx.State
  # Moving averages, over batches, of the latents won by each code: their number and their sum.
  counts_V: jax.Array
  sums_VxE: jax.Array
  optimizer: optax.OptState


class Metrics(NamedTuple):
  """Of one batch: losses as scalars, and the number of latents won by each code."""

  reconstruction: jax.Array
  commitment: jax.Array
  wins_V: jax.Array


def losses(
  model: VQGAN, pixels_BxHxWx3: jax.Array, quantize: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Reconstruction and commitment losses (scalars), codes [B, h, w], latents [B, h, w, E].

  Args:
    model: the VQGAN.
    pixels_BxHxWx3: float32 in [-1, 1].
    quantize: bool scalar; False passes the latents on as they are.
  """
  latents_BxhxwxE = model.latents(pixels_BxHxWx3)
  codebook_VxE = model.codebook[...]
  codes_Bxhxw = nearest_codes(latents_BxhxwxE, codebook_VxE)
  quantized_BxhxwxE = jax.lax.stop_gradient(
    jnp.where(quantize, codebook_VxE[codes_Bxhxw], latents_BxhxwxE)
  )
  output_BxHxWx3 = model.reconstruct(straight_through(latents_BxhxwxE, quantized_BxhxwxE))
  error_BxHxWx3 = output_BxHxWx3 - pixels_BxHxWx3
  reconstruction = jnp.abs(error_BxHxWx3).mean() + jnp.square(error_BxHxWx3).mean()
  commitment = jnp.square(latents_BxhxwxE - quantized_BxhxwxE).mean()
  return reconstruction, commitment, codes_Bxhxw, latents_BxhxwxE


def cluster(latents_LxE: jax.Array, num_codes: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """k-means from random latents; returns the latents won by each code [V] and the centres [V, E].

  A code that wins nothing keeps its place.
  """
  chosen = jax.random.choice(key, len(latents_LxE), (num_codes,), replace=False)

  def move(_, centres_VxE):
    wins_V, sums_VxE = tally(latents_LxE, nearest(latents_LxE, centres_VxE), num_codes)
    means_VxE = sums_VxE / jnp.maximum(wins_V, 1.0)[:, None]
    return jnp.where(wins_V[:, None] > 0, means_VxE, centres_VxE)

  def nearest(latents_LxE, centres_VxE):
    return nearest_codes(latents_LxE[None, None], centres_VxE)[0, 0]

  centres_VxE = jax.lax.fori_loop(0, _CLUSTER_ROUNDS, move, latents_LxE[chosen])
  wins_V, _ = tally(latents_LxE, nearest(latents_LxE, centres_VxE), num_codes)
  return wins_V, centres_VxE


def tally(
  latents_LxE: jax.Array, codes_L: jax.Array, num_codes: int
) -> tuple[jax.Array, jax.Array]:
  """For each code, how many latents it wins [V] and their sum [V, E]; float32."""
  wins_V = jax.ops.segment_sum(jnp.ones(len(codes_L)), codes_L, num_codes)
  return wins_V, jax.ops.segment_sum(latents_LxE, codes_L, num_codes)


def train(
  frames_NxHxWx3: np.ndarray,
  config: VQGANConfig,
  training: VQGANTrainingConfig,
  seed: int,
  report: Callable[[int, Metrics], None] = lambda step, metrics: None,
) -> nnx.State:
  """Trains a VQGAN on frames, each batch drawn at random and half of it mirrored.

  Args:
    frames_NxHxWx3: uint8, of the config's resolution.
    config: sizes.
    training: steps and rates.
    seed: of everything drawn. Same frames, configs, seed and machine: same result.
    report: called after every step with its number from 1 and its metrics.

  Returns:
    All variables of the model, for `save_vqgan`.

  Raises:
    ValueError: settings that do not go together.
  """
  config.validate()
  training.validate()
  model = VQGAN(config, rngs=nnx.Rngs(seed))
  graph, params, codebook = nnx.split(model, nnx.Param, Codebook)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, training.peak_learning_rate, training.warmup_steps, training.steps
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
  num_codes = config.codebook_size

  def assemble(params, state_sums_VxE, state_counts_V):
    vectors_VxE = state_sums_VxE / state_counts_V[:, None]
    return nnx.merge(graph, params, jax.tree.map(lambda _: vectors_VxE, codebook))

  @jax.jit
  def step(state: TrainState, frames_BxHxWx3, quantize, key) -> tuple[TrainState, Metrics]:
    def objective(params):
      model = assemble(params, state.sums_VxE, state.counts_V)
      reconstruction, commitment, codes, latents = losses(
        model, to_pixels(frames_BxHxWx3), quantize
      )
      total = reconstruction + training.commitment_weight * commitment
      return total, (reconstruction, commitment, codes, latents)

    gradients, (reconstruction, commitment, codes, latents) = jax.grad(objective, has_aux=True)(
      state.params
    )
    updates, optimizer_state = optimizer.update(gradients, state.optimizer)
    params = optax.apply_updates(state.params, updates)

    latents_LxE = latents.reshape(-1, latents.shape[-1])
    wins_V, sums_VxE = tally(latents_LxE, codes.reshape(-1), num_codes)
    decay = training.codebook_decay
    new_counts_V = decay * state.counts_V + (1.0 - decay) * wins_V
    new_sums_VxE = decay * state.sums_VxE + (1.0 - decay) * sums_VxE
    even = len(latents_LxE) / num_codes
    dead_V = new_counts_V < training.restart_share * even
    fresh_VxE = latents_LxE[jax.random.randint(key, (num_codes,), 0, len(latents_LxE))]
    new_counts_V = jnp.where(dead_V, even, new_counts_V)
    new_sums_VxE = jnp.where(dead_V[:, None], fresh_VxE * even, new_sums_VxE)
    state = TrainState(
      params,
      jnp.where(quantize, new_counts_V, state.counts_V),
      jnp.where(quantize, new_sums_VxE, state.sums_VxE),
      optimizer_state,
    )
    return state, Metrics(reconstruction, commitment, wins_V)

  @jax.jit
  def first_codebook(state: TrainState, frames_BxHxWx3, key) -> TrainState:
    model = nnx.merge(graph, state.params, codebook)
    latents_BxhxwxE = model.latents(to_pixels(frames_BxHxWx3))
    latents_LxE = latents_BxhxwxE.reshape(-1, latents_BxhxwxE.shape[-1])
    wins_V, centres_VxE = cluster(latents_LxE, num_codes, key)
    counts_V = (wins_V + 1.0) * (training.batch_size / len(frames_BxHxWx3))
    return state._replace(counts_V=counts_V, sums_VxE=centres_VxE * counts_V[:, None])

  random = np.random.default_rng(seed)
  key = jax.random.key(seed)
  state = TrainState(
    params, jnp.ones(num_codes), jax.tree.leaves(codebook)[0], optimizer.init(params)
  )
  cluster_frames = -(-_CLUSTER_LATENTS_PER_CODE * num_codes // config.grid**2)
  for number in range(training.steps):
    if number == training.continuous_steps:
      chosen = random.choice(len(frames_NxHxWx3), cluster_frames)
      state = first_codebook(state, frames_NxHxWx3[chosen], jax.random.fold_in(key, training.steps))
    batch_BxHxWx3 = frames_NxHxWx3[random.integers(len(frames_NxHxWx3), size=training.batch_size)]
    mirrored = random.random(training.batch_size) < 0.5
    batch_BxHxWx3 = np.where(
      mirrored[:, None, None, None], batch_BxHxWx3[:, :, ::-1], batch_BxHxWx3
    )
    state, metrics = step(
      state, batch_BxHxWx3, number >= training.continuous_steps, jax.random.fold_in(key, number)
    )
    report(number + 1, metrics)
  return nnx.state(assemble(state.params, state.sums_VxE, state.counts_V))
