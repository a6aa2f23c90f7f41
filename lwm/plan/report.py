"""Plans as text for the terminal."""

import re
from collections.abc import Iterable

from lwm.config.experiment import Stage
from lwm.cost.chips import GIB
from lwm.plan.candidates import Candidate
from lwm.plan.plan import StagePlan, moments_text
from lwm.plan.topology import Topology


def stage_report(plan: StagePlan) -> str:
  """Memory, FLOPs, bytes, time and assumptions of one stage."""
  memory, roofline = plan.memory, plan.roofline
  lines = [heading(plan), "", f"memory per device: {verdict(plan)}"]
  rows = [
    ("parameters", memory.parameters),
    ("optimizer state", memory.optimizer),
    ("batch and scalars", memory.batch),
    ("temporaries", memory.temporaries),
    ("results, constants", memory.rest),
  ]
  for name, size in rows:
    lines.append(f"  {name:<22}{gib(size):>12}")
  lines[-2] += f"   activations, gathered weights, gradients ({gib(memory.gradients).strip()})"
  if memory.host:
    lines.append(f"  {'in host memory':<22}{gib(memory.host):>12}   of {gib(memory.host_capacity)}")
  lines.append("  largest buffers")
  for buffer in memory.buffers[: 8 if not memory.fits else 4]:
    lines.append(f"  {gib(buffer.bytes):>12}  {buffer.shape:<28} {place(buffer.operation)}")

  lines += ["", "per step", f"  {'model FLOPs':<22}{roofline.model_flops:>12.3g}"]
  lines.append(
    f"  {'recompute FLOPs':<22}{roofline.recompute_flops:>12.3g}   "
    f"{roofline.recompute_flops / roofline.model_flops:.0%} of the model's"
  )
  for part in roofline.traffic:
    axes = " x ".join(part.axes)
    lines.append(
      f"  over {axes:<17}{gib(part.bytes):>12}   {part.what}, {milliseconds(part.seconds)} at "
      f"{part.bandwidth / 1e9:.0f} GB/s"
    )
  for name, seconds in roofline.seconds.items():
    if seconds:
      lines.append(f"  {milliseconds(seconds):>34}   {name}")
  lines.append(
    f"  {'estimated step':<22}{milliseconds(roofline.step_seconds):>12}   "
    f"{roofline.rate_per_chip:,.0f} {roofline.unit}/s per chip, MFU {roofline.mfu:.1%}"
  )
  if hop := roofline.hop:
    lines.append(
      f"  a ring hop {'hides' if hop.hides else 'does NOT hide'} behind attention: forward "
      f"{milliseconds(hop.forward_transfer)} of transfer in {milliseconds(hop.forward_compute)}, "
      f"backward {milliseconds(hop.backward_transfer)} in {milliseconds(hop.backward_compute)}"
    )
  lines += ["", "assumptions"] + [f"  {sentence}" for sentence in roofline.assumptions]
  return "\n".join(lines)


def table_head() -> str:
  """The head line of a table of plans."""
  return (
    f"{'stage':<8} {'length':>9} {'machine':<9} {'mesh':<34} {'remat':<17} {'heads':<5} "
    f"{'moments':<13} {'memory':>10} {'of':>10}  {'fits':<5} {'step':>11} {'tokens/s/chip':>13} "
    f"{'MFU':>6}"
  )


def table_row(plan: StagePlan) -> str:
  """One plan as a line of a table."""
  stage, roofline = plan.stage, plan.roofline
  length = stage.sequence_length if isinstance(stage, Stage) else 1
  return (
    f"{stage.name:<8} {length:>9} {plan.topology.name:<9} "
    f"{mesh_text(plan.mesh):<34} {plan.remat:<17} {heads_text(plan.head_groups):<5} "
    f"{plan.moments:<13} {gib(plan.memory.total):>10} {gib(plan.memory.capacity):>10}  "
    f"{'yes' if plan.memory.fits else 'NO':<5} {milliseconds(roofline.step_seconds):>11} "
    f"{roofline.rate_per_chip:>13,.0f} {roofline.mfu:>6.1%}"
  )


def heads_text(head_groups: int) -> str:
  """The share of the heads that attends at a time."""
  return "all" if head_groups == 1 else f"1/{head_groups}"


def try_line(candidate: Candidate, plan: StagePlan | None, reason: str) -> str:
  """The result for one candidate, reported while a search runs."""
  what = f"{candidate.stage.name}: {_candidate_text(candidate)}"
  if plan is None:
    return f"{what}: {reason}"
  return (
    f"{what}: {verdict(plan)}, lower bound {gib(candidate.least_memory)} "
    f"({plan.compile_seconds:.0f} s)"
  )


