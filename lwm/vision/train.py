"""Training of a VQGAN on frames.

The loss is L1 + L2 of the pixels and the commitment of the encoder to its codes. The code vectors
are moving averages of the latents that they win (van den Oord et al., arXiv 1711.00937, appendix
A.1). Training starts without quantization; the code vectors then start from clusters of the
latents. A code that wins hardly any latents is replaced by a latent, so no code stays unused. LWM's
discriminator and perceptual loss are left out: they need more steps than the small size here is
given, and pretrained weights. Reconstructions are recognisable and somewhat blurred.

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
from lwm.errors import UserError
from lwm.vision.codec import to_pixels
from lwm.vision.vqgan import VQGAN, Codebook, nearest_codes, straight_through

# k-means, which makes the first code vectors: latents per code, and rounds.
_CLUSTER_LATENTS_PER_CODE = 64
_CLUSTER_ROUNDS = 10


class TrainState(NamedTuple):
  params: nnx.State
  # Moving averages over batches, for each code: how many latents it wins, and their sum.
  counts_V: jax.Array
  sums_VxE: jax.Array
  optimizer: optax.OptState


class Metrics(NamedTuple):
  """One batch's losses (scalars) and the number of latents that each code wins."""

  reconstruction: jax.Array
  commitment: jax.Array
  wins_V: jax.Array


def losses(
  model: VQGAN, pixels_BxHxWx3: jax.Array, quantize: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Reconstruction and commitment losses (scalars), codes [B, h, w], latents [B, h, w, E].

  Args:
    model: the VQGAN.
    pixels_BxHxWx3: float32 in the model's pixel range.
    quantize: bool scalar; False decodes the latents without quantization.
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

  A code that wins nothing keeps its centre.
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


class Programs:
  """What devices run to train one VQGAN.

  Attributes:
    latents: (params, uint8 frames [B, H, W, 3]) -> latents [B h w, E].
    first_codebook: (state, latents [L, E], key) -> state whose codes are clusters of the latents.
    step: (state, uint8 frames [B, H, W, 3], quantize, key) -> (state, Metrics).
  """

  def __init__(self, config: VQGANConfig, training: VQGANTrainingConfig):
    self._config, self._training = config, training
    model = nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0)))
    self._graph = nnx.graphdef(model)
    self._codebook = nnx.state(model, Codebook)
    schedule = optax.warmup_cosine_decay_schedule(
      0.0, training.peak_learning_rate, training.warmup_steps, training.steps
    )
    self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    self.latents = jax.jit(self._latents)
    self.first_codebook = jax.jit(self._first_codebook)
    self.step = jax.jit(self._step)

  def start(self, seed: int) -> TrainState:
    """The state before the first step."""
    model = VQGAN(self._config, rngs=nnx.Rngs(seed))
    params = nnx.state(model, nnx.Param)
    counts_V = jnp.ones(self._config.codebook_size)
    return TrainState(params, counts_V, model.codebook[...], self._optimizer.init(params))

  def model(self, params: nnx.State, vectors_VxE: jax.Array) -> VQGAN:
    """The VQGAN of these parameters and code vectors."""
    return nnx.merge(self._graph, params, jax.tree.map(lambda _: vectors_VxE, self._codebook))

  def _latents(self, params, frames_BxHxWx3):
    model = nnx.merge(self._graph, params, self._codebook)
    pixels_BxHxWx3 = to_pixels(frames_BxHxWx3, self._config.pixel_range)
    return model.latents(pixels_BxHxWx3).reshape(-1, self._config.codebook_width)

  def _first_codebook(self, state: TrainState, latents_LxE, key) -> TrainState:
    wins_V, centres_VxE = cluster(latents_LxE, self._config.codebook_size, key)
    frames = len(latents_LxE) // self._config.grid**2
    counts_V = (wins_V + 1.0) * (self._training.batch_size / frames)
    return state._replace(counts_V=counts_V, sums_VxE=centres_VxE * counts_V[:, None])

  def _step(self, state: TrainState, frames_BxHxWx3, quantize, key) -> tuple[TrainState, Metrics]:
    training, num_codes = self._training, self._config.codebook_size

    def objective(params):
      model = self.model(params, code_vectors(state))
      reconstruction, commitment, codes, latents = losses(
        model, to_pixels(frames_BxHxWx3, self._config.pixel_range), quantize
      )
      total = reconstruction + training.commitment_weight * commitment
      return total, (reconstruction, commitment, codes, latents)

    gradients, (reconstruction, commitment, codes, latents) = jax.grad(objective, has_aux=True)(
      state.params
    )
    updates, optimizer_state = self._optimizer.update(gradients, state.optimizer)
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


def code_vectors(state: TrainState) -> jax.Array:
  """The code vectors [V, E]: means of the latents that each code wins."""
  return state.sums_VxE / state.counts_V[:, None]


def train(
  frames_NxHxWx3: np.ndarray,
  config: VQGANConfig,
  training: VQGANTrainingConfig,
  seed: int,
  report: Callable[[int, Metrics], None] = lambda step, metrics: None,
) -> nnx.State:
  """Trains a VQGAN on frames; each batch is drawn at random and half of it mirrored.

  Args:
    frames_NxHxWx3: uint8, of the config's resolution.
    config: sizes.
    training: steps and rates.
    seed: seeds everything random. Same frames, configs, seed and machine: same result.
    report: called after every step with its number, from 1, and its metrics.

  Returns:
    All variables of the model, for `save_vqgan`.

  Raises:
    ValueError: settings that contradict each other.
    UserError: the frames have fewer latents than there are codes.
  """
  config.validate()
  training.validate()
  codes_per_frame, num_codes = config.grid**2, config.codebook_size
  needed = -(-num_codes // codes_per_frame)
  if len(frames_NxHxWx3) < needed:
    raise UserError(
      f"codebook_size={num_codes} needs at least {needed} frames of {codes_per_frame} codes to "
      f"train on, but there are {len(frames_NxHxWx3)}: give more video or a smaller codebook_size."
    )
  programs = Programs(config, training)
  random = np.random.default_rng(seed)
  key = jax.random.key(seed)
  state = programs.start(seed)
  batch_size = training.batch_size
  cluster_frames = -(-_CLUSTER_LATENTS_PER_CODE * num_codes // codes_per_frame)
  for number in range(training.steps):
    if number == training.continuous_steps:
      chosen = random.choice(len(frames_NxHxWx3), cluster_frames)
      latents = [
        programs.latents(state.params, frames_NxHxWx3[chosen[begin : begin + batch_size]])
        for begin in range(0, cluster_frames, batch_size)
      ]
      state = programs.first_codebook(
        state, jnp.concatenate(latents), jax.random.fold_in(key, training.steps)
      )
    batch_BxHxWx3 = frames_NxHxWx3[random.integers(len(frames_NxHxWx3), size=batch_size)]
    mirrored = random.random(batch_size) < 0.5
    batch_BxHxWx3 = np.where(
      mirrored[:, None, None, None], batch_BxHxWx3[:, :, ::-1], batch_BxHxWx3
    )
    state, metrics = programs.step(
      state, batch_BxHxWx3, number >= training.continuous_steps, jax.random.fold_in(key, number)
    )
    report(number + 1, metrics)
  return nnx.state(programs.model(state.params, code_vectors(state)))
