"""What a step of a VQGAN's training costs, counted from its program."""

import jax
import jax.numpy as jnp

from lwm.config.experiment import VQGANExperiment, VQGANStage
from lwm.cost.traced import Work, work
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules
from lwm.vision.objective import VQGANObjective


def step_work(experiment: VQGANExperiment, stage: VQGANStage) -> Work:
  """FLOPs and bytes of one step on all devices together, forward and backward pass.

  Only convolutions and matrix products are counted.
  """
  vqgan = VQGANObjective(experiment.vqgan, experiment.losses)
  side = experiment.vqgan.resolution

  def gradients(params, frames_BxHxWx3, step):
    frames_BxHxWx3 = jax.reshard(frames_BxHxWx3, ShardingRules().spec("batch"))
    return vqgan.gradients(params, frames_BxHxWx3, step, jax.random.key(0))

  with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
    params = vqgan.abstract()
    frames = jax.ShapeDtypeStruct((stage.frames_per_batch, side, side, 3), jnp.uint8)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return work(jax.make_jaxpr(gradients)(params, frames, step).jaxpr)
