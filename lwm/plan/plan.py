"""The plan of one stage on one machine: its memory by compiling, its speed by counting."""

import dataclasses
from typing import Any

from lwm.config.experiment import (
  AnyExperiment,
  AnyStage,
  OptimizerConfig,
  Stage,
  VQGANExperiment,
  VQGANStage,
)
from lwm.plan.compilation import Compilation
from lwm.plan.frame_roofline import estimate_frames
from lwm.plan.memory import Memory, compile_train_step
from lwm.plan.roofline import Roofline, estimate
from lwm.plan.topology import Topology
from lwm.program.stage import StageProgram, build_program


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """Memory and speed of one stage on one machine."""

  stage: AnyStage
  topology: Topology
  mesh: dict[str, int]
  remat: str
  head_groups: int
  moments: str  # See `moments_text`.
  memory: Memory
  roofline: Roofline
  compile_seconds: float
  peak_rss: int  # Most bytes of memory that this process has used so far.

  def as_json(self) -> dict[str, Any]:
    """Numbers, strings, lists and dicts; all units are bytes, seconds and FLOPs."""
    stage, roofline = self.stage, dataclasses.asdict(self.roofline)
    roofline[f"{roofline.pop('unit')}_per_second_per_chip"] = roofline.pop("rate_per_chip")
    names = ["frames_per_batch"]
    if isinstance(stage, Stage):
      names = ["sequence_length", "tokens_per_batch"]
    return {
      "stage": stage.name,
      **{name: getattr(stage, name) for name in names},
      "topology": self.topology.name,
      "devices": len(self.topology.devices),
      "mesh": self.mesh,
      "remat": self.remat,
      "head_groups": self.head_groups,
      "moments": self.moments,
      "fits": self.memory.fits,
      "excess": self.memory.excess,
      "memory": dataclasses.asdict(self.memory),
      "roofline": roofline | {"hop_hides": self.roofline.hop and self.roofline.hop.hides},
      "compile_seconds": self.compile_seconds,
      "peak_rss": self.peak_rss,
    }


def plan_stage(
  experiment: AnyExperiment, stage: AnyStage, topology: Topology
) -> tuple[StagePlan, StageProgram, Compilation]:
  """Compiles and estimates a stage.

  Args:
    experiment: validated.
    stage: one of its stages, or a variant of one.
    topology: the machine; the stage's mesh must use all of its devices.

  Raises:
    UserError: the mesh, the model and the devices do not fit together, or XLA refuses the program.
  """
  program = build_program(experiment, stage, topology.devices)
  memory, compilation = compile_train_step(program, topology, experiment.optimizer.offload)
  if isinstance(experiment, VQGANExperiment):
    assert isinstance(stage, VQGANStage)
    # A VQGAN has no attention, and nothing is computed again.
    remat, head_groups = "none", 1
    roofline = estimate_frames(experiment, stage, program, topology)
  else:
    assert isinstance(stage, Stage)
    remat, head_groups = experiment.model.remat, experiment.model.head_groups
    roofline = estimate(experiment, stage, program.mesh, topology)
  plan = StagePlan(
    stage=stage,
    topology=topology,
    mesh=dict(program.mesh.shape),
    remat=remat,
    head_groups=head_groups,
    moments=moments_text(experiment.optimizer),
    memory=memory,
    roofline=roofline,
    compile_seconds=compilation.seconds,
    peak_rss=compilation.peak_rss,
  )
  return plan, program, compilation


def moments_text(optimizer: OptimizerConfig) -> str:
  """The moments' dtype, followed by "host" if they are kept there."""
  return optimizer.moment_dtype + (" host" if optimizer.offload else "")
