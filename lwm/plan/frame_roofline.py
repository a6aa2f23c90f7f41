"""How long a step of a VQGAN's training should take: see lwm/plan/roofline.py."""

import math

from lwm.config.experiment import VQGANExperiment, VQGANStage
from lwm.cost.chips import Chip
from lwm.cost.layer import FLOAT32_BYTES
from lwm.cost.traced import work
from lwm.parallel.sharding import ShardingRules
from lwm.plan.roofline import UPDATE_BYTES, Roofline, machine_text
from lwm.plan.topology import Topology
from lwm.plan.traffic import Traffic, Wires, moment_bytes
from lwm.program.stage import StageProgram
from lwm.program.trainable import num_elements

# Share of the peak that convolutions reach, and how often norms and activations move their arrays
# in comparison with the convolutions themselves.
CONVOLUTION_EFFICIENCY = 0.5
MOVES = 2


def estimate_frames(
  experiment: VQGANExperiment, stage: VQGANStage, program: StageProgram, topology: Topology
) -> Roofline:
  """Estimates a step of `stage` with its program for devices of the topology."""
  chip, sizes, devices = topology.chip, program.mesh.shape, program.mesh.size
  step_work = work(program.traced.jaxpr)
  per_second = devices * chip.flops
  compute = step_work.flops / (per_second * CONVOLUTION_EFFICIENCY * _share(chip))

  rules = ShardingRules()
  trained, frozen = (num_elements(part) for part in program.trainable.split(program.state.params))
  shards = math.prod(sizes[axis] for axis in rules.model)
  update = UPDATE_BYTES + 2 * moment_bytes(experiment.optimizer)
  moved = MOVES * step_work.bytes / devices + update * trained / shards
  memory = moved / chip.memory_bandwidth

  wires = Wires(program.mesh, topology)
  copies = math.prod(sizes[axis] for axis in rules.batch)
  sent = (
    (rules.model, "weights", (trained + frozen) * (shards - 1) / shards),
    (rules.batch, "gradients", 2 * trained * (copies - 1) / copies),
  )
  traffic = tuple(
    Traffic(axes, what, elements * FLOAT32_BYTES, wires.collective(axes))
    for axes, what, elements in sent
    if elements
  )
  seconds = {
    "compute": compute,
    "memory beyond compute": max(0.0, memory - compute),
    "weights and gradients": sum(part.seconds for part in traffic),
  }
  step = sum(seconds.values())
  return Roofline(
    model_flops=step_work.flops,
    recompute_flops=0.0,
    traffic=traffic,
    seconds=seconds,
    step_seconds=step,
    unit="frames",
    rate_per_chip=stage.frames_per_batch / step / (devices / chip.devices_per_chip),
    mfu=step_work.flops / step / per_second,
    hop=None,
    assumptions=(
      machine_text(chip),
      "FLOPs are those of convolutions and matrix products, which reach "
      f"{CONVOLUTION_EFFICIENCY:.0%} of the peak"
      f"{'' if chip.is_tpu else ' for TF32, half of the peak above'}.",
      f"Norms and activations move the arrays of convolutions {MOVES} times as often as these do.",
      "Weights and gradients travel during no computation.",
    ),
  )


def _share(chip: Chip) -> float:
  """Share of the bfloat16 peak that float32 products with reduced precision have."""
  return 1.0 if chip.is_tpu else 0.5
