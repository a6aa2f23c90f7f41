"""AdamW (arXiv 1711.05101) with global-norm clipping, and LWM's learning-rate schedules."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lwm.config.experiment import AnyStage, OptimizerConfig
from lwm.program.moments import scale_by_adam


def learning_rate(optimizer: OptimizerConfig, stage: AnyStage) -> Callable[[jax.Array], jax.Array]:
  """The stage's schedule: maps the number of updates done, int32, to a learning rate, float32.

  During the warm-up, update n of a stage (n from 1) uses n / warmup_steps of the peak. After the
  warm-up, `constant` stays at the peak, and `cosine` falls to the end rate at the last step.
  """
  schedule = optimizer.schedule if stage.schedule is None else stage.schedule
  peak = optimizer.peak_learning_rate
  if stage.peak_learning_rate is not None:
    peak = stage.peak_learning_rate
  end = optimizer.end_learning_rate
  if stage.end_learning_rate is not None:
    end = stage.end_learning_rate

  def schedule_fn(updates_done: jax.Array) -> jax.Array:
    update = (updates_done + 1).astype(jnp.float32)
    rate = jnp.float32(peak)
    if schedule == "cosine":
      progress = (update - stage.warmup_steps) / max(stage.steps - stage.warmup_steps, 1)
      rate = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    return jnp.where(update < stage.warmup_steps, peak * update / max(stage.warmup_steps, 1), rate)

  return schedule_fn


def adamw(
  optimizer: OptimizerConfig, stage: AnyStage, logical_axes: Any
) -> optax.GradientTransformationExtraArgs:
  """The stage's optimizer.

  Its `update` takes `applied`, a bool scalar: if it is false, the state does not change and the
  caller must not use the updates.

  Args:
    optimizer: moments, decay and clipping.
    stage: the stage whose schedule to follow; the schedule counts the stage's own updates from 0.
    logical_axes: a tuple of logical axis names per parameter. Parameters with at least two axes in
      addition to the axis of layers are decayed; norm scales have one and are not.
  """
  decayed = jax.tree.map(
    lambda axes: sum(axis != "layers" for axis in axes) > 1,
    logical_axes,
    is_leaf=lambda node: isinstance(node, tuple),
  )
  adam = kept_unless_applied(
    scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon, optimizer.moment_dtype)
  )
  return optax.chain(
    optax.clip_by_global_norm(optimizer.clip_norm),
    optax.chain(
      in_host_memory(adam) if optimizer.offload else adam,
      optax.add_decayed_weights(optimizer.weight_decay, decayed),
      kept_unless_applied(optax.scale_by_learning_rate(learning_rate(optimizer, stage))),
    ),
  )


def kept_unless_applied(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """The same optimizer, except that its state does not change where `applied` is false.

  The choice is elementwise, like the update itself: it needs no memory and works in donated
  buffers.
  """

  def update(gradients, state, params=None, *, applied=True, **unused):
    del unused
    updates, updated = optimizer.update(gradients, state, params)
    return updates, jax.tree.map(functools.partial(jnp.where, applied), updated, state)

  return optax.GradientTransformationExtraArgs(optimizer.init, update)


def in_host_memory(
  optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """The same optimizer; its state's arrays are in host memory except during an update."""

  def move(state, space):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, state)

  def update(gradients, state, params=None, **arguments):
    state = move(state, jax.memory.Space.Device)
    updates, state = optimizer.update(gradients, state, params, **arguments)
    return updates, move(state, jax.memory.Space.Host)

  return optax.GradientTransformationExtraArgs(
    lambda params: move(optimizer.init(params), jax.memory.Space.Host), update
  )
