"""The train step and the evaluation step.

A trailing 2 is (text, vision), as in MODALITIES.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lwm.program.objective import Batch, Metrics, Objective
from lwm.program.state import TrainState


def train_step(
  state: TrainState,
  batch: Batch,
  loss_limit: jax.Array | float = math.inf,
  *,
  objective: Objective,
  optimizer: optax.GradientTransformationExtraArgs,
  learning_rate: Callable[[jax.Array], jax.Array],
) -> tuple[TrainState, Metrics]:
  """One update, pure.

  A bad step leaves the state unchanged: its loss or gradient norm is not finite, or its loss is
  above the limit.

  Args:
    state: float32 parameters, moments and step.
    batch: arrays [B, S] as in lwm/config/batch.py; the objective's accumulation_steps divides the
      rows of each device.
    loss_limit: float32 scalar.
    objective: the loss, which parameters the optimizer updates, and new values of the others.
    optimizer: updates the trained parameters; its `update` takes `applied` (see optimizer.py).
    learning_rate: the optimizer's schedule, for the metrics.

  Returns:
    The next state; and the metrics of `Objective.gradients` and `Objective.counts`, gradient_norm
    before clipping, learning_rate, and applied, 0 for a bad step and 1 otherwise. All are float32
    scalars, except the statistics of layers.
  """
  gradients, frozen, metrics = objective.gradients(state.params, batch, state.step)
  loss, gradient_norm = metrics["loss"], optax.tree.norm(gradients)
  # One NaN in any gradient makes their norm NaN.
  applied = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & (loss <= loss_limit)
  trained, frozen_before = objective.trainable.split(state.params)
  updates, optimizer_state = optimizer.update(
    gradients, state.optimizer_state, trained, applied=applied
  )
  trained, frozen = jax.tree.map(
    functools.partial(jnp.where, applied),
    (optax.apply_updates(trained, updates), frozen),
    (trained, frozen_before),
  )
  metrics |= objective.counts(batch) | {
    "gradient_norm": gradient_norm,
    "learning_rate": learning_rate(state.step),
    "applied": applied.astype(jnp.float32),
  }
  params = objective.trainable.join(trained, frozen)
  return TrainState(params, optimizer_state, state.step + applied), metrics


def evaluation_step(
  params: Any, batch: Batch, *, objective: Objective
) -> tuple[jax.Array, jax.Array]:
  """Sums of weighted negative log-likelihoods, and of weights, by modality: float32 [2] each."""
  sums = objective.sums(params, batch)
  return sums.nll, sums.weight
