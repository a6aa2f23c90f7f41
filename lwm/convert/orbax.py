"""The parameters of a checkpoint alone, as a directory that any program with Orbax restores."""

import dataclasses
import json
import pathlib

import numpy as np

from lwm.checkpoint.arrays import ArrayInfo, ArrayWriter, layers
from lwm.checkpoint.parameters import unfinished
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.convert.table import describe, parameter_shapes, write_manifest

_CONFIG = "model.json"


def export_orbax(stored: StoredCheckpoint, output: pathlib.Path, dtype: str | None) -> None:
  """Writes the parameters as nested dictionaries of arrays, and the model's settings.

      orbax.checkpoint.StandardCheckpointer().restore(OUTPUT / "params")

  Rows of tables that pad the vocabulary are cut.

  Args:
    stored: the checkpoint.
    output: must not exist.
    dtype: of the arrays; None: each as it is stored.

  Raises:
    UserError: the output exists or cannot be written; nothing is left then.
  """
  reader, shapes = stored.reader(), parameter_shapes(stored.experiment.model)
  dtypes = {path: np.dtype(dtype or info.dtype) for path, info in reader.arrays.items()}
  arrays = {path: ArrayInfo(shape, dtypes[path]) for path, shape in shapes.items()}
  manifest = {}
  with unfinished(output) as new:
    with ArrayWriter(new / "params", arrays) as writer:
      for path, shape in shapes.items():
        for where in layers(path, shape):
          array = reader.read(path, where)
          array = array[tuple(map(slice, shape[len(where) :]))].astype(arrays[path].dtype)
          writer.write(path, array, where)
          manifest[".".join([path, *map(str, where)])] = describe(array)
    settings = {
      "rope_theta": stored.stage.rope_theta,
      "context": stored.stage.sequence_length,
      "model": dataclasses.asdict(stored.experiment.model),
    }
    (new / _CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
    write_manifest(new, manifest)
