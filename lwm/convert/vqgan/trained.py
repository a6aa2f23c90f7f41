"""From a checkpoint of a VQGAN's run to the file that everything else reads."""

import pathlib

from flax import traverse_util

from lwm.checkpoint.reader import StoredCheckpoint
from lwm.errors import UserError
from lwm.vision.codec import save_vqgan
from lwm.vision.objective import VQGANObjective


def export_trained_vqgan(stored: StoredCheckpoint, output: pathlib.Path) -> None:
  """Writes the VQGAN of a checkpoint as one .npz file.

  Raises:
    UserError: the checkpoint holds a language model, or `output` exists or cannot be written.
  """
  experiment = stored.vqgan_experiment
  if output.exists():
    raise UserError(f"{output} exists already: delete it, or name another --output.")
  reader = stored.reader()
  params = traverse_util.unflatten_dict(
    {path: reader.read(path) for path in reader.arrays}, sep="."
  )
  objective = VQGANObjective(experiment.vqgan, experiment.losses)
  save_vqgan(output, experiment.vqgan, objective.variables(params))
