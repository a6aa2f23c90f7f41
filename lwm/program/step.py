"""The train step: gradients of the two modalities' losses, accumulated exactly, and an update.

Letters: B rows, S sequence, A microbatches (accumulation_steps); a trailing 2 is (text, vision).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lwm.config.experiment import LossConfig
from lwm.model import LossSums
from lwm.parallel.sharding import ShardingRules
from lwm.program.state import TrainState

# (parameters, batch) -> weighted sums of each modality's losses: `lwm.model.Model.losses`.
ModelLosses = Callable[[Any, dict[str, jax.Array]], LossSums]


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  loss_limit: jax.Array | float = math.inf,
  *,
  losses: ModelLosses,
  loss: LossConfig,
  optimizer: optax.GradientTransformation,
  learning_rate: Callable[[jax.Array], jax.Array],
  accumulation_steps: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update, pure.

  The loss is sum_m share_m x (sum of w x nll over targets of m) / (sum of w over targets of m), the
  sums running over the whole batch, and share_m being the modality's weight relative to those
  present. Both divisors are known before the first microbatch, so the gradients of microbatches
  simply add up: accumulation changes nothing but the order of float32 sums.

  A bad step, whose loss or gradient norm is not finite or whose loss is above the limit, leaves the
  state as it was.

  Args:
    state: float32 parameters, moments and step.
    batch: arrays [B, S] as in lwm/config/batch.py; accumulation_steps divides the rows of each
      device.
    loss_limit: float32 scalar.
    losses: the model.
    loss: shares of the modalities.
    optimizer: updates the parameters; its `update` takes `applied` (see optimizer.py).
    learning_rate: the optimizer's schedule, for the metrics.
    accumulation_steps: microbatches, run one after the other.

  Returns:
    The next state, and float32 scalars: loss, which is what is minimised; text_loss and
    vision_loss, nats a target (0 without targets); gradient_norm before clipping; learning_rate;
    what train_flops wants: tokens, attended_pairs, text_targets, vision_targets; and applied, 0 for
    a bad step, else 1.
  """
  weights_2 = modality_sums(batch["loss_weights"], batch["modality"])
  normaliser_2 = jnp.where(weights_2 > 0, 1 / jnp.where(weights_2 > 0, weights_2, 1), 0)
  share_2 = jnp.where(weights_2 > 0, jnp.array([loss.text_weight, loss.vision_weight]), 0)
  # A batch whose only modality has weight 0 trains nothing, rather than dividing 0 by 0.
  share_2 = share_2 / jnp.where(share_2.sum() > 0, share_2.sum(), 1)

  def microbatch_loss(params, microbatch):
    sums = losses(params, microbatch)
    return jnp.sum(share_2 * normaliser_2 * sums.loss), jnp.stack([sums.loss, sums.nll])

  gradient = jax.grad(microbatch_loss, has_aux=True)
  if accumulation_steps == 1:
    gradients, (loss_2, nll_2) = gradient(state.params, batch)
  else:

    def accumulate(total, microbatch):
      return jax.tree.map(jnp.add, total, gradient(state.params, microbatch)), None

    zero = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros((2, 2)))
    microbatches = split_rows(batch, accumulation_steps)
    (gradients, (loss_2, nll_2)), _ = jax.lax.scan(accumulate, zero, microbatches)

  total_loss = jnp.sum(share_2 * normaliser_2 * loss_2)
  gradient_norm = optax.tree.norm(gradients)
  # One NaN in any gradient makes their norm NaN.
  applied = jnp.isfinite(total_loss) & jnp.isfinite(gradient_norm) & (total_loss <= loss_limit)
  updates, optimizer_state = optimizer.update(
    gradients, state.optimizer_state, state.params, applied=applied
  )
  params = jax.tree.map(
    functools.partial(jnp.where, applied), optax.apply_updates(state.params, updates), state.params
  )
  targets_2 = modality_sums((batch["loss_weights"] > 0).astype(jnp.float32), batch["modality"])
  pairs_BxS = (batch["key_stop"] - batch["key_start"]).astype(jnp.float32)
  metrics = {
    "loss": total_loss,
    "text_loss": normaliser_2[0] * nll_2[0],
    "vision_loss": normaliser_2[1] * nll_2[1],
    "gradient_norm": gradient_norm,
    "learning_rate": learning_rate(state.step),
    "tokens": jnp.sum(pairs_BxS > 0).astype(jnp.float32),
    "attended_pairs": jnp.sum(pairs_BxS),
    "text_targets": targets_2[0],
    "vision_targets": targets_2[1],
    "applied": applied.astype(jnp.float32),
  }
  return TrainState(params, optimizer_state, state.step + applied), metrics


def evaluation_step(
  params: Any, batch: dict[str, jax.Array], *, losses: ModelLosses
) -> tuple[jax.Array, jax.Array]:
  """Sums of weighted negative log-likelihoods, and of weights, by modality: float32 [2] each."""
  sums = losses(params, batch)
  return sums.nll, sums.weight


def modality_sums(values_BxS: jax.Array, modality_BxS: jax.Array) -> jax.Array:
  """Sums over the targets of text and of vision, float32 [2]."""
  return jnp.stack([jnp.sum(jnp.where(modality_BxS == m, values_BxS, 0)) for m in (0, 1)])


def split_rows(batch: dict[str, jax.Array], parts: int) -> dict[str, jax.Array]:
  """[B, S] -> [A, B/A, S] such that every device keeps its rows and has some in each part."""

  def split(array_BxS):
    rows, length = array_BxS.shape
    # A device's rows are neighbours, so the part must be the minor axis of the split.
    grouped_BxAxS = jnp.reshape(
      array_BxS,
      (rows // parts, parts, length),
      out_sharding=ShardingRules().spec("batch", None, "sequence"),
    )
    return jnp.moveaxis(grouped_BxAxS, 1, 0)

  return jax.tree.map(split, batch)
