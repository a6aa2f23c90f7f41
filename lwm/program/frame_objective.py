"""A VQGAN's objective as the train step takes it: see lwm/vision/objective.py for the mathematics.

Letters: B frames, H and W height and width in pixels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lwm.parallel.sharding import LogicalAxes
from lwm.program.step import Batch, Metrics
from lwm.program.trainable import Trainable
from lwm.vision.objective import VQGANObjective

FRAMES = "frames"


@dataclasses.dataclass(frozen=True)
class FrameObjective:
  """What a stage of a VQGAN's run minimises.

  A batch is {"frames": uint8 [B, H, W, 3]}, divided over the batch axes of the mesh.

  Attributes:
    vqgan: the losses, their gradients, and the new values of what gradients do not train.
    trainable: the parameters that the optimizer updates.
    seed: of everything random in a step.
    first_step: steps of all stages before this one.
  """

  vqgan: VQGANObjective
  trainable: Trainable
  seed: int
  first_step: int

  def init(self, key: jax.Array) -> Any:
    """Random parameters, and the first values of everything else that lasts."""
    return self.vqgan.init(key)

  def gradients(self, params: Any, batch: Batch, step: jax.Array) -> tuple[Any, Any, Metrics]:
    """Gradients of the trained parameters, new values of the frozen ones, and metrics."""
    step = self.first_step + step
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    return self.vqgan.gradients(params, batch[FRAMES], step, key)

  def evaluate(self, params: Any, batch: Batch) -> Metrics:
    """Sums over the frames of a batch: see `VQGANObjective.evaluate`."""
    return self.vqgan.evaluate(params, batch[FRAMES])

  def counts(self, batch: Batch) -> Metrics:
    """The number of frames, a float32 scalar."""
    return {FRAMES: jnp.float32(len(batch[FRAMES]))}


def logical_axes(leaf: jax.ShapeDtypeStruct, shards: int) -> LogicalAxes:
  """The logical axes of one parameter.

  A kernel or a table is stored in shards along the last of its dimensions that divides into
  `shards`; vectors, and arrays that do not divide, are whole on every device.
  """
  axes: list[str | None] = [None] * leaf.ndim
  if leaf.ndim > 1:
    for dimension in reversed(range(leaf.ndim)):
      if leaf.shape[dimension] % shards == 0:
        axes[dimension] = "model"
        break
  return tuple(axes)
