"""The task of a VQGAN's run."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, PartitionSpec

from lwm.checkpoint.identity import Identity, first_difference, manifest_digest
from lwm.checkpoint.reader import newest
from lwm.config.experiment import VQGANExperiment, VQGANStage
from lwm.cost.traced import work
from lwm.data.frame_loader import FrameLoader, open_frames
from lwm.data.frames import FrameDataset
from lwm.errors import UserError
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.program.stage import StageProgram
from lwm.report.presentation import Record
from lwm.report.vqgan import VQGANPresentation
from lwm.vision.codec import FILE_NAME, Codec, save_vqgan
from lwm.vision.pictures import decibels, save_contact_sheet

# A folder of the workdir.
SHEETS = "reconstructions"
_FRAMES_IN_SHEET = 6


class VQGANTask:
  """See `lwm.train.task.Task`."""

  def __init__(self, experiment: VQGANExperiment):
    self._experiment = experiment
    self.presentation = VQGANPresentation(experiment)

  def identity(self) -> Identity:
    """Reads the manifests of the datasets.

    Raises:
      UserError: a dataset is missing, or does not fit the experiment.
    """
    experiment = self._experiment
    manifests = {
      config.name: manifest_digest(FrameDataset(config.path).manifest)
      for config in experiment.datasets
    }
    for stage in experiment.stages:
      open_frames(experiment, stage)
    return Identity(experiment, {}, manifests)

  def initial_params(self, program: StageProgram, identity: Identity) -> tuple[Any, str]:
    """Random parameters, or all that another run with the same VQGAN has learnt.

    Raises:
      UserError: `init_from` has no checkpoint, or holds another VQGAN.
    """
    experiment = self._experiment
    if not experiment.init_from:
      return program.initial_params(experiment.seed), ""
    stored = newest(pathlib.Path(experiment.init_from))
    theirs = dataclasses.asdict(stored.vqgan_experiment.vqgan)
    difference = first_difference(theirs, dataclasses.asdict(experiment.vqgan), "vqgan")
    ours = traverse_util.flatten_dict(program.state.params, sep=".")
    if difference is None and (unlike := ours.keys() ^ stored.reader().arrays.keys()):
      difference = f"other config.losses (only one of the two has the parameter {min(unlike)})"
    if difference:
      raise UserError(
        f"config.init_from={experiment.init_from} holds a VQGAN with {difference}: change the "
        "config, or initialise from another run."
      )
    return stored.params(program.state.params), f"initial parameters: {stored.path}"

  def open_loader(self, index: int, mesh: Mesh) -> FrameLoader:
    return FrameLoader(self._experiment, index, mesh)

  def notes(self, program: StageProgram, loader: FrameLoader) -> list[str]:
    """The number of frames, and what a step computes."""
    stage, flops = loader.stage, work(program.traced.jaxpr).flops
    self.presentation.step_flops[stage.name] = flops
    per_frame = flops / stage.frames_per_batch / 1e9
    return [
      *loader.report(),
      f"{stage.name}: {per_frame:.3g} GFLOPs per frame, forward and backward",
    ]

  def batch_text(self, stage: VQGANStage) -> str:
    side = self._experiment.vqgan.resolution
    return f"{stage.frames_per_batch} frames of {side}x{side} pixels"

  def less_memory(self, stage: VQGANStage) -> str:
    return (
      "try a smaller frames_per_batch, or more devices along data or fsdp of the stage's mesh; "
      f"python -m experiments.plan --config=... --topology=... --stage={stage.name} says what fits"
    )

  def held_out(self, program: StageProgram, loader: FrameLoader, params: Any) -> list[Record]:
    """Results on the held-out frames of each dataset."""
    rows = []
    for name in loader.evaluation_datasets:
      total = None
      for batch in loader.evaluation_batches(name):
        # At most one batch waits for the devices while the next one is read.
        jax.block_until_ready(total)
        sums = program.evaluation_step(params, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
      rows.append({"dataset": name} | results(jax.device_get(total)))
    return rows

  def write_results(
    self, workdir: pathlib.Path, program: StageProgram, loader: FrameLoader, params: Any
  ) -> list[str]:
    """Writes the VQGAN's file, and a sheet of held-out frames, each above its reconstruction."""

    def variables(params: Any) -> Any:
      whole = jax.tree.map(lambda leaf: jax.reshard(leaf, PartitionSpec()), params)
      return program.objective.vqgan.variables(whole)

    saved = jax.jit(variables)(params)
    if jax.process_index() != 0:
      return []
    path = workdir / FILE_NAME
    save_vqgan(path, self._experiment.vqgan, jax.device_get(saved))
    lines = [f"VQGAN: {path}"]
    rows = []
    # No other process takes part.
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
      codec = Codec(path, _FRAMES_IN_SHEET)
      for name in loader.evaluation_datasets:
        truth = np.stack([loader.held_out(name, index) for index in range(_FRAMES_IN_SHEET)])
        rows += [truth, codec.decode(codec.encode(truth))]
    if rows:
      sheet = workdir / SHEETS / f"{loader.stage.name}.png"
      save_contact_sheet(sheet, rows)
      lines.append(f"held-out frames, each above its reconstruction: {sheet}")
    return lines


def results(sums: dict[str, np.ndarray]) -> Record:
  """The record of an evaluation, from the sums of `VQGANObjective.evaluate`."""
  wins_V, frames = sums["wins"], float(sums["frames"])
  share_V = wins_V[wins_V > 0] / wins_V.sum()
  return {
    "psnr": decibels(float(sums["squared_error"]) / frames),
    "ssim": float(sums["ssim"] / frames),
    "usage": float((wins_V > 0).mean()),
    "codebook_perplexity": float(np.exp(-(share_V * np.log(share_V)).sum())),
    "frames": int(frames),
  }