def nothing_fits(
  topology: Topology, what: str, tried: Iterable[StagePlan], candidates: Iterable[Candidate]
) -> str:
  """A sentence that says why no plan was found, and which one comes closest.

  Args:
    topology: the machine.
    what: the name of a stage.
    tried: the stage's compiled plans; none of them fits.
    candidates: the stage's candidates; read only if nothing was compiled.
  """
  chip = topology.chip
  closest = min(tried, key=lambda plan: plan.memory.shortage, default=None)
  if closest is not None:
    policy = _policy_text(closest.mesh, closest.remat, closest.head_groups, closest.moments)
    return (
      f"{what}: none of the programs tried fits {topology.name}; the closest is {policy}: "
      f"{verdict(closest)}; try more with --tries, or take a larger machine."
    )
  leanest = min(candidates, key=lambda candidate: candidate.shortage(chip), default=None)
  if leanest is None:
    return (
      f"{what}: no mesh of the {len(topology.devices)} devices of {topology.name} divides this "
      "model and its batch: change the number of devices, rows or tokens."
    )
  if leanest.may_fit(chip):
    return (
      f"{what}: XLA compiles none of the programs tried for {topology.name}; try more with --tries."
    )
  needs = f"{gib(leanest.least_memory)} of {gib(chip.memory)}"
  if leanest.least_memory <= chip.memory:
    needs = f"{gib(leanest.host_memory)} of {gib(chip.host_memory)} of the host's memory"
  return (
    f"{what}: nothing fits {topology.name}; the smallest lower bound, of "
    f"{_candidate_text(leanest)}, is {needs} per device: take a larger machine."
  )


def _candidate_text(candidate: Candidate) -> str:
  experiment = candidate.experiment
  return _policy_text(
    candidate.stage.mesh.axis_sizes(),
    experiment.model.remat,
    experiment.model.head_groups,
    moments_text(experiment.optimizer),
  )


def _policy_text(mesh: dict[str, int], remat: str, head_groups: int, moments: str) -> str:
  return f"{mesh_text(mesh)}, remat {remat}, heads {heads_text(head_groups)}, moments {moments}"


def heading(plan: StagePlan) -> str:
  """The stage, machine, mesh and policies of a plan."""
  stage = plan.stage
  if isinstance(stage, Stage):
    batch = f"{stage.rows_per_batch} rows of {stage.sequence_length} tokens"
    policies = f"remat {plan.remat}, heads {heads_text(plan.head_groups)}, "
  else:
    batch, policies = f"{stage.frames_per_batch} frames", ""
  return (
    f"{stage.name}: {batch} on {plan.topology.name} ({len(plan.topology.devices)} devices), "
    f"mesh {mesh_text(plan.mesh)}, {policies}moments {plan.moments}; compiled "
    f"in {plan.compile_seconds:.0f} s, peak memory of this process {gib(plan.peak_rss)}"
  )


def verdict(plan: StagePlan) -> str:
  """Whether it fits, and by how much."""
  memory = plan.memory
  share = f"{gib(memory.total).strip()} of {gib(memory.capacity).strip()}"
  if memory.fits:
    return f"{share}: fits"
  if memory.excess > 0:
    return f"{share}: OUT OF MEMORY by {gib(memory.excess)}"
  return f"{share}: OUT OF THE HOST'S MEMORY by {gib(memory.host - memory.host_capacity)}"


def mesh_text(mesh: dict[str, int]) -> str:
  """The axes that have more than one device."""
  return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "1 device"


def place(operation: str) -> str:
  """JAX's path of an operation, without the parts that don't say where in the model it is."""
  parts = operation.split("/")
  if len(parts) == 1:
    # An argument, or many of them that XLA handles together.
    first, _, others = operation.partition(":")
    return f"{first.lstrip('(')} and others" if others else first
  pass_ = "backward" if any("transpose(" in part for part in parts) else "forward"
  wrappers = re.compile(r"while|body|eval_jaxpr|checkpoint|shard_map|closed_call|(jit|.*jvp)\(.*\)")
  kept = [part for part in parts if not wrappers.fullmatch(part)]
  return f"{pass_}: {'/'.join(kept)}"


def gib(size: float) -> str:
  """Bytes in GiB or MiB."""
  return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (GIB >> 10):.1f} MiB"


def milliseconds(seconds: float) -> str:
  """Seconds as text, without an exponent."""
  return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{seconds * 1e3:.3g} ms"
